"""An engine without a model: its tokens are a function of (trajectory, position), its order of work of a seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.base import Capabilities, Chunk, Request
from megatron_rl.types import Ending

STOP = 99
FIRST = 100  # response tokens are from here on, prompt tokens and STOP below


def response_token(trajectory_id: int, position: int) -> int:
    return FIRST + (trajectory_id * 7919 + position * 104729) % 50_000


class FakeEngine:
    """`length(trajectory_id)`: tokens of the whole response, its stop token included."""

    def __init__(
        self,
        length: Callable[[int], int],
        *,
        name: str = "fake-0",
        seed: int = 0,
        chunk: int = 3,
        token: Callable[[int, int], int] = response_token,
    ) -> None:
        self.name, self.weight_version = name, 0
        self.capabilities = Capabilities(log_probs=True, kv_snapshot=False, memory_release=False, streaming=True)
        self.requests: list[Request] = []  # everything ever asked for
        self.dies_after: int | None = None  # chunks
        self.dies_with: type[EngineError] = EngineError
        self.hangs_after: int | None = None  # chunks
        self.is_restarting = False
        self._length, self._token, self._chunk = length, token, chunk
        self._random = random.Random(seed)
        self._aborted: set[int] = set()
        self._num_chunks = 0

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        self.requests += requests
        live = {r.trajectory_id: (r, int((r.token_ids >= FIRST).sum()), 0) for r in requests}
        self._aborted -= set(live)
        while live:
            for _ in range(self._random.randrange(4)):
                await asyncio.sleep(0)
            self._num_chunks += 1
            if self.dies_after is not None and self._num_chunks > self.dies_after:
                raise self.dies_with("the process is gone")
            if self.hangs_after is not None and self._num_chunks > self.hangs_after:
                await asyncio.Event().wait()
            request, start, made = live.pop(self._random.choice(sorted(live)))
            chunk, made = self._step(request, start, made)
            if chunk.ending is None:
                live[request.trajectory_id] = (request, start, made)
            yield chunk

    def _step(self, request: Request, start: int, made: int) -> tuple[Chunk, int]:
        t = request.trajectory_id
        n = 0 if t in self._aborted else min(self._random.randint(1, self._chunk), request.max_new_tokens - made)
        positions = range(start + made, min(start + made + n, self._length(t)))
        tokens = [STOP if p == self._length(t) - 1 else self._token(t, p) for p in positions]
        made += len(tokens)
        ending = Ending.ABORT if t in self._aborted else None
        if tokens and tokens[-1] == STOP:
            ending = Ending.STOP
        elif made == request.max_new_tokens:
            ending = Ending.LENGTH
        versions = np.full(len(tokens), request.weight_version, np.int32)
        log_probs = np.array([-(x % 7) / 4 for x in tokens], np.float32)
        return Chunk(t, np.array(tokens, np.int32), log_probs, request.weight_version, versions, 0, ending), made

    async def abort(self, trajectory_ids: Sequence[int] | None) -> None:
        assert trajectory_ids is not None
        self._aborted |= set(trajectory_ids)
