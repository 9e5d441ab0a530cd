"""One trajectory in one rollout phase: how many tokens it may add, the tokens it has added, and how that ended.

It writes its own segment to the buffer and knows nothing of other trajectories, groups or deadlines (`scheduler.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.engines.base import Chunk, Engine, Request, Sampling
from megatron_rl.rollout.repetition import RepetitionDetector
from megatron_rl.types import Ending, Prompt, Trajectory


@dataclass(frozen=True)
class Limits:
    token_budget: int  # tokens a trajectory may add in one iteration
    max_response_tokens: int
    max_segments: int
    max_positions: int  # the model's context, prompt included


@dataclass(frozen=True)
class Room:
    """What a trajectory may add now, and what it means when it does: `length` or `budget`."""

    num_tokens: int
    ending: Ending
    is_last_segment: bool


def room(trajectory: Trajectory, num_prompt_tokens: int, iteration: int, limits: Limits) -> Room:
    """Counted from the segments alone, so that an interrupted iteration, run again, allows what it allowed at first.

    The segments of one iteration count as one: only a kill or a SIGTERM makes several of them."""
    earlier = {s.iteration for s in trajectory.segments} - {iteration}
    is_last = len(earlier) + 1 >= limits.max_segments
    response = min(limits.max_response_tokens, limits.max_positions - num_prompt_tokens) - trajectory.num_tokens
    spent = sum(len(s.token_ids) for s in trajectory.segments if s.iteration == iteration)
    budget = limits.token_budget - spent
    if response <= budget or len(earlier) >= limits.max_segments:
        fits = max(response, 0) if len(earlier) < limits.max_segments else 0
        return Room(fits, Ending.LENGTH, is_last)
    return Room(max(budget, 0), Ending.LENGTH if is_last else Ending.BUDGET, is_last)


class Continuation:
    """Tokens arrive by `accept`, are kept by `commit`, and `close` ends the segment. It is opened with its first token."""

    def __init__(
        self,
        trajectory: Trajectory,
        prompt: Prompt,
        engine: Engine,
        room: Room,
        *,
        sampling: Sampling,
        detector: RepetitionDetector | None,
    ) -> None:
        """`detector` is a fresh one; None does not look for repetitions."""
        self.trajectory, self.prompt, self.engine, self.room = trajectory, prompt, engine, room
        self.sampling, self._detector = sampling, detector
        self.pending_since: float | None = None  # event-loop time of the first uncommitted token [s]
        self.is_abandoned = False  # its group was dropped; what it still makes is kept, but not continued
        self.has_repeated = False
        self._segment_id: int | None = None
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._made = self._kept = 0
        before = trajectory.token_ids
        self._last_token: int | None = int(before[-1]) if len(before) else None
        decisive = before[-detector.window :] if detector else before[:0]
        while detector and len(decisive):  # once, unless an earlier run with other limits let a repetition pass
            fired_at = detector.push_many(decisive)
            self.has_repeated = fired_at == len(decisive) - 1
            decisive = decisive[len(decisive) if fired_at is None else fired_at + 1 :]

    @property
    def id(self) -> int:
        return self.trajectory.id

    @property
    def num_pending(self) -> int:
        return sum(len(tokens) for tokens, _, _ in self._pending)

    def ending_at_start(self) -> Ending | None:
        """Where nothing is left to generate: how the trajectory stands (`budget`: it waits for the next iteration).

        A process killed between a trajectory's last token and its ending leaves that ending to be found here."""
        if self.has_repeated:
            return Ending.REPEAT
        if self._last_token in self.sampling.stop_token_ids:
            return Ending.STOP
        return self.room.ending if self.room.num_tokens == 0 else None

    def request(self, weight_version: int) -> Request:
        context = np.concatenate([self.prompt.token_ids, self.trajectory.token_ids]).astype(np.int32)
        return Request(self.id, context, self.room.num_tokens, self.sampling, weight_version, self.prompt.id)

    def accept(self, chunk: Chunk, now: float) -> bool:
        """Take a chunk of the engine; whether its tokens complete a repetition. Tokens after that are counted, not kept."""
        self._made += len(chunk.token_ids)
        if self.has_repeated or not len(chunk.token_ids):
            return False
        kept = self._until_repetition(chunk.token_ids)
        self._pending.append((chunk.token_ids[:kept], chunk.log_probs[:kept], chunk.kv_versions[:kept]))
        self._kept += kept
        self._last_token = int(chunk.token_ids[kept - 1])
        self.pending_since = now if self.pending_since is None else self.pending_since
        return self.has_repeated

    def verdict(self, ending: Ending, *, phase_is_over: bool) -> Ending:
        """The segment's ending, given the engine's. One aborted on its very last token has ended all the same."""
        if self.has_repeated:
            return Ending.REPEAT
        if ending is Ending.STOP or (self._kept and self._last_token in self.sampling.stop_token_ids):
            return Ending.STOP
        if self._kept >= self.room.num_tokens:
            return self.room.ending
        if ending is Ending.ABORT and not (phase_is_over and self.room.is_last_segment and self._kept):
            return Ending.ABORT
        return Ending.LENGTH

    def commit(self, buffer: ReplayBuffer, iteration: int, weight_version: int) -> None:
        if self._pending:
            tokens, log_probs, kv_versions = (np.concatenate(arrays) for arrays in zip(*self._pending, strict=True))
            with buffer.transaction():
                buffer.append_chunk(self._segment(buffer, iteration, weight_version), tokens, log_probs, kv_versions)
        self._pending, self.pending_since = [], None

    def close(self, buffer: ReplayBuffer, iteration: int, weight_version: int, ending: Ending) -> None:
        """Commit the rest together with the ending. A segment aborted before its first token never was."""
        if ending is Ending.ABORT and not self._made:
            return
        with buffer.transaction():
            self.commit(buffer, iteration, weight_version)
            segment_id = self._segment(buffer, iteration, weight_version)
            buffer.close_segment(segment_id, ending, made=self._made, cut=self._made - self._kept)

    def _segment(self, buffer: ReplayBuffer, iteration: int, weight_version: int) -> int:
        if self._segment_id is None:
            self._segment_id = buffer.open_segment(
                self.id, iteration, weight_version, self.sampling.temperature, self.engine.name
            )
        return self._segment_id

    def _until_repetition(self, token_ids: np.ndarray) -> int:
        """How many of these tokens count: all, or those up to where the detector fires."""
        fired_at = self._detector.push_many(token_ids) if self._detector else None
        if fired_at is None:
            return len(token_ids)
        self.has_repeated = True
        return fired_at + 1
