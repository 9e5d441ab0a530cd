"""Which request runs when, and on which KV pages. Pure bookkeeping: no tensors, no threads, no clock.

A trajectory here is waiting, running or retained:

    add -> waiting -> running -> (ended) retained -> dropped
             ^          |                   |
             +-preempted+                   +-> its pages are shared by the next request that begins with the same tokens

Running trajectories hold pages for all their tokens. Each `plan` admits what fits, then lists the tokens to compute: many
of one trajectory (prefill) or its last one (decode). A common prefix with a trajectory of equal `kv_key` is never
computed twice: whole pages are shared, the last, partly filled one is copied, because both go on writing to it.
When pages run out, retained trajectories go first, then the youngest running one goes back to waiting. The oldest always
advances, and a request that could not run alone is refused at once, so nothing waits forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_rl.kernels.build import state
from megatron_rl.rollout.engines.base import Request
from megatron_rl.types import Ending


@dataclass(eq=False)
class Running:
    """One request and the state of its KV. `tokens[:num_tokens]` is the context and everything drawn since."""

    request: Request
    max_tokens: int  # of context and response together
    tokens: np.ndarray  # int32 [max_tokens]
    num_tokens: int
    num_computed: int = 0  # tokens whose KV stands in `pages`
    num_found: int = 0  # context tokens whose KV was found rather than computed, at the first admission
    was_admitted: bool = False
    pages: list[int] = field(default_factory=list)
    kv_version: int = 0  # oldest weight version among `pages`
    ending: Ending | None = None

    @classmethod
    def of(cls, request: Request, max_positions: int) -> Running:
        num_context = len(request.token_ids)
        max_tokens = min(num_context + request.max_new_tokens, max_positions)
        tokens = np.zeros(max_tokens, np.int32)
        tokens[:num_context] = request.token_ids
        return cls(request, max_tokens, tokens, num_context)

    @property
    def num_pending(self) -> int:
        return self.num_tokens - self.num_computed

    def push(self, token: int) -> None:
        """Add a drawn token, and decide whether it is the last."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
        if token in self.request.sampling.stop_token_ids:
            self.ending = Ending.STOP
        elif self.num_tokens == self.max_tokens:
            self.ending = Ending.LENGTH


@dataclass(frozen=True)
class Piece:
    """Tokens start .. end - 1 of a trajectory are to be computed."""

    trajectory: Running
    start: int
    end: int


