"""SGLang behind the `Engine` protocol: token ids in and out over HTTP, the requests of a `generate` call together.

    generate ---- its requests (at most `max_concurrent` at the server) ---- POST /generate, server-sent events
             <--- one queue of chunks, or the first error -----------------

It refuses to load weights while requests run. Stale KV cannot serve a request: the cache is flushed at every publish, and
`extra_key` holds the weight version. KV outlives a publish (`capabilities.kv_snapshot`) only in a server that we started with
our plugin: `sglang_kv.py`.
Sampling noise is the server's; see `sglang_call.seed_of`. A model's own end-of-text token ends a request whether or not
it is among the request's stop tokens. One request: `sglang_call.py`; requests on their way together: `sglang_posts.py`. How
weights travel: `sglang_transport.py`. The server's process: `sglang_server.py`; what happens when it dies:
`sglang_supervisor.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_rl.config import SGLangConfig
from megatron_rl.errors import DataError, EngineError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Capabilities, Chunk, KVSnapshot, KVUsage, Request
from megatron_rl.rollout.engines.sglang_call import Call
from megatron_rl.rollout.engines.sglang_check import WeightCheck
from megatron_rl.rollout.engines.sglang_compat import check_version
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.rollout.engines.sglang_kv import KeepOnServer, ServerKV, fresh
from megatron_rl.rollout.engines.sglang_posts import Posts
from megatron_rl.rollout.engines.sglang_transport import Receiver, Transport
from megatron_rl.weights.transport import send

_ABORT_AGAIN_S = 0.5  # an abort that overtakes its request is lost: it is repeated until the request ends
_IDLE_S = 30.0  # longest wait until a server that owes no answer calls itself idle
_TAGS = ("kv_cache", "weights")


class SGLangEngine:
    """See `base.Engine`. Made by `connect`. Holds no version of ours until `load_weights` or `adopt`."""

    is_restarting = False

    def __init__(self, client: SGLangClient, model: ModelConfig, config: SGLangConfig, transport: Transport) -> None:
        self.name = client.name
        self.capabilities = Capabilities(log_probs=True, kv_snapshot=False, memory_release=config.takes_turns, streaming=True)
        self.weight_version = -1  # none
        self._client, self._config = client, config
        self.transport = transport
        self.receiver = Receiver(client, tuple(range(config.tensor_parallel)))
        self._is_checked = not config.verify_weights
        self._check: WeightCheck | None = None
        self._context_tokens = model.max_positions
        self._id, self._numbers = secrets.token_hex(4), itertools.count()  # of its requests
        self._posts = Posts(client, config.max_concurrent)
        self._calls: dict[str, Call] = {}  # request id -> those not ended
        self._insisting: set[asyncio.Task[None]] = set()
        self._released: set[str] = set()
        self._kv: ServerKV | None = None

    @classmethod
    async def connect(
        cls,
        url: str,
        model: ModelConfig,
        config: SGLangConfig,
        *,
        name: str,
        silence_s: float,
        transport: Transport,
        keep: KeepOnServer | None = None,
    ) -> SGLangEngine:
        """An engine over a server that is up. transport: how weights get there, shared by engines that are loaded together. keep:
        its plugin.

        Raises EngineError for another SGLang version, another model, nobody there, or a plugin that cannot work."""
        client = SGLangClient(url, name=name, silence_s=silence_s)
        engine = cls(client, model, config, transport)
        try:
            await engine._introduce(model)
            if keep is not None:
                engine._kv = ServerKV(keep, name, len(engine.receiver.gpus), silence_s)
                await engine._kv.introduce()
                engine.capabilities = replace(engine.capabilities, kv_snapshot=True)
        except EngineError:
            await client.close()
            raise
        return engine

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[Chunk, None]:
        self._refuse(requests)
        origin = self._kv.origin if self._kv else fresh
        context, interval = self._context_tokens, self._config.stream_interval
        calls = [Call(r, self._id, next(self._numbers), context, interval, origin(r)) for r in requests]
        self._calls |= {call.rid: call for call in calls}
        queue: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()  # holds at most what the requests may generate
        running = asyncio.create_task(self._posts.run(calls, partial(self._heard, queue)))
        running.add_done_callback(partial(_report, queue))
        num_open = len(calls)
        try:
            while num_open:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                num_open -= event.ending is not None
                yield event
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            left = [call for call in calls if not call.ended.is_set()]
            for call in calls:
                self._calls.pop(call.rid, None)
                call.ended.set()
            with suppress(EngineError):  # the caller went away, or an error is already on its way
                await self._post_aborts(left)

    async def abort(self, trajectory_ids: Sequence[int] | None) -> None:
        wanted = None if trajectory_ids is None else set(trajectory_ids)
        calls = [c for c in self._calls.values() if wanted is None or c.request.trajectory_id in wanted]
        for call in calls:
            call.is_aborted = True
        await self._post_aborts(calls)
        task = asyncio.create_task(self._insist(calls))
        self._insisting.add(task)
        task.add_done_callback(self._insisting.discard)

    async def load_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """As a trainer of one rank does it; `load_weights` is for several."""
        failed = await load_weights([self], buckets, version, self.transport, bucket_bytes=self._config.bucket_bytes)
        for error in failed.values():
            raise error

    async def adopt(self, version: int) -> None:
        """Call what the server holds `version`, without loading anything."""
        await self._client.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self.weight_version = version

    async def release_memory(self, tags: Sequence[str]) -> None:
        """`kv_cache` and `weights`; weights come back empty and need `load_weights`. Only with no request running."""
        self._check_tags(tags)
        new = [tag for tag in tags if tag not in self._released]
        if new:
            await self._flush()  # a server that is not idle would not survive the release
            await self._client.post("/release_memory_occupation", {"tags": new})
            self._released |= set(new)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        self._check_tags(tags)
        gone = [tag for tag in tags if tag in self._released]  # resuming what was not released kills the server
        if gone:
            await self._client.post("/resume_memory_occupation", {"tags": gone})
            self._released -= set(gone)

    async def snapshot_kv(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        """Only with no request running. Without our plugin none: their KV is recomputed."""
        return await self._kv.snapshot(trajectory_ids) if self._kv else []

    async def restore_kv(self, snapshots: Sequence[KVSnapshot]) -> list[bool]:
        """Only with no request running."""
        if self._kv is None or "kv_cache" in self._released:
            return [False] * len(snapshots)
        return await self._kv.restore(snapshots, self.weight_version, self._flush)

    async def kv_usage(self) -> KVUsage:
        return self._kv.usage if self._kv else KVUsage()

    async def health(self) -> None:
        """Asks for what only a living scheduler can answer, and computes nothing: memory may be released."""
        await self._client.get("/server_info")

    async def close(self) -> None:
        for task in self._insisting:
            task.cancel()
        await asyncio.gather(*self._insisting, return_exceptions=True)
        await self._client.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _refuse(self, requests: Sequence[Request]) -> None:
        seen = {call.request.trajectory_id for call in self._calls.values()}
        for r in requests:
            where = f"engine {self.name}: trajectory {r.trajectory_id}"
            if r.trajectory_id in seen:
                raise EngineError(f"{where} occurs twice among the running requests")
            seen.add(r.trajectory_id)
            if not 1 <= len(r.token_ids) <= self._context_tokens:
                raise EngineError(
                    f"{where} has a context of {len(r.token_ids)} tokens; the model takes 1 to {self._context_tokens}"
                )
            if self._released:
                raise EngineError(f"{where}: the memory of {', '.join(sorted(self._released))} is released; resume it first")
            if r.weight_version != self.weight_version:
                raise EngineError(f"{where} asks for weight version {r.weight_version}, loaded is {self.weight_version}")

    def _heard(self, queue: asyncio.Queue[Chunk | BaseException], call: Call, chunk: Chunk) -> None:
        if chunk.ending is not None:
            self._calls.pop(call.rid, None)
            call.ended.set()
            if self._kv and call.num_cached is not None:
                made = np.concatenate([np.zeros(0, np.int32), *call.made])
                self._kv.ended(call.request, call.origin, call.num_cached, made)
        queue.put_nowait(chunk)

    async def _post_aborts(self, calls: Sequence[Call]) -> None:
        sent = [call for call in calls if call.is_sent and not call.ended.is_set()]
        if len(sent) > 1 and len(sent) == sum(call.is_sent for call in self._calls.values()):
            await self._client.post("/abort_request", {"rid": "", "abort_all": True})
        else:
            await asyncio.gather(*(self._client.post("/abort_request", {"rid": call.rid}) for call in sent))

    async def _insist(self, calls: Sequence[Call]) -> None:
        with suppress(EngineError):  # their own streams say what is wrong
            while any(not call.ended.is_set() for call in calls):
                await asyncio.sleep(_ABORT_AGAIN_S)
                await self._post_aborts(calls)

    # --- weights and memory ------------------------------------------------------------------------------------------

    async def begin_load(self) -> None:
        """No cache of older weights is left, and no version until `finish_load`."""
        if self._calls:
            raise EngineError(
                f"engine {self.name}: weights cannot change while {len(self._calls)} requests run; abort them first"
            )
        self.weight_version = -1
        if not self._is_checked:
            self._is_checked = True
            self._check = WeightCheck(self._client)
            await self._check.begin()
        await self._flush()

    async def finish_load(self, version: int) -> None:
        if self._check is not None:
            await self._check.finish(is_model_folder=version == 0)
            self._check = None
        await self.adopt(version)

    async def _flush(self) -> None:
        await self._client.post(f"/flush_cache?timeout={_IDLE_S:g}", None, self._client.silence_s + _IDLE_S)
        if self._kv:
            self._kv.dropped()

    def _check_tags(self, tags: Sequence[str]) -> None:
        unknown = sorted(set(tags) - set(_TAGS))
        if unknown:
            raise EngineError(f"engine {self.name}: memory tag {unknown[0]!r} is unknown; there are {' and '.join(_TAGS)}")

    async def _introduce(self, model: ModelConfig) -> None:
        where = f"engine {self.name} at {self._client.url}"
        server, served = await self._client.get("/server_info"), await self._client.get("/model_info")
        check_version(str(server.get("version")), where)
        found = served.get("model_path", "")
        with suppress(DataError):  # a folder of another machine: the first publish checks names and shapes
            other = ModelConfig.from_folder(found)
            if other != model:
                raise EngineError(
                    f"{where}: serves {found}, a model of another shape than model.folder; start it with that folder"
                )
        if served.get("model_type") != model.family:
            raise EngineError(
                f"{where}: serves {found} of type {served.get('model_type')}; model.folder is of type {model.family}"
            )
        self._context_tokens = min(model.max_positions, server.get("context_length") or model.max_positions)
        first, step = server.get("base_gpu_id") or 0, server.get("gpu_id_step") or 1
        num_ranks = server.get("tp_size") or self._config.tensor_parallel
        self.receiver = Receiver(self._client, tuple(first + step * rank for rank in range(num_ranks)))


async def load_weights(
    engines: Sequence[SGLangEngine],
    buckets: Iterable[Sequence[tuple[str, torch.Tensor]]],
    version: int,
    transport: Transport,
    *,
    bucket_bytes: int,
) -> dict[str, EngineError]:
    """One pass over the buckets for all engines, which share the transport: each goes to all of them, side by side, while the
    next is gathered. Collective with the trainer's other ranks, which hold the same buckets and have no engines.

    Returns the errors of those that failed, by name. They take no further part, and the buckets are taken to their end whatever
    happens. The others are at `version`, or without any where the transport broke: they are to be published to again."""
    failed: dict[str, EngineError] = {}

    async def do(engine: SGLangEngine, step: Coroutine[Any, Any, None]) -> None:
        try:
            await step
        except EngineError as e:
            failed[engine.name] = e

    await asyncio.gather(*(do(engine, engine.begin_load()) for engine in engines))
    async with transport.in_use:
        begun = [engine for engine in engines if engine.name not in failed]
        await transport.open([engine.receiver for engine in begun])
        await send(buckets, transport, bucket_bytes=bucket_bytes)
        await transport.complete()
        failed |= {engine.name: transport.failed[engine.receiver] for engine in begun if engine.receiver in transport.failed}
        is_broken = transport.is_broken
    if not is_broken:
        await asyncio.gather(*(do(e, e.finish_load(version)) for e in engines if e.name not in failed))
    return failed


def _report(queue: asyncio.Queue[Chunk | BaseException], task: asyncio.Task[None]) -> None:
    """A task that failed tells whoever waits for its requests' chunks."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        queue.put_nowait(error)
