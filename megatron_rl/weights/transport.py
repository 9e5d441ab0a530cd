"""Full tensors to engines in other processes: gathered a little at a time, packed into flat buckets, delivered meanwhile.

    gather and pack (collective, this thread)   A      | B      | A             | B      |
    deliver (worker threads)                           | A             | ...
                                                                | B             | ...

Two flat buffers take turns. One is written again only after its delivery was answered, and no weight changes during a publish. A
buffer has seven eighths of a bucket: with what is gathered at a time, at most a quarter (`weights.bucket_bytes`), memory beside
the weights stays within two buckets, however large the model. A tensor that would fill most of a buffer, such as an embedding,
is sent as it lies: no copy. A call costs a receiver milliseconds whatever its size, so buckets are large, and where the
receiver puts calls in order itself two are under way: one is loaded while the other is on its way through HTTP.
What a delivery is: `rollout/engines/sglang_transport.py`. With several ranks, each of which lends its memory: `handles.py`. Where
tensors come from: `hf.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

ALIGNMENT = 16  # bytes; a receiver views each piece as its own dtype

Tensors = Sequence[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies in a flat bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # bytes
    stop: int  # bytes


@dataclass(frozen=True)
class FlatBucket:
    data: torch.Tensor  # uint8 [bytes]
    pieces: tuple[Piece, ...]
    written: torch.cuda.Event | None = None  # of the stream that writes it

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Views of `data`."""
        return [(p.name, self.data[p.start : p.stop].view(p.dtype).view(p.shape)) for p in self.pieces]

    def wait_until_written(self) -> None:
        """The receiver's process knows nothing of the stream. From any thread."""
        if self.written is not None:
            self.written.synchronize()


def layout(tensors: Tensors, alignment: int = ALIGNMENT, start: int = 0) -> tuple[Piece, ...]:
    """Where each tensor goes, in order, from byte `start` on."""
    pieces = []
    for name, tensor in tensors:
        start = -(-start // alignment) * alignment
        stop = start + tensor.nbytes
        pieces.append(Piece(name, tuple(tensor.shape), tensor.dtype, start, stop))
        start = stop
    return tuple(pieces)


def as_it_lies(tensors: Tensors) -> FlatBucket:
    """One contiguous tensor, not copied."""
    ((_, tensor),) = tensors
    return FlatBucket(tensor.view(-1).view(torch.uint8), layout(tensors), _event(tensor.device))


class Flattener:
    """Two flat buffers that take turns; each is allocated when it is first written."""

    def __init__(self, bucket_bytes: int, alignment: int = ALIGNMENT) -> None:
        self._capacity, self._alignment = bucket_bytes * 7 // 8, alignment
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._turn = 0
        self._pieces: tuple[Piece, ...] = ()

    def fits(self, tensors: Tensors) -> bool:
        """Whether they can be added to what has been added since the last `take`."""
        return not self._pieces or self._after(tensors)[-1].stop <= self._capacity

    def needs_no_copy(self, tensors: Tensors) -> bool:
        """Whether they are one tensor beside which a buffer would have little room."""
        return len(tensors) == 1 and tensors[0][1].is_contiguous() and 2 * tensors[0][1].nbytes > self._capacity

    def add(self, tensors: Tensors) -> None:
        """Copy them behind the others; they must fit. Too large for any buffer, they get one of their size."""
        pieces = self._after(tensors)
        size, device = max(self._capacity, pieces[-1].stop), tensors[0][1].device
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            assert not self._pieces, "what is in the buffer would be lost"
            self._buffers[self._turn] = None  # freed before its larger successor is allocated
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, device=device)
        for (_, source), (_, target) in zip(tensors, FlatBucket(buffer, pieces).tensors(), strict=True):
            target.copy_(source)
        self._pieces += pieces

    def take(self) -> FlatBucket | None:
        """What was added, if anything; valid until the second next bucket is begun. The other buffer is next."""
        buffer, pieces = self._buffers[self._turn], self._pieces
        if buffer is None or not pieces:
            return None
        self._turn, self._pieces = 1 - self._turn, ()
        return FlatBucket(buffer[: pieces[-1].stop], pieces, _event(buffer.device))

    def _after(self, tensors: Tensors) -> tuple[Piece, ...]:
        return layout(tensors, self._alignment, self._pieces[-1].stop if self._pieces else 0)


class Outlet(Protocol):
    """Where `send` puts buckets. `lend` and `answered` are called in the caller's thread and may be collective."""

    @property
    def alignment(self) -> int:
        """Of tensors in a bucket [bytes]."""
        ...

    @property
    def lanes(self) -> int:
        """Deliveries that may be under way at a time."""
        ...

    def lend(self, bucket: FlatBucket) -> Any:
        """What `deliver` has to know of the bucket."""
        ...

    def deliver(self, bucket: FlatBucket, lent: Any) -> None:
        """Returns when every receiver has let go of the bucket, or has it. From a worker thread."""
        ...

    def answered(self) -> None:
        """Every delivery has ended, or all but the newest one. Returns when that is so on all ranks."""
        ...


class _Deliveries:
    """Those under way, oldest first."""

    def __init__(self, outlet: Outlet, pool: ThreadPoolExecutor) -> None:
        self._outlet, self._pool = outlet, pool
        self._running: list[tuple[FlatBucket, asyncio.Future[None]]] = []
        self.num_bytes = 0
        self.failure: Exception | None = None  # the first

    async def start(self, bucket: FlatBucket | None) -> None:
        """Returns when the one before has ended: its buffer is written next."""
        if bucket is None:
            return
        lent = self._outlet.lend(bucket)
        if self.failure is None:
            self.num_bytes += bucket.data.numel()
            run = asyncio.get_running_loop().run_in_executor(self._pool, self._run, bucket, lent)
            self._running.append((bucket, run))
        await self.all_but(1)

    async def all_but(self, newest: int) -> None:
        """Wait until no more than so many are under way, on any rank."""
        ended = self._running[: max(0, len(self._running) - newest)]
        for _, delivery in ended:
            await asyncio.wait([delivery])
            error = delivery.exception()
            assert error is None or isinstance(error, Exception)
            self.failure = self.failure or error
        self._outlet.answered()
        del self._running[: len(ended)]  # only now: what lies in no buffer of ours is freed with its bucket

    def _run(self, bucket: FlatBucket, lent: Any) -> None:
        bucket.wait_until_written()
        self._outlet.deliver(bucket, lent)


async def send(buckets: Iterable[Tensors], outlet: Outlet, *, bucket_bytes: int) -> int:
    """Deliver all tensors; returns the bytes delivered.

    `buckets` is advanced in this thread (it may be a collective). After an error of a delivery the rest is still gathered, packed
    and lent, since the other ranks do so."""
    flattener = Flattener(bucket_bytes, outlet.alignment)
    with ThreadPoolExecutor(outlet.lanes, thread_name_prefix="weights") as pool:
        deliveries = _Deliveries(outlet, pool)
        for tensors in buckets:
            if flattener.needs_no_copy(tensors):
                await deliveries.start(as_it_lies(tensors))
                continue
            if not flattener.fits(tensors):
                await deliveries.start(flattener.take())
            flattener.add(tensors)
        await deliveries.start(flattener.take())
        await deliveries.all_but(0)
    if torch.cuda.is_available():
        del flattener
        torch.cuda.ipc_collect()  # the receivers have closed their handles
    if deliveries.failure is not None:
        raise deliveries.failure
    return deliveries.num_bytes


def _event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
