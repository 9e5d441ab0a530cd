"""The embedded engine: the `Engine` protocol over a `Runner` that lives in a worker thread of this process.

    event loop:  generate ---- commands (queue) ----> worker thread: one command or one step at a time
                 generate <--- chunks, or an error --- (call_soon_threadsafe)

All model and KV state belongs to the worker thread. Each command is answered through a future. An exception in the worker
ends it, and every request and command, running or later, fails with an EngineError that names it. A wait for a worker
that shows no progress for `silence_s` fails too. Which request runs when: `scheduler.py`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from megatron_rl.config import EmbeddedConfig
from megatron_rl.errors import EngineError, MegatronRLError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Capabilities, Chunk, KVSnapshot, KVUsage, Request
from megatron_rl.rollout.engines.embedded.runner import Runner
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.kv_store import KeepKV

T = TypeVar("T")
_POLL_S = 5.0  # longest time between two looks whether the worker still moves


class EmbeddedEngine:
    """See `base.Engine`. Without weights until the first `load_weights`."""

    capabilities = Capabilities(log_probs=True, kv_snapshot=True, memory_release=True, streaming=True)
    is_restarting = False

    def __init__(
        self,
        model: ModelConfig,
        *,
        config: EmbeddedConfig,
        dtype: torch.dtype,
        device: torch.device,
        name: str = "embedded",
        keep: KeepKV | None = None,
        identity: str = "",
        silence_s: float = 600.0,
    ) -> None:
        """keep: how KV is kept over a weight update, None where it is recomputed; identity: run and lineage, what kept KV is
        bound to; silence_s: longest wait without progress [s]."""
        self.name = name
        self.weight_version = -1  # none yet: whoever waits for version 0 must not take an empty engine for it
        self._silence_s = silence_s
        self._poll_s = min(_POLL_S, silence_s)
        with torch.inference_mode():
            self._runner = Runner(model, config, dtype, device, keep=keep, identity=identity)
        self._commands: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._streams: dict[int, _Stream] = {}  # worker's: trajectory id -> who listens
        self._answering: Future[Any] | None = None
        self._failure: EngineError | None = None
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)
        self._thread.start()

    @classmethod
    def from_folder(cls, folder: str | Path, *, version: int = 0, **options: Any) -> EmbeddedEngine:
        """An engine with the weights of a Hugging Face folder. options: those of the constructor, without `model`.

        Needs no event loop. Raises DataError for a folder that cannot be used."""
        engine = cls(ModelConfig.from_folder(folder), **options)
        engine._post(engine._runner.begin_load)
        for tensor in read_folder(Path(folder)):
            engine._post(partial(engine._runner.take_bucket, [tensor])).result(engine._silence_s)
        engine._post(lambda: engine._runner.finish_load(version)).result(engine._silence_s)
        engine.weight_version = version
        return engine

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        stream = _Stream(asyncio.get_running_loop())
        open_ids = {r.trajectory_id for r in requests}
        try:
            await self._call(lambda: self._submit(requests, stream))
        except asyncio.CancelledError:
            self._post(lambda: self._abort(sorted(open_ids)))
            raise
        try:
            while open_ids:
                chunk = await self._next(stream)
                if chunk.ending is not None:
                    open_ids.discard(chunk.trajectory_id)
                yield chunk
        finally:
            if open_ids:  # the caller went away
                self._post(lambda: self._abort(sorted(open_ids)))

    async def abort(self, trajectory_ids: Sequence[int] | None) -> None:
        await self._call(lambda: self._abort(trajectory_ids))

    async def load_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """The iterator is advanced here, in the caller's thread, because what feeds it may be a collective."""
        await self._call(self._runner.begin_load)
        for bucket in buckets:
            await self._call(partial(self._runner.take_bucket, bucket))
        await self._call(lambda: self._runner.finish_load(version))
        self.weight_version = version

    async def release_memory(self, tags: Sequence[str]) -> None:
        """`kv_cache` and `weights`; weights come back with the next `load_weights`."""
        self._check_tags(tags)
        await self._call(lambda: self._runner.release(tags))

    async def resume_memory(self, tags: Sequence[str]) -> None:
        self._check_tags(tags)
        if "kv_cache" in tags:
            await self._call(self._runner.allocate)

    async def snapshot_kv(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        return await self._call(lambda: self._runner.snapshot(trajectory_ids))

    async def restore_kv(self, snapshots: Sequence[KVSnapshot]) -> list[bool]:
        return await self._call(lambda: self._runner.restore(snapshots))

    async def kv_usage(self) -> KVUsage:
        store = self._runner.store
        return await self._call(lambda: store.usage if store else KVUsage())

    async def spill_kv(self) -> None:
        """Write kept KV out of this process, for the next start of the run."""
        store = self._runner.store
        if store:
            await self._call(store.spill_all)

    async def forget_kv(self) -> None:
        """Kept KV goes, and its files."""
        store = self._runner.store
        if store:
            await self._call(store.clear)

    async def health(self) -> None:
        await self._call(lambda: None)

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, self._silence_s)
        if self._thread.is_alive():
            raise EngineError(f"engine {self.name}: still busy {self._silence_s:g} s after close")

    # Event loop's side ------------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._commands.put((future, command))
        if self._failure is not None:  # the worker may be past its last look at the queue
            self._fail_commands()
        return future

    async def _call(self, command: Callable[[], T]) -> T:
        answer = asyncio.wrap_future(self._post(command))
        while not answer.done():
            await asyncio.wait([answer], timeout=self._poll_s)
            if not answer.done():
                self._check_progress()
        return answer.result()

    async def _next(self, stream: _Stream) -> Chunk:
        while True:
            try:
                event = await asyncio.wait_for(stream.events.get(), self._poll_s)
            except TimeoutError:
                self._check_progress()
                continue
            if isinstance(event, EngineError):
                raise event
            return event

    def _check_progress(self) -> None:
        silence_s = time.monotonic() - self._last_progress
        if silence_s > self._silence_s:
            raise EngineError(
                f"engine {self.name}: no progress for {silence_s:.1f} s, allowed are {self._silence_s:g} "
                "(rollout.request_timeout_s); raise it, or lower rollout.embedded.prefill_tokens so that steps get shorter"
            )

    def _check_tags(self, tags: Sequence[str]) -> None:
        unknown = sorted(set(tags) - {"kv_cache", "weights"})
        if unknown:
            raise EngineError(f"engine {self.name}: memory tag {unknown[0]!r} is unknown; there are kv_cache and weights")

    # Worker's side ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with ExitStack() as stack:
            stack.push(self._leave)
            with torch.inference_mode():
                while self._obey():
                    if self._runner.has_work:
                        self._hand_out(self._runner.step())
                    self._last_progress = time.monotonic()

    def _obey(self) -> bool:
        """Run the commands that wait; with nothing to generate, wait for one. False when told to leave."""
        block = not self._runner.has_work
        while block or not self._commands.empty():
            block = False
            command = self._commands.get()
            if command is None:
                return False
            self._last_progress = time.monotonic()
            future, function = command
            if not future.set_running_or_notify_cancel():
                continue
            self._answering = future
            try:
                future.set_result(function())
            except MegatronRLError as e:  # the caller's mistake, not the worker's end
                future.set_exception(e)
        return True

    def _leave(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None:
            self._failure = EngineError(f"engine {self.name}: closed")
        else:
            self._failure = EngineError(f"engine {self.name}: its worker failed: {type(error).__name__}: {error}")
            self._failure.__cause__ = error
        for stream in {id(s): s for s in self._streams.values()}.values():
            stream.send([self._failure])
        if self._answering is not None and not self._answering.done():
            self._answering.set_exception(self._failure)
        self._fail_commands()
        return True

    def _fail_commands(self) -> None:
        assert self._failure is not None
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None and command[0].set_running_or_notify_cancel():
                command[0].set_exception(self._failure)

    def _submit(self, requests: Sequence[Request], stream: _Stream) -> None:
        ids = [r.trajectory_id for r in requests]
        if len(set(ids)) < len(ids):
            raise EngineError("generate: a trajectory id occurs twice in one call; give each trajectory its own")
        for request in requests:
            self._runner.check(request)
        self._streams |= dict.fromkeys(ids, stream)
        self._hand_out(self._runner.add(requests))

    def _abort(self, trajectory_ids: Sequence[int] | None) -> None:
        self._hand_out(self._runner.abort(trajectory_ids))

    def _hand_out(self, chunks: Sequence[Chunk]) -> None:
        batches: dict[_Stream, list[Chunk | EngineError]] = {}
        for chunk in chunks:
            ended = chunk.ending is not None
            stream = self._streams.pop(chunk.trajectory_id) if ended else self._streams[chunk.trajectory_id]
            batches.setdefault(stream, []).append(chunk)
        for stream, batch in batches.items():
            stream.send(batch)


class _Stream:
    """Chunks of one `generate` call, on their way from the worker to its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.events: asyncio.Queue[Chunk | EngineError] = asyncio.Queue()  # holds at most what the requests may generate
        self._loop = loop

    def send(self, events: Sequence[Chunk | EngineError]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, events)

    def _put(self, events: Sequence[Chunk | EngineError]) -> None:
        for event in events:
            self.events.put_nowait(event)
