"""KV pages of unfinished trajectories in one slab of host memory, each distinct page once.

A slot holds one page over all layers. What a trajectory had in the store and has not changed since is not copied again; pages
that trajectories share on the device, such as a group's prompt, share their slots. What exceeds the memory is not kept: the
ends of the shortest trajectories, which cost least to compute again. Nothing goes to disk. How bytes move:
`kernels/snapshot.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.errors import EngineError
from megatron_rl.kernels.build import state
from megatron_rl.kernels.kv_pages import PagedPool, Scheme, raise_faults, slot_bytes_of
from megatron_rl.kernels.snapshot import PageCopier, slab

_CHUNK_BYTES = 32 << 20  # of one of the copier's two buffers, which are there only while it copies


@dataclass(frozen=True)
class CachedPages:
    """A trajectory's KV on the device."""

    trajectory_id: int
    token_ids: np.ndarray  # int32 [tokens], at least as many as the pages hold
    pages: np.ndarray  # int64 [pages]
    num_stored: int  # first pages that are in the store, unchanged


@dataclass(frozen=True)
class Stored:
    token_ids: np.ndarray  # int32 [slots * page_size]
    slots: np.ndarray  # int64 [slots]


class PageStore:
    def __init__(self, pool: PagedPool, *, host_bytes: int, compression: Scheme) -> None:
        """Takes its memory at once. Raises EngineError where it holds no page, KernelError where it is refused."""
        self._pool, self._compression = pool, compression
        self.slot_bytes = slot_bytes_of(pool, compression)
        self.num_slots = host_bytes // self.slot_bytes
        if self.num_slots < 1:
            raise EngineError(
                f"rollout.kv_store.host_bytes: {host_bytes} bytes for each rank of the server; one KV page takes "
                f"{self.slot_bytes}; raise it, or set rollout.kv_policy=recompute"
            )
        self._slab = slab(self.num_slots, self.slot_bytes, pool.device)
        self._slots = state.BlockAllocator(self.num_slots)
        self._stored: dict[int, Stored] = {}

    @property
    def num_slots_used(self) -> int:
        return self.num_slots - self._slots.num_free

    @property
    def num_kept(self) -> int:
        return len(self._stored)

    def save(self, cached: Sequence[CachedPages], keep: Sequence[int]) -> tuple[list[int], int]:
        """Tokens kept of each, fewer than its pages hold where memory is short; bytes copied. Others are forgotten."""
        wanted = {item.trajectory_id for item in cached} | set(keep)
        for trajectory_id in self._stored.keys() - wanted:
            self._forget(trajectory_id)
        slot_of_page = np.full(self._pool.num_pages, -1, np.int64)
        sources: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        for item in sorted(cached, key=lambda item: -len(item.pages)):
            new = self._admit(item, slot_of_page)
            sources.append(new)
            targets.append(slot_of_page[new])
        num_copied = self._copy(PageCopier.save, sources, targets)
        counts = [len(s.token_ids) if (s := self._stored.get(item.trajectory_id)) else 0 for item in cached]
        return counts, num_copied * self.slot_bytes

    def get(self, trajectory_id: int) -> Stored | None:
        return self._stored.get(trajectory_id)

    def load(self, pages: Sequence[np.ndarray], slots: Sequence[np.ndarray]) -> int:
        """Fill device pages from slots, int64 [n] each. Returns bytes copied."""
        return self._copy(PageCopier.load, pages, slots) * self.slot_bytes

    def _admit(self, item: CachedPages, slot_of_page: np.ndarray) -> np.ndarray:
        """Slots for as much of a trajectory as there is room for, entered in `slot_of_page`. Returns its pages that must be
        copied, int64 [n]."""
        old = self._stored.get(item.trajectory_id)
        known = self._still_stored(item, old)
        self._slots.hold(known)
        if old is not None:
            self._forget(item.trajectory_id)
        rest = item.pages[len(known) :]
        num_fitting = np.searchsorted(np.cumsum(slot_of_page[rest] < 0), self._slots.num_free, side="right")
        rest = rest[:num_fitting]
        shared = slot_of_page[rest]
        new = rest[shared < 0]
        self._slots.hold(shared[shared >= 0])
        slot_of_page[new] = np.sort(self._slots.take(len(new), 0))  # neighbours, as far as there are: fewer copies
        slots = np.concatenate([known, slot_of_page[rest]])
        if len(slots):
            num_tokens = len(slots) * self._pool.page_size
            self._stored[item.trajectory_id] = Stored(item.token_ids[:num_tokens].copy(), slots)
        return new

    def _still_stored(self, item: CachedPages, old: Stored | None) -> np.ndarray:
        if old is None:
            return np.zeros(0, np.int64)
        num_known = min(item.num_stored, len(old.slots))
        num_tokens = num_known * self._pool.page_size
        assert (old.token_ids[:num_tokens] == item.token_ids[:num_tokens]).all(), "a trajectory only grows"
        return old.slots[:num_known]

    def _copy(self, move: Callable[..., None], pages: Sequence[np.ndarray], slots: Sequence[np.ndarray]) -> int:
        """move: a method of PageCopier. Returns pages moved."""
        all_pages = np.concatenate([np.zeros(0, np.int64), *pages])
        if not len(all_pages):
            return 0
        copier = PageCopier(self._pool, chunk_bytes=_CHUNK_BYTES, scheme=self._compression)
        move(copier, all_pages, self._slab, np.concatenate(slots))
        copier.close()
        raise_faults(self._pool)
        return len(all_pages)

    def _forget(self, trajectory_id: int) -> None:
        self._slots.drop(self._stored.pop(trajectory_id).slots)
