"""What an SGLang server's plugin keeps of unfinished trajectories, seen from the engine: keys, versions, promises, counts.

    cache key = version / oldest / kv_key      KV computed with weights `oldest` to `version`, of requests with this `kv_key`

A request without kept KV has oldest = version, so KV of older weights is found by the trajectories it was kept of and by
nobody else; of these, members of one group share its prompt. What a server says it found (`cached_tokens`) is held against
what was put back: less is computed again by the server, counted here, and recorded with the versions it really has.
All ranks of a server keep a trajectory, or none. The other end: `sglang_plugin/`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.errors import EngineError, EngineGoneError
from megatron_rl.rollout.engines import wire
from megatron_rl.rollout.engines.base import KVSnapshot, KVUsage, Request
from megatron_rl.rollout.engines.sglang_plugin.install import socket_path
from megatron_rl.rollout.engines.sglang_plugin.plugin import PROTOCOL

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeepOnServer:
    """How the KV of a server that we started is kept."""

    folder: Path  # of the plugin's sockets
    max_age: int  # weight versions a page may lie behind


@dataclass(frozen=True)
class Origin:
    """Where the KV of a request may come from."""

    cache_key: str
    versions: np.ndarray  # int32 [tokens], of the context's first tokens, where it may be older than the request's weights


@dataclass(frozen=True)
class _Held:
    """KV of one trajectory, on the server's device or in its plugin's store."""

    kv_key: str
    cache_key: str
    token_ids: np.ndarray  # int32 [tokens]
    versions: np.ndarray  # int32 [tokens]
    num_stored: int  # first tokens that the store holds as the device does
    num_promised: int = 0  # tokens put back that no request has found yet

    def begins(self, context: np.ndarray) -> bool:
        num_tokens = len(self.token_ids)
        return num_tokens < len(context) and bool((context[:num_tokens] == self.token_ids).all())


def fresh(request: Request) -> Origin:
    """Only KV of the request's own weights."""
    return Origin(_cache_key(request.weight_version, request.weight_version, request.kv_key), np.zeros(0, np.int32))


