"""Packing for engines in other processes: nothing lost or written too early, few calls, two buffers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.weights.transport import ALIGNMENT, FlatBucket, Flattener, as_it_lies, send


def packed(flattener: Flattener, tensors: list[tuple[str, torch.Tensor]]) -> FlatBucket:
    flattener.add(tensors)
    bucket = flattener.take()
    assert bucket is not None
    return bucket


def test_flat_buckets_are_views_of_two_buffers_that_take_turns() -> None:
    tensors = [("a", torch.arange(5.0)), ("b", torch.arange(3, dtype=torch.bfloat16)), ("c", torch.full((2, 2), 7.0))]
    flattener = Flattener(1 << 10)
    first, second, third = (packed(flattener, t) for t in (tensors, tensors[:2], tensors[1:]))
    assert first.data.data_ptr() == third.data.data_ptr() != second.data.data_ptr()
    assert [p.start % 16 for p in first.pieces] == [0, 0, 0] and flattener.take() is None
    for (name, found), (wanted, tensor) in zip(third.tensors(), tensors[1:], strict=True):
        assert name == wanted and found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_a_large_tensor_is_not_copied_if_it_is_contiguous() -> None:
    whole = torch.arange(24, dtype=torch.bfloat16).view(6, 4)
    flattener = Flattener(64)
    assert flattener.needs_no_copy([("rows", whole[2:])]) and not flattener.needs_no_copy([("columns", whole[:, 1:])])
    assert not Flattener(128).needs_no_copy([("rows", whole[2:])]), "a call of its own would cost more than the copy"
    (name, sent), *none = as_it_lies([("rows", whole[2:])]).tensors()
    assert (name, none) == ("rows", []) and torch.equal(sent, whole[2:]) and sent.data_ptr() == whole[2:].data_ptr()
    ((_, sent),) = packed(flattener, [("columns", whole[:, 1:])]).tensors()
    assert torch.equal(sent, whole[:, 1:])


class Outlet:
    """Of one rank."""

    alignment = ALIGNMENT

    def __init__(self, deliver: Callable[[FlatBucket], None], lanes: int) -> None:
        self._deliver, self.lanes = deliver, lanes

    def lend(self, bucket: FlatBucket) -> None:
        pass

    def answered(self) -> None:
        pass

    def deliver(self, bucket: FlatBucket, lent: None) -> None:
        self._deliver(bucket)


class Receiver:
    """Lets go of a bucket only when the next call comes or nothing more is gathered, and reads it then."""

    def __init__(self) -> None:
        self.found: list[list[tuple[str, torch.Tensor]]] = []
        self._turn = threading.Condition()
        self._num_calls = 0
        self._is_over = False

    def deliver(self, bucket: FlatBucket) -> None:
        with self._turn:
            number, self._num_calls = self._num_calls, self._num_calls + 1
            self.found.append([])
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: self._is_over or self._num_calls > number + 1, timeout=20)
            self.found[number] = [(name, tensor.clone()) for name, tensor in bucket.tensors()]

    def over(self) -> None:
        with self._turn:
            self._is_over = True
            self._turn.notify_all()


@settings(max_examples=40, deadline=None)
@given(lists=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), max_size=12), seed=st.integers(0, 9))
def test_every_tensor_arrives_once_whole_and_in_large_calls(lists: list[list[int]], seed: int) -> None:
    """bfloat16, buckets of 256 bytes: buffers of 224."""
    generator = torch.Generator().manual_seed(seed)
    count = iter(range(100))
    tensors = [[(f"t{next(count)}", torch.rand(n, generator=generator).bfloat16()) for n in sizes] for sizes in lists]
    receiver = Receiver()

    def gathered():
        for each in tensors:
            yield [(name, tensor.clone()) for name, tensor in each]
        receiver.over()

    sent = asyncio.run(send(gathered(), Outlet(receiver.deliver, lanes=2), bucket_bytes=256))
    found = dict(entry for bucket in receiver.found for entry in bucket)
    assert sum(map(len, receiver.found)) == len(found) == sum(map(len, tensors))
    assert all(torch.equal(found[name], tensor) for each in tensors for name, tensor in each)
    assert sent >= sum(tensor.nbytes for each in tensors for _, tensor in each)
    sizes = [sum(-(-tensor.nbytes // 16) * 16 for _, tensor in bucket) for bucket in receiver.found]
    assert all(size <= 240 for size in sizes) and all(a + b > 200 for a, b in zip(sizes, sizes[1:], strict=False))


def test_after_a_refusal_nothing_more_is_delivered_and_the_rest_is_gathered() -> None:
    taken: list[int] = []

    def gathered():
        for i in range(6):
            taken.append(i)
            yield [(f"t{i}", torch.ones(60))]

    def refuse(bucket: FlatBucket) -> None:
        calls.append(bucket)
        raise ValueError("no")

    calls: list[FlatBucket] = []
    try:
        asyncio.run(send(gathered(), Outlet(refuse, lanes=1), bucket_bytes=640))
        raise AssertionError("the refusal was swallowed")
    except ValueError as e:
        assert str(e) == "no"
    assert taken == list(range(6)) and len(calls) <= 3