@dataclass
class Plan:
    """One step. Copies (source page, target page) come first, one after another; prefill and decode may be empty."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    prefill: list[Piece] = field(default_factory=list)
    decode: list[Running] = field(default_factory=list)


class Scheduler:
    def __init__(self, num_pages: int, page_size: int, *, max_running: int, prefill_tokens: int) -> None:
        """num_pages counts page 0, which is nobody's: padding rows of a decode batch write there. page_size in tokens."""
        self.pages = state.BlockAllocator(num_pages, num_reserved=1)
        self.page_size = page_size
        self.running: list[Running] = []  # oldest admission first
        self.waiting: list[Running] = []
        self.retained: dict[int, Running] = {}  # by trajectory id, the first to be dropped first
        self.version = 0
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self._copies: list[tuple[int, int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def count_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def add(self, trajectory: Running) -> None:
        self.waiting.append(trajectory)

    def plan(self) -> Plan:
        """What to compute next; afterwards call `computed` for each piece and each decoded trajectory."""
        self._admit()
        self._grow()
        budget = self._prefill_tokens
        plan = Plan(self._copies)
        self._copies = []
        for trajectory in self.running:
            if trajectory.num_pending == 1:
                plan.decode.append(trajectory)
            elif budget:
                num_tokens = min(trajectory.num_pending, budget)
                plan.prefill.append(Piece(trajectory, trajectory.num_computed, trajectory.num_computed + num_tokens))
                budget -= num_tokens
        return plan

    def end(self, trajectory: Running, ending: Ending) -> None:
        """Take a trajectory out; its KV is retained until the pages are needed."""
        trajectory.ending = ending
        if trajectory in self.waiting:
            self.waiting.remove(trajectory)
            return
        self.running.remove(trajectory)
        self.retain(trajectory)

    def retain(self, trajectory: Running) -> None:
        """Keep a trajectory's pages, last to be dropped, or first if it needs no continuation."""
        identity = trajectory.request.trajectory_id
        assert identity not in self.retained, f"trajectory {identity} is retained already"
        unused = trajectory.pages[self.count_for(trajectory.num_computed) :]
        self.pages.drop(unused)
        del trajectory.pages[len(trajectory.pages) - len(unused) :]
        if trajectory.ending == Ending.STOP:
            self.retained = {identity: trajectory, **self.retained}
        else:
            self.retained[identity] = trajectory

    def change_version(self, version: int, oldest_kept: int) -> None:
        """New weights: retained KV stays only where the trajectory goes on and its pages are `oldest_kept` or newer."""
        assert not self.has_work, "weights change only while no request runs"
        goes_back = version < self.version  # the versions after it will be made anew
        self.version = version
        for identity, trajectory in list(self.retained.items()):
            if goes_back or trajectory.ending == Ending.STOP or trajectory.kv_version < oldest_kept:
                self.drop_retained(identity)

    def drop_retained(self, trajectory_id: int) -> None:
        self.pages.drop(self.retained.pop(trajectory_id).pages)

    def _admit(self) -> None:
        for trajectory in list(self.waiting):
            if len(self.running) == self._max_running:
                return
            source, num_shared = self._best_source(trajectory)
            if self._prefix_is_coming(trajectory, num_shared):
                continue
            if not self._place(trajectory, source, num_shared):
                return
            self.waiting.remove(trajectory)
            self.running.append(trajectory)

    def _best_source(self, trajectory: Running) -> tuple[Running | None, int]:
        """The holder of the longest computed common prefix; at least one token is left to compute."""
        best: Running | None = None
        most = 0
        for holder in self._holders(trajectory):
            shared = min(_common_prefix(holder, trajectory), holder.num_computed, trajectory.num_tokens - 1)
            if shared > most:
                best, most = holder, shared
        return best, most

    def _holders(self, trajectory: Running) -> Iterator[Running]:
        """Older KV serves only the trajectory it was computed for."""
        own = self.retained.get(trajectory.request.trajectory_id)
        if own is not None:
            yield own
        for holder in (*self.running, *self.retained.values()):
            same_key = holder.request.kv_key == trajectory.request.kv_key
            if same_key and holder is not own and holder.kv_version == self.version:
                yield holder

    def _prefix_is_coming(self, trajectory: Running, num_shared: int) -> bool:
        """Whether a running prefill is about to compute more of the prefix than can be shared now."""
        return any(
            holder.num_pending > 1
            and holder.kv_version == self.version
            and holder.request.kv_key == trajectory.request.kv_key
            and min(_common_prefix(holder, trajectory), trajectory.num_tokens - 1) > num_shared
            for holder in self.running
        )

    def _place(self, trajectory: Running, source: Running | None, num_shared: int) -> bool:
        """Give a waiting trajectory pages for all its tokens; False: there is no room, and nothing has changed."""
        size = self.page_size
        num_needed = self.count_for(trajectory.num_tokens)
        shared = [] if source is None else source.pages[: self.count_for(num_shared)]
        self.pages.hold(shared)
        own = self.retained.get(trajectory.request.trajectory_id)
        has_tail = num_shared % size > 0
        moves_tail = has_tail and source is own and self.pages.holders(shared[-1:])[0] == 2
        # One page in hand for each running trajectory, or the newcomer would soon be sent back.
        num_spare = len(self.running)
        fits = self._make_room(num_needed - len(shared) + (has_tail and not moves_tail) + num_spare)
        if not fits and has_tail and not moves_tail:
            self.pages.drop([shared.pop()])  # the page to copy from may be the one that is missing
            has_tail, num_shared = False, len(shared) * size
            fits = self._make_room(num_needed - len(shared) + num_spare)
        if not fits:
            self.pages.drop(shared)
            return False
        if trajectory.request.trajectory_id in self.retained:
            self.drop_retained(trajectory.request.trajectory_id)
        if has_tail:
            shared[-1] = self._own(shared[-1])
        trajectory.pages = shared + self.pages.take(num_needed - len(shared), self.version).tolist()
        trajectory.kv_version = int(self.pages.versions(trajectory.pages).min())
        trajectory.num_computed = num_shared
        if not trajectory.was_admitted:
            trajectory.was_admitted, trajectory.num_found = True, num_shared
        return True

    def _own(self, source: int) -> int:
        """A held page that is about to be written to, or a copy of it where others hold it too."""
        target = self.pages.copy_on_write(source)
        if target == source:
            self.pages.renew([source])  # what stands behind the common prefix will be overwritten
        else:
            self._copies.append((source, target))
        return target

    def _grow(self) -> None:
        """A page for the last token of each running trajectory, oldest first; the youngest give way."""
        for trajectory in list(self.running):
            while trajectory in self.running and len(trajectory.pages) < self.count_for(trajectory.num_tokens):
                if self._make_room(1):
                    trajectory.pages += self.pages.take(1, self.version).tolist()
                else:
                    self._preempt(self.running[-1])

    def _make_room(self, num_pages: int) -> bool:
        """Drop retained trajectories until so many pages are free; False, and none dropped, where that is not enough."""
        if self.pages.num_free >= num_pages:
            return True
        retained = [page for trajectory in self.retained.values() for page in trajectory.pages]
        pages, num_holds = np.unique(np.array(retained, np.int64), return_counts=True)
        num_reclaimable = int((num_holds == self.pages.holders(pages)).sum())
        if self.pages.num_free + num_reclaimable < num_pages:
            return False
        while self.pages.num_free < num_pages:
            self.drop_retained(next(iter(self.retained)))
        return True

    def _preempt(self, trajectory: Running) -> None:
        self.running.remove(trajectory)
        self.pages.drop(trajectory.pages)
        trajectory.pages = []
        trajectory.num_computed = 0
        self.waiting.insert(0, trajectory)


def _common_prefix(a: Running, b: Running) -> int:
    num_tokens = min(a.num_tokens, b.num_tokens)
    differs = a.tokens[:num_tokens] != b.tokens[:num_tokens]
    return int(differs.argmax()) if differs.any() else num_tokens
