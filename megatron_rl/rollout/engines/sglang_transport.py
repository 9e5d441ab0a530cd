"""How flat buckets of weights reach SGLang servers: by CUDA IPC on GPUs that are shared, by broadcast to GPUs of their own.

    IPC         each server: POST /update_weights_from_tensor         a handle of the bucket for each rank, which copies from it
    Broadcast   each server: POST /update_weights_from_distributed    names and shapes; meanwhile one broadcast to all of them

A broadcast goes through a group of this process (rank 0) and every rank of the servers, made anew when another server is among
them, e.g. one started again. Nothing waits without end: what is late is named, and the group is given up. A server that fails is
no error here but noted (`Transport.failed`). Which way is taken says `rollout.sglang.colocated`; a third one:
`sglang_checkpoint_engine.py`. Packing: `weights/transport.py`; whose memory a handle is of: `weights/handles.py`. What SGLang
itself brings to either: `sglang_compat.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_rl.errors import EngineError, EngineGoneError
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.weights.handles import GatherAll, Handles, Serialize, alone
from megatron_rl.weights.transport import ALIGNMENT, FlatBucket, Outlet

T = TypeVar("T")

_LEAVE_S = 5.0  # for ending a group, which nothing depends on
_REASON_S = 2.0  # for a server's own account of why a broadcast broke


@dataclass(frozen=True, eq=False)
class Receiver:
    """One server. gpus: of its ranks, numbered on this machine where they are there."""

    client: SGLangClient
    gpus: tuple[int, ...]


class Transport(Outlet, Protocol):
    """On every rank of the trainer. Only rank 0 has receivers."""

    in_use: asyncio.Lock  # held from `open` to the last delivery: servers that die together are loaded one after the other
    failed: dict[Receiver, EngineError]  # since `open`; they take no further part
    is_broken: bool  # nobody gets anything more, though it is not everybody that failed

    @property
    def reads_every_rank(self) -> bool:
        """Or rank 0's memory only, so that the others have nothing to do with it."""
        ...

    async def open(self, receivers: Sequence[Receiver]) -> None:
        """Before the buckets of a publish; `receivers` get each of them. Collective where it reads every rank."""
        ...

    async def complete(self) -> None:
        """After the last delivery; afterwards every receiver that has not failed has everything. Collective as `open`."""
        ...

    async def close(self) -> None:
        """Servers that live on keep nothing of it."""
        ...