class ServerKV:
    """Of one started server. Raises EngineGoneError where a plugin cannot be reached, EngineError where it refuses."""

    def __init__(self, keep: KeepOnServer, name: str, num_ranks: int, silence_s: float) -> None:
        self._keep, self._name, self._num_ranks, self._silence_s = keep, name, num_ranks, silence_s
        self._page_size = 1
        self._fingerprint = uuid.uuid4().hex  # the store dies with the server
        self._on_device: dict[int, _Held] = {}
        self._in_store: dict[int, _Held] = {}
        self.usage = KVUsage()

    async def introduce(self) -> None:
        """Every rank's plugin is there and can work."""
        for state in await self._ask(wire.AskPlugin()):
            if state.problem:
                raise EngineError(f"engine {self._name}: {state.problem}")
            if state.protocol != PROTOCOL or state.num_ranks != self._num_ranks:
                raise EngineError(
                    f"engine {self._name}: the KV plugin of rank {state.rank} speaks protocol {state.protocol} for "
                    f"{state.num_ranks} ranks, expected {PROTOCOL} and {self._num_ranks}; start the server from this installation"
                )
            self._page_size = state.page_size

    def origin(self, request: Request) -> Origin:
        held = self._on_device.get(request.trajectory_id)
        if held is None or held.kv_key != request.kv_key or not held.begins(request.token_ids):
            return fresh(request)
        oldest = int(held.versions.min(initial=request.weight_version))
        return Origin(_cache_key(request.weight_version, oldest, request.kv_key), held.versions)

    def ended(self, request: Request, origin: Origin, num_cached: int, made: np.ndarray) -> None:
        """num_cached: tokens of the context that the server found in its cache; made: int32 [tokens], the last without KV."""
        held, num_stored = self._on_device.get(request.trajectory_id), 0
        if held is not None and held.cache_key == origin.cache_key:
            num_stored = min(held.num_stored, num_cached)
            if num_cached < held.num_promised:
                self._lost(request.trajectory_id, held.num_promised - num_cached, "evicted before it was used")
        token_ids = np.concatenate([request.token_ids, made])[:-1].astype(np.int32)
        versions = np.full(len(token_ids), request.weight_version, np.int32)
        inherited = origin.versions[:num_cached]
        versions[: len(inherited)] = inherited
        self._on_device[request.trajectory_id] = _Held(request.kv_key, origin.cache_key, token_ids, versions, num_stored)

    def dropped(self) -> None:
        """The server has forgotten all KV on its device."""
        self._on_device.clear()

    async def snapshot(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        started = time.perf_counter()
        on_device = {i: held for i in trajectory_ids if (held := self._on_device.get(i))}
        in_store = {i: held for i in trajectory_ids if i not in on_device and (held := self._in_store.get(i))}
        cached = [wire.CachedTokens(i, h.cache_key, h.token_ids, h.num_stored) for i, h in on_device.items()]
        counts, num_bytes = _agreed(await self._ask(wire.SaveKV(cached, sorted(in_store))))
        for (i, held), count in zip(on_device.items(), counts, strict=True):
            expected = len(held.token_ids) // self._page_size * self._page_size
            if count < expected:
                self._lost(i, expected - max(count, 0), "evicted by the server, or no room in rollout.kv_store.host_bytes")
            if count > 0:
                in_store[i] = replace(held, token_ids=held.token_ids[:count], versions=held.versions[:count])
                self._on_device[i] = replace(held, num_stored=count)
        self._in_store = in_store
        self._add(snapshot_bytes=num_bytes, snapshot_s=time.perf_counter() - started)
        return [self._describe(i, in_store[i]) for i in trajectory_ids if i in in_store]

    async def restore(self, snapshots: Sequence[KVSnapshot], version: int, flush: Callable[[], Awaitable[None]]) -> list[bool]:
        """version: of the weights loaded now. flush: makes the server forget all KV, where its ranks disagree."""
        started = time.perf_counter()
        in_place = [self._is_on_device(snapshot) for snapshot in snapshots]
        wanted = {s.trajectory_id: i for i, s in enumerate(snapshots) if not in_place[i] and self._fits(s, version)}
        held = [self._in_store[trajectory_id] for trajectory_id in wanted]
        keys = [_cache_key(version, int(h.versions.min()), h.kv_key) for h in held]
        answers = await self._ask(wire.LoadKV(list(wanted), keys)) if wanted else []
        counts, _ = _agreed(answers)
        if any(count < 0 for count in counts):
            log.warning("engine %s: its ranks do not agree on what was put back; all KV is computed again", self._name)
            await flush()
            return [False] * len(snapshots)
        for trajectory_id, h, key, count in zip(wanted, held, keys, counts, strict=True):
            if count == len(h.token_ids):
                self._on_device[trajectory_id] = replace(h, cache_key=key, num_stored=count, num_promised=count)
                in_place[wanted[trajectory_id]] = True
            else:
                self._lost(trajectory_id, len(h.token_ids), "no room on the device")
        self._add(restore_s=time.perf_counter() - started)
        return in_place

    # -----------------------------------------------------------------------------------------------------------------

    def _fits(self, snapshot: KVSnapshot, version: int) -> bool:
        held = self._in_store.get(snapshot.trajectory_id)
        same = held is not None and snapshot.fingerprint == self._fingerprint and _equal(held.token_ids, snapshot.token_ids)
        if not same:
            self._lost(snapshot.trajectory_id, len(snapshot.token_ids), "this server holds no such KV")
        return same and version - self._keep.max_age <= snapshot.kv_versions.min() and snapshot.kv_versions.max() <= version

    def _is_on_device(self, snapshot: KVSnapshot) -> bool:
        held, num_tokens = self._on_device.get(snapshot.trajectory_id), len(snapshot.token_ids)
        return held is not None and _equal(held.token_ids[:num_tokens], snapshot.token_ids)

    def _describe(self, trajectory_id: int, held: _Held) -> KVSnapshot:
        return KVSnapshot(trajectory_id, held.token_ids, held.versions, np.zeros(0, np.int64), self._fingerprint)

    def _lost(self, trajectory_id: int, num_tokens: int, why: str) -> None:
        log.warning("KV of %d tokens of trajectory %d is computed again: %s", num_tokens, trajectory_id, why)
        self._add(restore_failures=1)

    def _add(self, **new: float) -> None:
        self.usage = replace(self.usage, **{name: getattr(self.usage, name) + value for name, value in new.items()})

    async def _ask(self, message: Any) -> list[Any]:
        """One answer of each rank."""
        return await asyncio.gather(*(self._ask_rank(rank, message) for rank in range(self._num_ranks)))

    async def _ask_rank(self, rank: int, message: Any) -> Any:
        path = socket_path(self._keep.folder, rank)
        try:
            async with asyncio.timeout(self._silence_s):
                reader, writer = await asyncio.open_unix_connection(str(path))
                try:
                    writer.write(wire.encode(0, message))
                    await writer.drain()
                    _, answer = await wire.receive(reader)
                finally:
                    writer.close()
        except (OSError, asyncio.IncompleteReadError) as e:
            raise EngineGoneError(
                f"engine {self._name}: the KV plugin of rank {rank} does not answer ({type(e).__name__}: {e}); the server's log "
                "says whether it was loaded (entry point megatron_rl_kv; SGLANG_PLUGINS, if set, must name it)"
            ) from e
        if isinstance(answer, wire.Failed):
            raise EngineError(f"engine {self._name}: the KV plugin of rank {rank}: {answer.text}")
        return answer


def _agreed(answers: Sequence[wire.Counts]) -> tuple[list[int], int]:
    """What all ranks answered, -1 where they differ; and the bytes of all."""
    counts = [same[0] if len(set(same)) == 1 else -1 for same in zip(*(a.num_tokens for a in answers), strict=True)]
    return counts, sum(a.num_bytes for a in answers)


def _cache_key(version: int, oldest: int, kv_key: str) -> str:
    return f"{version}/{oldest}/{kv_key}"


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return len(a) == len(b) and bool((a == b).all())
