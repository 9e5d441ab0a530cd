"""How flat buckets of weights reach SGLang servers: by CUDA IPC on GPUs that are shared, by broadcast to GPUs of their own.

    IPC         each server: POST /update_weights_from_tensor         a handle of the bucket; the server copies from it
    Broadcast   each server: POST /update_weights_from_distributed    names and shapes; meanwhile one broadcast to all of them

A broadcast goes through a group of this process (rank 0) and every rank of the servers, made anew when another server is among
them, e.g. one started again. Nothing waits without end: what is late is named, and the group is given up. Which way is taken says
`rollout.sglang.colocated`. Packing: `weights/transport.py`. What SGLang itself brings to either: `sglang_compat.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.weights.transport import ALIGNMENT, FlatBucket

T = TypeVar("T")
Serialize = Callable[[FlatBucket], str]

_LEAVE_S = 5.0  # for ending a group, which nothing depends on
_REASON_S = 2.0  # for a server's own account of why a broadcast broke


@dataclass(frozen=True, eq=False)
class Receiver:
    """One server."""

    client: SGLangClient
    num_ranks: int


class Transport(Protocol):
    in_use: asyncio.Lock  # held from `open` to the last delivery: servers that die together are loaded one after the other

    @property
    def alignment(self) -> int:
        """Of tensors in a bucket [bytes]."""
        ...

    @property
    def lanes(self) -> int:
        """Deliveries that may be under way at a time."""
        ...

    async def open(self, receivers: Sequence[Receiver]) -> None:
        """Before the buckets of a publish; `receivers` get each of them."""
        ...

    def deliver(self, bucket: FlatBucket) -> None:
        """Returns when every receiver has let go of the bucket, or has it. From a worker thread."""
        ...

    async def close(self) -> None:
        """Servers that live on keep nothing of it."""
        ...


class IPC:
    """See `Transport`. The servers see the GPU that holds the bucket."""

    alignment = ALIGNMENT
    lanes = 2  # a server takes calls one after the other, and frees a handle before it answers

    def __init__(self, serializer: Callable[[], Serialize]) -> None:
        """serializer: makes what turns a bucket into a server's payload, when it is first needed."""
        self.in_use = asyncio.Lock()
        self._make_serializer = serializer
        self._serialize: Serialize | None = None
        self._receivers: Sequence[Receiver] = ()

    async def open(self, receivers: Sequence[Receiver]) -> None:
        self._receivers = tuple(receivers)
        if self._serialize is None:
            self._serialize = self._make_serializer()

    def deliver(self, bucket: FlatBucket) -> None:
        assert self._serialize is not None, "open comes first"
        for receiver in self._receivers:
            body = {
                # One serialization a rank: a handle is counted per process that opens it.
                "serialized_named_tensors": [self._serialize(bucket) for _ in range(receiver.num_ranks)],
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            receiver.client.post_blocking("/update_weights_from_tensor", body)

    async def close(self) -> None:
        self._receivers = ()


class Group(Protocol):
    """Rank 0's end of a group of processes. Its calls may never return: they run in threads that nobody waits for."""

    def broadcast(self, data: torch.Tensor) -> None:
        """uint8 [bytes] to all other ranks; returns when it has left."""
        ...

    def close(self, *, abort: bool) -> None:
        """abort: whatever is under way is given up."""
        ...


Join = Callable[[dist.Store, int, str, float], Group]  # store, number of ranks, name, longest wait [s] -> rank 0's end


@dataclass(frozen=True)
class _Membership:
    name: str
    receivers: tuple[Receiver, ...]
    group: Group
    store: dist.Store  # the others' meeting point, for as long as the group lives


class Broadcast:
    """See `Transport`. One collective at a time, in the order of `deliver`."""

    alignment = 1  # a server expects the tensors without gaps
    lanes = 1

    def __init__(self, join: Join, timeout_s: float) -> None:
        """timeout_s: longest wait for a collective [s]."""
        self.in_use = asyncio.Lock()
        self._join, self._timeout_s = join, timeout_s
        self._of: _Membership | None = None
        self._is_broken = False

    async def open(self, receivers: Sequence[Receiver]) -> None:
        if self._of is not None and self._of.receivers == tuple(receivers) and not self._is_broken:
            return
        await self.close()
        name = f"megatron_rl-{secrets.token_hex(4)}"
        world_size = 1 + sum(receiver.num_ranks for receiver in receivers)
        limit = timedelta(seconds=self._timeout_s)
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)
        calls, first_rank = [], 1
        for receiver in receivers:
            body = {
                "master_address": _own_address(receiver.client.url),
                "master_port": store.port,
                "rank_offset": first_rank,
                "world_size": world_size,
                "group_name": name,
                "backend": "nccl",
            }
            calls.append(receiver.client.post("/init_weights_update_group", body, self._timeout_s))
            first_rank += receiver.num_ranks
        joining = _start(self._join, store, world_size, name, self._timeout_s)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        try:
            group = await asyncio.wait_for(asyncio.wrap_future(joining), self._timeout_s)
        except (TimeoutError, RuntimeError) as e:
            raise EngineError(f"{self._between(receivers)}: cannot be formed ({e or 'no answer'}); {self._remedy}") from e
        self._of, self._is_broken = _Membership(name, tuple(receivers), group, store), False

    def deliver(self, bucket: FlatBucket) -> None:
        assert self._of is not None, "open comes first"
        if self._is_broken:  # by the bucket before
            raise EngineError(f"{self._between(self._of.receivers)}: given up")
        assert len({piece.dtype for piece in bucket.pieces}) == 1, "without gaps, tensors of other types would not be aligned"
        body = {
            "names": [piece.name for piece in bucket.pieces],
            "dtypes": [str(piece.dtype).removeprefix("torch.") for piece in bucket.pieces],
            "shapes": [list(piece.shape) for piece in bucket.pieces],
            "group_name": self._of.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        path = "/update_weights_from_distributed"
        calls = {_start(r.client.post_blocking, path, body): r.client.name for r in self._of.receivers}
        sending = _start(self._of.group.broadcast, bucket.data)
        wait([sending, *calls], self._timeout_s, FIRST_EXCEPTION)
        if _error(sending) is not None:
            wait(calls, _REASON_S, ALL_COMPLETED)
        problem = self._problem(sending, calls)
        if problem is not None:
            self._is_broken = True
            _start(self._of.group.close, abort=True)
            raise problem

    def _problem(self, sending: Future[None], calls: dict[Future[Any], str]) -> EngineError | None:
        """What a server says comes before what is seen from here."""
        assert self._of is not None, "something was sent"
        for call in calls:
            if isinstance(error := _error(call), EngineError):
                return error
        where = self._between(self._of.receivers)
        if broken := _error(sending):
            return EngineError(f"{where}: broke ({broken}); {self._remedy}")
        if late := [name for call, name in calls.items() if not call.done()]:
            return EngineError(f"{where}: no answer of {', '.join(late)}; {self._remedy}")
        if not sending.done():
            return EngineError(f"{where}: did not end, though all have answered; {self._remedy}")
        return None

    async def close(self) -> None:
        if self._of is None:
            return
        member, self._of = self._of, None
        closing = None if self._is_broken else _start(member.group.close, abort=False)
        body = {"group_name": member.name}
        left = [r.client.post("/destroy_weights_update_group", body, _LEAVE_S) for r in member.receivers]
        await asyncio.gather(*left, return_exceptions=True)  # of a server that is gone, the group is gone too
        if closing is not None:
            with suppress(TimeoutError, RuntimeError):
                await asyncio.wait_for(asyncio.wrap_future(closing), _LEAVE_S)

    def _between(self, receivers: Sequence[Receiver]) -> str:
        return f"weights from rank 0 to {', '.join(r.client.name for r in receivers)}, by broadcast"

    @property
    def _remedy(self) -> str:
        return (
            f"waited up to training.collective_timeout_s={self._timeout_s:g}; see the servers' logs, whether their hosts reach "
            "this one, and whether NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE are the same there"
        )


def _start(function: Callable[..., T], *arguments: Any, **options: Any) -> Future[T]:
    """In a thread that no exit waits for: a collective whose other side never comes cannot be interrupted."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except (EngineError, RuntimeError, OSError) as e:  # torch.distributed's are RuntimeErrors
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def _error(future: Future[Any]) -> BaseException | None:
    return future.exception() if future.done() else None


def _own_address(url: str) -> str:
    """Of this host, as that server reaches it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((parts.hostname, parts.port or 80))  # sends nothing
        return s.getsockname()[0]
