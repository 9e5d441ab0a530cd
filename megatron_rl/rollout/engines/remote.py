"""An engine of another rank: `serve` puts an engine on a socket, `RemoteEngine` is that engine seen from afar.

    RemoteEngine.generate --- Generate ---> connection task ---> engine.generate
                          <--- Chunk* -----                        (aborted when the connection ends)

Every call has a number; its answers carry it, so that calls run side by side on one connection. The server says `Alive`
as long as its engine answers; a client that hears nothing for `silence_s` gives up with an EngineError that names the
engine. Weights never travel here: every rank loads its own engine in its own process. Frames: `wire.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from megatron_rl.errors import EngineError, MegatronRLError
from megatron_rl.rollout.engines import wire
from megatron_rl.rollout.engines.base import Capabilities, Chunk, Engine, KVSnapshot, KVUsage, Request

log = logging.getLogger(__name__)

_VERSION_POLL_S = 0.02
_RETRY_S = 0.1


class EngineServer:
    """A listening socket in front of one engine. Made by `serve`; does not own the engine."""

    def __init__(self, engine: Engine, heartbeat_s: float) -> None:
        self._engine = engine
        self._heartbeat_s = heartbeat_s
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._listener is not None, "made by `serve`"
        return self._listener.sockets[0].getsockname()[1]

    async def listen(self, host: str, port: int) -> None:
        try:
            self._listener = await asyncio.start_server(self._connected, host, port)
        except OSError as e:
            raise EngineError(f"engine {self._engine.name}: cannot listen on {host}:{port}: {e.strerror}; free the port") from e

    async def close(self) -> None:
        """Stop listening and end every connection; the requests they brought are aborted."""
        if self._listener is not None:
            self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a stream callback is a task"
        self._connections.add(task)
        calls: set[asyncio.Task[None]] = set()
        alive = asyncio.create_task(self._say_alive(writer))
        try:
            while True:
                call, message = await wire.receive(reader)
                answer = asyncio.create_task(self._answer(call, message, writer))
                calls.add(answer)
                answer.add_done_callback(partial(self._answered, calls, task))
        except (asyncio.IncompleteReadError, ConnectionError, EngineError, asyncio.CancelledError):
            pass  # gone, talking nonsense, or ended by `close`; what it asked for is aborted below. Nobody awaits this task
        finally:
            for left in (alive, *calls):
                left.cancel()
            await asyncio.gather(alive, *calls, return_exceptions=True)
            writer.close()
            self._connections.discard(task)

    def _answered(self, calls: set[asyncio.Task[None]], connection: asyncio.Task[None], answer: asyncio.Task[None]) -> None:
        calls.discard(answer)
        if not answer.cancelled() and answer.exception() is not None:
            log.error("engine %s: a call failed, its connection ends", self._engine.name, exc_info=answer.exception())
            connection.cancel()  # or the other side would wait for an answer that never comes

    async def _say_alive(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await self._engine.health()
            await self._send(writer, 0, wire.Alive())

    async def _answer(self, call: int, message: Any, writer: asyncio.StreamWriter) -> None:
        try:
            if isinstance(message, wire.Generate):
                async for chunk in self._engine.generate(message.requests):
                    await self._send(writer, call, chunk)
            else:
                await self._send(writer, call, await self._obey(message))
        except MegatronRLError as e:
            await self._send(writer, call, wire.Failed(str(e)))

    async def _obey(self, message: Any) -> Any:
        engine = self._engine
        match message:
            case wire.Describe():
                return wire.Description(engine.name, engine.capabilities, engine.weight_version)
            case wire.Abort(trajectory_ids):
                await engine.abort(trajectory_ids)
            case wire.AwaitVersion(version, within_s):
                await self._reach(version, within_s)
            case wire.ReleaseMemory(tags):
                await engine.release_memory(tags)
            case wire.ResumeMemory(tags):
                await engine.resume_memory(tags)
            case wire.SnapshotKV(trajectory_ids):
                return wire.Snapshots(await engine.snapshot_kv(trajectory_ids))
            case wire.RestoreKV(snapshots):
                return wire.Restored(await engine.restore_kv(snapshots))
            case wire.AskKVUsage():
                return await engine.kv_usage()
            case wire.Health():
                await engine.health()
            case _:
                raise EngineError(f"engine {engine.name}: a {type(message).__name__} is no call")
        return wire.Done()

    async def _reach(self, version: int, within_s: float) -> None:
        clock = asyncio.get_running_loop()
        deadline = clock.time() + within_s
        while self._engine.weight_version != version:
            if clock.time() > deadline:
                raise EngineError(
                    f"engine {self._engine.name}: still at weight version {self._engine.weight_version} after {within_s:g} s, "
                    f"awaited is {version}; see the log of its rank"
                )
            await asyncio.sleep(_VERSION_POLL_S)

    async def _send(self, writer: asyncio.StreamWriter, call: int, message: Any) -> None:
        writer.write(wire.encode(call, message))
        await writer.drain()


async def serve(engine: Engine, *, host: str, port: int, heartbeat_s: float = 5.0) -> EngineServer:
    """Listen for a RemoteEngine. port 0 takes a free one (`EngineServer.port`); heartbeat_s: time between two Alive [s].

    Raises EngineError when the address cannot be used."""
    server = EngineServer(engine, heartbeat_s)
    await server.listen(host, port)
    return server


class RemoteEngine:
    """See `base.Engine`. Made by `connect`, which also learns what the engine says of itself."""

    capabilities: Capabilities
    weight_version: int
    is_restarting = False

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_s: float) -> None:
        self.name = f"at {address}"
        self._reader = reader
        self._writer = writer
        self._silence_s = silence_s
        self._numbers = itertools.count(1)  # 0 belongs to Alive
        self._calls: dict[int, asyncio.Queue[Any]] = {}
        self._failure: EngineError | None = None
        self._last_heard = asyncio.get_running_loop().time()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, host: str, port: int, *, silence_s: float, connect_s: float = 60.0) -> RemoteEngine:
        """Try until the other rank listens, for `connect_s`. silence_s: longest wait without a sign of life [s].

        Raises EngineError when nobody answers."""
        clock = asyncio.get_running_loop()
        deadline = clock.time() + connect_s
        while True:
            try:
                reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), max(deadline - clock.time(), 0.01))
                break
            except (OSError, TimeoutError) as e:
                if clock.time() + _RETRY_S > deadline:
                    raise EngineError(
                        f"engine at {host}:{port}: no connection within {connect_s:g} s ({e}); see the log of its rank"
                    ) from e
                await asyncio.sleep(_RETRY_S)
        engine = cls(f"{host}:{port}", reader, writer, silence_s)
        description = await engine._ask(wire.Describe())
        engine.name = description.name
        engine.capabilities = description.capabilities
        engine.weight_version = description.weight_version
        return engine

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        open_ids = {r.trajectory_id for r in requests}
        call, answers = self._begin(wire.Generate(list(requests)))
        try:
            while open_ids:
                chunk = await self._hear(answers)
                if chunk.ending is not None:
                    open_ids.discard(chunk.trajectory_id)
                yield chunk
        except EngineError:
            open_ids.clear()
            raise
        finally:
            del self._calls[call]
            if open_ids:  # the caller went away
                self._begin(wire.Abort(sorted(open_ids)), answered=False)

    async def abort(self, trajectory_ids: Sequence[int] | None) -> None:
        await self._ask(wire.Abort(None if trajectory_ids is None else list(trajectory_ids)))

    async def load_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """Wait until the engine's own rank has loaded `version`. `buckets` is not read."""
        await self._ask(wire.AwaitVersion(version, self._silence_s))
        self.weight_version = version

    async def release_memory(self, tags: Sequence[str]) -> None:
        await self._ask(wire.ReleaseMemory(list(tags)))

    async def resume_memory(self, tags: Sequence[str]) -> None:
        await self._ask(wire.ResumeMemory(list(tags)))

    async def snapshot_kv(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        return (await self._ask(wire.SnapshotKV(list(trajectory_ids)))).snapshots

    async def restore_kv(self, snapshots: Sequence[KVSnapshot]) -> list[bool]:
        return (await self._ask(wire.RestoreKV(list(snapshots)))).in_place

    async def kv_usage(self) -> KVUsage:
        return await self._ask(wire.AskKVUsage())

    async def health(self) -> None:
        await self._ask(wire.Health())

    async def close(self) -> None:
        """Leave the connection; the engine itself belongs to its rank."""
        self._listening.cancel()
        self._end(EngineError(f"engine {self.name}: the connection is closed"))
        self._writer.close()

    def _begin(self, message: Any, *, answered: bool = True) -> tuple[int, asyncio.Queue[Any]]:
        if self._failure is not None:
            raise self._failure
        call = next(self._numbers)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        if answered:
            self._calls[call] = answers
        self._writer.write(wire.encode(call, message))
        return call, answers

    async def _ask(self, message: Any) -> Any:
        call, answers = self._begin(message)
        try:
            return await self._hear(answers)
        finally:
            del self._calls[call]

    async def _hear(self, answers: asyncio.Queue[Any]) -> Any:
        """The next answer to a call. Raises EngineError: the engine's own, or for silence."""
        clock = asyncio.get_running_loop()
        asked = clock.time()
        while True:
            left_s = max(self._last_heard, asked) + self._silence_s - clock.time()
            if left_s <= 0 and answers.empty():
                raise EngineError(
                    f"engine {self.name}: silent for {self._silence_s:g} s (rollout.request_timeout_s); see the log of its rank"
                )
            try:
                answer = await asyncio.wait_for(answers.get(), max(left_s, 0.001))
            except TimeoutError:
                continue
            if isinstance(answer, wire.Failed):
                raise EngineError(answer.text)
            if isinstance(answer, EngineError):
                raise answer
            return answer

    async def _listen(self) -> None:
        try:
            while True:
                call, message = await wire.receive(self._reader)
                self._last_heard = asyncio.get_running_loop().time()
                if call in self._calls:
                    self._calls[call].put_nowait(message)
        except (asyncio.IncompleteReadError, ConnectionError) as e:
            self._end(EngineError(f"engine {self.name}: the connection broke ({type(e).__name__}); see the log of its rank"))
        except EngineError as e:
            self._end(e)

    def _end(self, failure: EngineError) -> None:
        self._failure = failure
        for answers in self._calls.values():
            answers.put_nowait(failure)
