"""Frames of the wire form of the `Engine` protocol: a JSON header, then the raw bytes of its arrays.

    frame   = header bytes (uint32), body bytes (uint64), both big-endian; header; body
    header  = {"call": number, "message": tree, "arrays": [[dtype, shape], ...]}

Only the dataclasses listed in `_TYPES` can be written or read; nothing is executed while reading. Who sends what, and how
long one waits, is in `remote.py`; the part that speaks to the plugin inside an SGLang server, in `sglang_kv.py`.
"""

from __future__ import annotations

import json
import struct
from asyncio import StreamReader
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.base import Capabilities, Chunk, KVSnapshot, KVUsage, Request, Sampling
from megatron_rl.types import Ending

_PREFIX = struct.Struct("!IQ")
_MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Describe:
    """Asks for a Description."""


@dataclass(frozen=True)
class Description:
    name: str
    capabilities: Capabilities
    weight_version: int


@dataclass(frozen=True)
class Generate:
    """Answered by Chunk* until each request has its last one."""

    requests: list[Request]


@dataclass(frozen=True)
class Abort:
    trajectory_ids: list[int] | None


@dataclass(frozen=True)
class AwaitVersion:
    """Answered by Done once the engine holds these weights. They come to it in its own process, never over the wire."""

    version: int
    within_s: float


@dataclass(frozen=True)
class ReleaseMemory:
    tags: list[str]


@dataclass(frozen=True)
class ResumeMemory:
    tags: list[str]


@dataclass(frozen=True)
class SnapshotKV:
    """Answered by Snapshots."""

    trajectory_ids: list[int]


@dataclass(frozen=True)
class Snapshots:
    snapshots: list[KVSnapshot]


@dataclass(frozen=True)
class RestoreKV:
    """Answered by Restored."""

    snapshots: list[KVSnapshot]


@dataclass(frozen=True)
class Restored:
    in_place: list[bool]


@dataclass(frozen=True)
class AskKVUsage:
    """Answered by KVUsage."""


@dataclass(frozen=True)
class Health:
    pass


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class Failed:
    """The call is over; `text` is the message of the EngineError."""

    text: str


@dataclass(frozen=True)
class Alive:
    """Sent between chunks, for call 0: the engine answers, whether or not there are tokens."""


@dataclass(frozen=True)
class AskPlugin:
    """Answered by PluginState, at any time. The commands below wait until the server is idle."""


@dataclass(frozen=True)
class PluginState:
    """The plugin of one scheduler process. With a `problem` it keeps nothing, and the sizes are 0."""

    protocol: int
    rank: int  # of the server's tensor-parallel group
    num_ranks: int
    page_size: int  # tokens
    num_slots: int  # pages that its host memory holds
    num_slots_used: int
    num_kept: int  # trajectories
    problem: str


@dataclass(frozen=True)
class CachedTokens:
    """Tokens whose KV a server's prefix cache holds."""

    trajectory_id: int
    cache_key: str  # the server's `extra_key`
    token_ids: np.ndarray  # int32 [tokens]
    num_stored: int  # of the first ones, the plugin's host memory holds what the cache holds


@dataclass(frozen=True)
class SaveKV:
    """Answered by Counts: tokens of each of `cached` that are in host memory now. What is in neither list is forgotten."""

    cached: list[CachedTokens]
    keep: list[int]  # trajectories to be left as they are


@dataclass(frozen=True)
class LoadKV:
    """Answered by Counts: tokens of each trajectory that the prefix cache holds now, all those stored or none."""

    trajectory_ids: list[int]
    cache_keys: list[str]


@dataclass(frozen=True)
class Counts:
    num_tokens: list[int]
    num_bytes: int  # copied


_TYPES = {
    kind.__name__: kind
    for kind in (
        (Request, Sampling, Chunk, KVSnapshot, Capabilities, Describe, Description, Generate, Abort, AwaitVersion, ReleaseMemory)
        + (ResumeMemory, SnapshotKV, Snapshots, RestoreKV, Restored, KVUsage, AskKVUsage, Health, Done, Failed, Alive)
        + (AskPlugin, PluginState, CachedTokens, SaveKV, LoadKV, Counts)
    )
}


def encode(call: int, message: Any) -> bytes:
    """One frame. message: an instance of one of the dataclasses above."""
    arrays: list[np.ndarray] = []
    kinds: list[list[Any]] = []
    tree = _to_tree(message, arrays, kinds)
    header = json.dumps({"call": call, "message": tree, "arrays": kinds}).encode()
    body = b"".join(array.tobytes() for array in arrays)
    return _PREFIX.pack(len(header), len(body)) + header + body


async def receive(reader: StreamReader) -> tuple[int, Any]:
    """(call, message) of the next frame. Raises IncompleteReadError at the end of the stream, EngineError for other bytes."""
    num_header, num_body = _sizes(await reader.readexactly(_PREFIX.size))
    header = await reader.readexactly(num_header)
    return _decode(header, await reader.readexactly(num_body))


def parse(data: bytes | bytearray) -> Any:
    """The message of one frame; None where these are only its first bytes. Raises EngineError for other bytes."""
    if len(data) < _PREFIX.size:
        return None
    num_header, num_body = _sizes(bytes(data[: _PREFIX.size]))
    body = _PREFIX.size + num_header
    if len(data) < body + num_body:
        return None
    return _decode(bytes(data[_PREFIX.size : body]), bytes(data[body : body + num_body]))[1]


def _sizes(prefix: bytes) -> tuple[int, int]:
    num_header, num_body = _PREFIX.unpack(prefix)
    if num_header > _MAX_HEADER_BYTES:
        raise EngineError(f"engine connection: a header of {num_header} bytes; the other side speaks another protocol")
    return num_header, num_body


def _decode(header: bytes, body: bytes) -> tuple[int, Any]:
    try:
        content = json.loads(header)
        return content["call"], _from_tree(content["message"], _split(body, content["arrays"]))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineError(f"engine connection: a frame that cannot be read ({e}); both ranks must run the same version") from e


def _to_tree(value: Any, arrays: list[np.ndarray], kinds: list[list[Any]]) -> Any:
    if isinstance(value, np.ndarray):
        little = value.astype(value.dtype.newbyteorder("<"))
        kinds.append([little.dtype.str, list(value.shape)])
        arrays.append(little)
        return {"array": len(arrays) - 1}
    if is_dataclass(value):
        name = type(value).__name__
        assert name in _TYPES, f"{name} has no wire form"
        return {"type": name, "fields": {f.name: _to_tree(getattr(value, f.name), arrays, kinds) for f in fields(value)}}
    if isinstance(value, list | tuple):
        return [_to_tree(item, arrays, kinds) for item in value]
    return value


def _from_tree(tree: Any, arrays: list[Any]) -> Any:
    if isinstance(tree, list):
        return [_from_tree(item, arrays) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    kind = _TYPES[tree["type"]]
    values = {name: _from_tree(value, arrays) for name, value in tree["fields"].items()}
    if kind is Sampling:
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
    if kind is Chunk and values["ending"] is not None:
        values["ending"] = Ending(values["ending"])
    return kind(**values)


def _split(body: bytes, kinds: list[list[Any]]) -> list[Any]:
    arrays: list[Any] = []
    at = 0
    for dtype, shape in kinds:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays.append(np.frombuffer(body, np.uint8, num_bytes, at).copy().view(dtype).reshape(shape))
        at += num_bytes
    return arrays
