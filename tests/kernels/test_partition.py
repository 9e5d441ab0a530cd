"""Partitions lose nothing, and are as even as the plain algorithm and near the exact answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import KernelError
from megatron_rl.kernels import partition
from tests.kernels import partition_reference

whole_costs = st.lists(st.integers(0, 1000), max_size=40)


def parts_of(found: list[int], num_parts: int) -> list[list[int]]:
    return [[item for item, part in enumerate(found) if part == p] for p in range(num_parts)]


@settings(max_examples=100, deadline=None)
@given(whole_costs, st.integers(1, 9))
def test_every_item_has_one_part_and_the_spread_is_no_worse_than_the_plain_algorithms(costs, num_parts):
    found = partition.balanced(costs, num_parts)
    assert len(found) == len(costs) and set(found) <= set(range(num_parts))
    parts = parts_of(found, num_parts)
    sums = [sum(costs[i] for i in part) for part in parts]
    assert sums == sorted(sums, reverse=True)
    assert max(sums) - min(sums) <= partition_reference.spread(costs, partition_reference.balanced(costs, num_parts))
    assert partition.balanced(costs, num_parts) == found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(2, 4))
def test_the_heaviest_part_is_within_the_proven_bound_of_the_exact_answer(costs, num_parts):
    """Largest differencing: at most 4/3 - 1/(3(k - 1)) of the optimum for k >= 3 parts, 7/6 for 2 (Michiels et al., 2007)."""
    found = partition.balanced(costs, num_parts)
    heaviest = max(sum(costs[i] for i in part) for part in parts_of(found, num_parts))
    exact = partition_reference.least_heaviest(costs, num_parts)
    bound = 7 / 6 if num_parts == 2 else 4 / 3 - 1 / (3 * (num_parts - 1))
    assert exact <= heaviest <= bound * exact + 1e-9


def test_known_answers():
    assert partition.balanced([], 2) == [] and partition.balanced([5, 5], 1) == [0, 0]
    found = partition.balanced([8, 7, 6, 5, 4], 2)  # differencing alone leaves 16 and 14; a swap makes them even
    assert partition_reference.spread([8, 7, 6, 5, 4], partition_reference.balanced([8, 7, 6, 5, 4], 2)) == 2
    assert partition_reference.spread([8, 7, 6, 5, 4], parts_of(found, 2)) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 500)), max_size=30), st.integers(1, 50), st.integers(1, 4))
def test_parts_within_a_capacity_are_few_and_hold_everything_once(items, capacity, multiple):
    sizes, costs = [size for size, _ in items], [cost for _, cost in items]
    parts = partition.with_capacity(sizes, costs, capacity, multiple)
    assert sorted(item for part in parts for item in part) == list(range(len(items)))
    assert all(sum(sizes[i] for i in part) <= capacity or len(part) == 1 for part in parts)
    assert len(parts) % multiple == 0 and parts
    oversized = sum(size > capacity for size in sizes)
    least = oversized - (-sum(size for size in sizes if size <= capacity) // capacity)
    assert len(parts) >= least
    # Any two parts of best fit are more than full together, so it needs fewer than twice the least, and one.
    assert len(parts) <= -(-max(1, 2 * least) // multiple) * multiple
    sums = [sum(costs[i] for i in part) for part in parts]
    assert sums == sorted(sums, reverse=True)
    assert partition.with_capacity(sizes, costs, capacity, multiple) == parts


def test_costs_are_balanced_as_far_as_the_capacity_leaves_a_choice():
    sizes, costs = [50, 50, 25, 25, 25, 25], [90.0, 10.0, 5.0, 5.0, 5.0, 5.0]
    tight, roomy = (partition.with_capacity(sizes, costs, capacity, 2) for capacity in (100, 150))
    assert [sum(sizes[i] for i in part) for part in tight] == [100, 100]
    assert roomy == [[0], [1, 2, 3, 4, 5]]


def test_bad_arguments_are_refused():
    with pytest.raises(KernelError, match=r"balanced: num_parts: expected at least 1, got 0"):
        partition.balanced([1], 0)
    with pytest.raises(KernelError, match=r"costs: expected finite numbers >= 0, got -1"):
        partition.balanced([1, -1], 2)
    with pytest.raises(KernelError, match=r"costs: .* got nan"):
        partition.with_capacity([1], [float("nan")], 4)
    with pytest.raises(KernelError, match=r"costs: expected one for each of 2 sizes, got 1"):
        partition.with_capacity([1, 1], [1], 4)
    with pytest.raises(KernelError, match=r"sizes: expected at least 1, got 0"):
        partition.with_capacity([0], [1], 4)