class IPC:
    """See `Transport`. The servers see the GPUs that hold the bucket, one on each."""

    alignment = ALIGNMENT
    lanes = 2  # a server takes calls one after the other, and frees a handle before it answers
    reads_every_rank = True

    def __init__(self, make_serializer: Callable[[], Serialize], gather_all: GatherAll = alone, *, rank: int = 0) -> None:
        """See `Handles`."""
        self.in_use = asyncio.Lock()
        self.failed: dict[Receiver, EngineError] = {}
        self.is_broken = False
        self._handles = Handles(make_serializer, gather_all, rank=rank)
        self._receivers: Sequence[Receiver] = ()

    async def open(self, receivers: Sequence[Receiver]) -> None:
        self.failed, self._receivers = {}, tuple(receivers)
        self.answered()

    def lend(self, bucket: FlatBucket) -> list[tuple[Receiver, list[str]]]:
        payloads = iter(self._handles.of(bucket))
        return [(receiver, list(islice(payloads, len(receiver.gpus)))) for receiver in self._receivers]

    def deliver(self, bucket: FlatBucket, lent: list[tuple[Receiver, list[str]]]) -> None:
        if lent:
            with ThreadPoolExecutor(len(lent)) as pool:
                list(pool.map(self._post, lent))

    def answered(self) -> None:
        """Those that failed are left out from now on: a handle that nobody opens keeps its memory."""
        self._receivers = [receiver for receiver in self._receivers if receiver not in self.failed]
        self._handles.agree([gpu for receiver in self._receivers for gpu in receiver.gpus])

    def _post(self, part: tuple[Receiver, list[str]]) -> None:
        receiver, payloads = part
        body = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket", "flush_cache": False}
        try:
            receiver.client.post_blocking("/update_weights_from_tensor", body)
        except EngineError as e:
            self.failed.setdefault(receiver, e)

    async def complete(self) -> None:
        """Nothing: every delivery was answered."""

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
    """See `Transport`. One collective at a time, in the order of `deliver`. It breaks with the first server that fails: the
    others lack what is left, and are published to again."""

    alignment = 1  # a server expects the tensors without gaps
    lanes = 1
    reads_every_rank = False

    def __init__(self, join: Join, timeout_s: float) -> None:
        """timeout_s: longest wait for a collective [s]."""
        self.in_use = asyncio.Lock()
        self.failed: dict[Receiver, EngineError] = {}
        self.is_broken = False
        self._join, self._timeout_s = join, timeout_s
        self._of: _Membership | None = None

    async def open(self, receivers: Sequence[Receiver]) -> None:
        self.failed = {}
        if self._of is not None and self._of.receivers == tuple(receivers) and not self.is_broken:
            return
        await self.close()
        self.is_broken = False
        if not receivers:
            return
        name = f"megatron_rl-{secrets.token_hex(4)}"
        world_size = 1 + sum(len(receiver.gpus) for receiver in receivers)
        limit = timedelta(seconds=self._timeout_s)
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)
        joining = in_thread(self._join, store, world_size, name, self._timeout_s)
        invitations = self._invitations(receivers, store.port, name, world_size)
        for receiver, error in zip(receivers, await asyncio.gather(*invitations, return_exceptions=True), strict=True):
            if isinstance(error, EngineError):
                self.failed[receiver] = error
            elif isinstance(error, BaseException):
                raise error
        if self.failed:
            self._break(receivers)
            return
        try:
            group = await asyncio.wait_for(asyncio.wrap_future(joining), self._timeout_s)
            self._of = _Membership(name, tuple(receivers), group, store)
        except (TimeoutError, RuntimeError) as e:
            problem = f"{self._between(receivers)}: cannot be formed ({e or 'no answer'}); {self._remedy}"
            self._break(receivers, EngineError(problem))

    def _invitations(
        self, receivers: Sequence[Receiver], port: int, name: str, world_size: int
    ) -> Iterator[Coroutine[Any, Any, Any]]:
        first_rank = 1
        for receiver in receivers:
            body = {
                "master_address": _own_address(receiver.client.url),
                "master_port": port,
                "rank_offset": first_rank,
                "world_size": world_size,
                "group_name": name,
                "backend": "nccl",
            }
            yield receiver.client.post("/init_weights_update_group", body, self._timeout_s)
            first_rank += len(receiver.gpus)

    def lend(self, bucket: FlatBucket) -> None:
        """Nothing: rank 0's memory is all it needs."""

    def answered(self) -> None:
        """Nothing: the other ranks lend nothing."""

    def deliver(self, bucket: FlatBucket, lent: None) -> None:
        if self._of is None or self.is_broken:
            return
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
        calls = {in_thread(r.client.post_blocking, path, body): r for r in self._of.receivers}
        sending = in_thread(self._of.group.broadcast, bucket.data)
        wait([sending, *calls], self._timeout_s, FIRST_EXCEPTION)
        if any(error_of(future) for future in (sending, *calls)):
            wait(calls, _REASON_S, ALL_COMPLETED)
        refused = {r: e for call, r in calls.items() if isinstance(e := error_of(call), EngineError)}
        # What breaks a group is the end of one; the others may only report what they saw of it.
        self.failed = {r: e for r, e in refused.items() if isinstance(e, EngineGoneError)} or refused
        problem = self._problem(sending, calls)
        if self.failed or problem is not None:
            in_thread(self._of.group.close, abort=True)
            self._break(self._of.receivers, problem)

    def _break(self, receivers: Sequence[Receiver], problem: EngineError | None = None) -> None:
        """problem: of all of them, where none has one of its own."""
        self.is_broken = True
        if not self.failed and problem is not None:
            self.failed = dict.fromkeys(receivers, problem)

    def _problem(self, sending: Future[None], calls: dict[Future[Any], Receiver]) -> EngineError | None:
        """As it is seen from here."""
        where = self._between(list(calls.values()))
        if broken := error_of(sending):
            return EngineError(f"{where}: broke ({broken}); {self._remedy}")
        if late := [receiver.client.name for call, receiver in calls.items() if not call.done()]:
            return EngineError(f"{where}: no answer of {', '.join(late)}; {self._remedy}")
        if not sending.done():
            return EngineError(f"{where}: did not end, though all have answered; {self._remedy}")
        return None

    async def complete(self) -> None:
        """Nothing: every delivery was answered."""

    async def close(self) -> None:
        if self._of is None:
            return
        member, self._of = self._of, None
        closing = None if self.is_broken else in_thread(member.group.close, abort=False)
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


def in_thread(function: Callable[..., T], *arguments: Any, **options: Any) -> Future[T]:
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


def error_of(future: Future[Any]) -> BaseException | None:
    return future.exception() if future.done() else None


def _own_address(url: str) -> str:
    """Of this host, as that server reaches it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((parts.hostname, parts.port or 80))  # sends nothing
        return s.getsockname()[0]
