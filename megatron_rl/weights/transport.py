"""Full tensors, bucket by bucket, to engines in other processes: flattened, delivered while the next one is gathered.

    buckets (collective, this thread)   gather 0 | gather 1      | gather 2      |
    deliver (worker threads)                     | deliver 0     | deliver 1     | deliver 2

Two flat buffers take turns, so that memory beside the weights stays at two buckets (and one more while a tensor-parallel
gather fills it), however large the model. A tensor that fills a bucket alone, such as an embedding, is sent as it lies: no copy.
A buffer is written again only after its delivery was answered, and no weight changes during a publish. What a delivery
is, e.g. a CUDA IPC handle in an HTTP call: `rollout/engines/sglang.py`. With several ranks, each of which lends its memory:
`handles.py`. Where buckets come from: `hf.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

_ALIGNMENT = 16  # bytes; a receiver views each piece as its own dtype


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

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Views of `data`."""
        return [(p.name, self.data[p.start : p.stop].view(p.dtype).view(p.shape)) for p in self.pieces]


def layout(tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[Piece, ...]:
    """Where each tensor goes, in order, aligned."""
    pieces, start = [], 0
    for name, tensor in tensors:
        stop = start + tensor.numel() * tensor.element_size()
        pieces.append(Piece(name, tuple(tensor.shape), tensor.dtype, start, stop))
        start = -(-stop // _ALIGNMENT) * _ALIGNMENT
    return tuple(pieces)


class Flattener:
    """Two flat buffers that take turns; each grows to the largest bucket it has held."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._turn = 0

    def flatten(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> FlatBucket:
        """Complete when this returns. Valid until the second next call."""
        pieces = layout(tensors)
        if len(tensors) == 1 and tensors[0][1].is_contiguous():
            return _finished(FlatBucket(tensors[0][1].view(-1).view(torch.uint8), pieces))
        size, device = pieces[-1].stop, tensors[0][1].device
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            self._buffers[self._turn] = None  # freed before its larger successor is allocated
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, device=device)
        self._turn = 1 - self._turn
        bucket = FlatBucket(buffer[:size], pieces)
        for (_, source), (_, target) in zip(tensors, bucket.tensors(), strict=True):
            target.copy_(source)
        return _finished(bucket)


def _finished(bucket: FlatBucket) -> FlatBucket:
    """The receiver's process knows nothing of this stream."""
    if bucket.data.device.type == "cuda":
        torch.cuda.current_stream(bucket.data.device).synchronize()
    return bucket


class Outlet(Protocol):
    """Where `send` puts buckets. The methods are called in the caller's thread and may be collective."""

    def of(self, bucket: FlatBucket) -> list[str]:
        """What is delivered of a bucket, one payload a receiver. The bucket before has been answered by then."""
        ...

    def end(self) -> None:
        """Nothing is on its way any more."""
        ...


Deliver = Callable[[list[str]], Sequence[asyncio.Future[None]]]


async def send(buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], outlet: Outlet, deliver: Deliver) -> int:
    """Deliver every bucket in order, one at a time; returns the bytes delivered.

    `buckets` is advanced in this thread (it may be a collective); `deliver` starts what ends, in worker threads, when the
    receivers have let go of the bucket. After an error of one the rest is still gathered, for the other ranks' sake."""
    flattener, num_bytes = Flattener(), 0
    bucket = None
    running: Sequence[asyncio.Future[None]] = ()
    failure: Exception | None = None
    for tensors in buckets:
        bucket = flattener.flatten(tensors)
        num_bytes += bucket.data.numel()
        failure = failure or await _settled(running)
        payloads = outlet.of(bucket)
        running = () if failure else deliver(payloads)
    failure = failure or await _settled(running)
    outlet.end()
    if torch.cuda.is_available():
        del flattener, bucket
        torch.cuda.ipc_collect()  # the receivers have closed their handles
    if failure is not None:
        raise failure
    return num_bytes


async def _settled(deliveries: Sequence[asyncio.Future[None]]) -> Exception | None:
    """The first error of deliveries, once all have ended."""
    if not deliveries:
        return None
    await asyncio.wait(deliveries)
    errors = [delivery.exception() for delivery in deliveries]
    error = next((e for e in errors if e is not None), None)
    assert error is None or isinstance(error, Exception)
    return error
