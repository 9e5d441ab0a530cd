"""A started SGLang server that may die: started again, given its weights again, its requests taken up where they were.

    generate -> engine.generate -> chunks -> the caller                      as long as the server lives
                     | EngineGoneError
                     v
             start again (one caller does it, the others wait) -> weights of this version -> the same requests, each with
             the tokens it has so far and the rest of its allowance

    release_memory, resume_memory, a publish -> the server is gone -> `lose`: its processes and their memory are no more
             -> `revive`, while the trainer is off the GPU: started again, without weights -> published to

No chunk is yielded twice and no token is lost. Only a trainer of one rank can export its weights in the middle of a rollout
phase: with several, requests of a server that is gone end in EngineLostError, for whoever can gather the ranks to `revive` it
and publish. It gives up, with the log's last lines, after `rollout.sglang.max_restarts`, and at once where the server refuses
(another version, arguments it does not know). Then the run ends and the same command continues it. Who calls what when:
`serving_sglang.py`. The server itself: `sglang_server.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, aclosing, suppress
from dataclasses import fields, replace

import numpy as np
import torch

from megatron_rl.errors import EngineError, EngineGoneError, EngineLostError
from megatron_rl.rollout.engines.base import Capabilities, Chunk, KVSnapshot, KVUsage, Request
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_server import ServerProcess
from megatron_rl.types import Ending

log = logging.getLogger(__name__)

Buckets = Iterable[Sequence[tuple[str, torch.Tensor]]]


class SupervisedEngine:
    """See `base.Engine`. Owns the server's process."""

    def __init__(
        self,
        server: ServerProcess,
        connect: Callable[[str], Awaitable[SGLangEngine]],
        *,
        max_restarts: int,
        export: Callable[[], AbstractContextManager[Buckets]] | None,
    ) -> None:
        """connect: an engine for the server at a URL. export: the trainer's weights at any time, valid inside; None if it has
        to be asked collectively. Not started: see `start`."""
        self.name = server.name
        self.num_restarts = 0
        self._server, self._connect, self._export, self._max_restarts = server, connect, export, max_restarts
        self._engine: SGLangEngine | None = None
        self._lost: EngineError | None = None  # why the engine of now has no server
        self.capabilities: Capabilities  # the engine's, known from `start` on
        self.weight_version = -1
        self._past_usage = KVUsage()  # of engines whose server died
        self._mending = asyncio.Lock()
        self._open: set[int] = set()  # trajectories of running `generate` calls
        self._aborted: set[int] = set()  # of those, the ones a dead server was to abort

    @property
    def engine(self) -> SGLangEngine:
        assert self._engine is not None, "started before"
        return self._engine

    @property
    def is_lost(self) -> bool:
        """Its server is gone, and was not started again yet: its next request does it, or `revive`."""
        return self._lost is not None

    @property
    def is_restarting(self) -> bool:
        return self._mending.locked()

    async def start(self) -> None:
        """Raises EngineError when the server cannot be had."""
        self._engine = await self._connect(await self._server.start())
        self.capabilities = self._engine.capabilities

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        left = {r.trajectory_id: _Progress(r) for r in requests}
        self._open |= left.keys()
        self._aborted -= left.keys()
        while left:
            engine, going = self.engine, [p.remainder() for p in left.values()]
            try:
                async with aclosing(engine.generate(going)) as chunks:
                    async for chunk in chunks:
                        left[chunk.trajectory_id].tokens.append(chunk.token_ids)
                        if chunk.ending is not None:
                            del left[chunk.trajectory_id]
                            self._open.discard(chunk.trajectory_id)
                        yield chunk
            except EngineError as e:
                is_gone = await self._is_gone(e)
                if not is_gone and engine is self._engine and not self.is_restarting:  # nobody has found it dead meanwhile
                    raise
                await self._mend(engine, e)
                ended = {i: ending for i, p in left.items() if (ending := self._ending_in_absence(p))}
                for i, ending in ended.items():
                    self._open.discard(i)
                    yield _last_chunk(left.pop(i).request, ending)

    async def abort(self, trajectory_ids: Sequence[int] | None) -> None:
        wanted = self._open if trajectory_ids is None else self._open & set(trajectory_ids)
        self._aborted |= wanted  # in case the server is dead, or dies before it has obeyed
        if not self._mending.locked():
            with suppress(EngineGoneError):  # whoever listens to the requests finds out too, and mends
                await self.engine.abort(trajectory_ids)

    async def load_weights(self, buckets: Buckets, version: int) -> None:
        await self.engine.load_weights(buckets, version)
        self.loaded(version)

    def loaded(self, version: int) -> None:
        """The engine was given `version`, by `load_weights` here or in one pass with others."""
        self.weight_version = version

    async def release_memory(self, tags: Sequence[str]) -> None:
        """A server that is gone holds no memory: no error."""
        await self._or_lose(self.engine.release_memory, tags)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """A server that is gone is left so: no error. See `is_lost`."""
        await self._or_lose(self.engine.resume_memory, tags)

    async def lose(self, error: EngineError) -> None:
        """What a failed call means: the error again where the server refuses; where it is gone, an end to what is left of it, so
        that the trainer finds its memory free."""
        if not await self._is_gone(error):
            raise error
        if self._lost is None:
            log.warning("engine %s is lost, to be started again: %s", self.name, error)
            self._lost = error
            await self.engine.close()  # its port may be another server's soon
            await self._server.stop()

    async def snapshot_kv(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        """A dead server keeps nothing: its trajectories are computed again. Whoever asks it for more mends it."""
        try:
            return await self.engine.snapshot_kv(trajectory_ids)
        except EngineGoneError as e:
            log.warning("engine %s keeps no KV: %s", self.name, e)
            return []

    async def restore_kv(self, snapshots: Sequence[KVSnapshot]) -> list[bool]:
        try:
            return await self.engine.restore_kv(snapshots)
        except EngineGoneError as e:
            log.warning("engine %s has lost its KV: %s", self.name, e)
            return [False] * len(snapshots)

    async def kv_usage(self) -> KVUsage:
        return _sum(self._past_usage, await self.engine.kv_usage())

    async def health(self) -> None:
        """A server found dead is mended here as well."""
        engine = self.engine
        try:
            await engine.health()
        except EngineGoneError as e:
            await self._mend(engine, e)

    async def revive(self) -> None:
        """A lost server is started again, without weights: a publish follows."""
        if self._lost is not None:
            await self._mend(self.engine, self._lost, reload=False)

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()
        await self._server.stop()

    # -----------------------------------------------------------------------------------------------------------------

    async def _or_lose(self, call: Callable[[Sequence[str]], Awaitable[None]], tags: Sequence[str]) -> None:
        if self._lost is None:
            try:
                await call(tags)
            except EngineError as e:
                await self.lose(e)

    async def _is_gone(self, error: EngineError) -> bool:
        """Or it has refused, and lives: a dying server may answer anything."""
        return isinstance(error, EngineGoneError) or not await self._server.outlives_its_error()

    async def _mend(self, broken: SGLangEngine, reason: EngineError, *, reload: bool = True) -> None:
        """A server at work under the current version, unless another caller has seen to it already. reload False: without
        weights, which a publish brings next.

        Raises EngineLostError where only a publish can bring them."""
        async with self._mending:
            while self._engine is broken:
                if reload and self._export is None and self.weight_version > 0:
                    end = await self._end(reason)
                    if self._lost is None:
                        await self.lose(reason)
                    raise EngineLostError(f"engine {self.name}: gone, and its weights are with all ranks: {end}")
                try:
                    await self._start_again(broken, self._lost or reason, reload=reload)
                except EngineGoneError as e:  # it counts as a death
                    self._lost = e

    async def _start_again(self, broken: SGLangEngine, reason: EngineError, *, reload: bool) -> None:
        """Raises EngineGoneError where another try may help."""
        end = await self._end(reason)
        self.num_restarts += 1
        log.warning("engine %s is started again (%d of %d): %s", self.name, self.num_restarts, self._max_restarts, end)
        await self._server.stop()
        await broken.close()
        fresh: SGLangEngine | None = None
        try:
            fresh = await self._connect(await self._server.start())
            if reload and self.weight_version >= 0:
                await self._reload(fresh)
        except EngineError as e:
            if fresh is not None:
                await fresh.close()
            if await self._is_gone(e):
                raise EngineGoneError(str(e)) from e
            raise
        self._past_usage = await self.kv_usage()
        self._engine, self._lost = fresh, None

    async def _end(self, reason: EngineError) -> str:
        """What is known of it. Raises EngineError where it was the last one."""
        end = f"{reason}\nthe server {await self._server.epitaph()}"
        if self.num_restarts >= self._max_restarts:
            raise EngineError(
                f"engine {self.name}: gone, after {self.num_restarts} restarts (rollout.sglang.max_restarts): {end}"
            )
        return end

    async def _reload(self, fresh: SGLangEngine) -> None:
        if self._export is None:
            await fresh.adopt(self.weight_version)  # version 0 is the model folder, which the server has read
            return
        shared = ("kv_cache",) if fresh.capabilities.memory_release else ()
        await fresh.release_memory(shared)  # the trainer's weights come to the GPU
        with self._export() as buckets:
            await fresh.load_weights(buckets, self.weight_version)
        await fresh.resume_memory(shared)

    def _ending_in_absence(self, progress: _Progress) -> Ending | None:
        """A request that was aborted, or had its last token but not its ending, when the server died."""
        if progress.has_stopped:
            return Ending.STOP
        return Ending.ABORT if progress.request.trajectory_id in self._aborted else None


class _Progress:
    """One request and what it has brought so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[np.ndarray] = []

    def remainder(self) -> Request:
        if not self.tokens:
            return self.request
        context = np.concatenate([self.request.token_ids, *self.tokens])
        num_made = len(context) - len(self.request.token_ids)
        return replace(self.request, token_ids=context, max_new_tokens=self.request.max_new_tokens - num_made)

    @property
    def has_stopped(self) -> bool:
        last = [tokens[-1] for tokens in self.tokens if len(tokens)]
        return bool(last) and int(last[-1]) in self.request.sampling.stop_token_ids


def _sum(a: KVUsage, b: KVUsage) -> KVUsage:
    return KVUsage(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(KVUsage)))


def _last_chunk(request: Request, ending: Ending) -> Chunk:
    none = np.zeros(0, np.int32)
    return Chunk(request.trajectory_id, none, np.zeros(0, np.float32), request.weight_version, none, 0, ending)
