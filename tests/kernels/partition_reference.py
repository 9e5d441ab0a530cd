"""Largest differencing in plain Python, every partial solution a tuple of all its parts: what csrc/packing/ is tested against
and measured beside. And the exact least spread, for few items."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count


def balanced(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """The items of each part. The two states of largest spread are combined, heaviest parts with lightest, until one is left;
    equal spreads are taken by the heavier part, then by the lower index."""
    heap = []
    for item, cost in enumerate(costs):
        parts = [(cost, [item])] + [(0, []) for _ in range(num_parts - 1)]
        heap.append((-(cost - parts[-1][0]), -cost, item, parts))
    heapq.heapify(heap)
    if not heap:
        return [[] for _ in range(num_parts)]
    while len(heap) > 1:
        _, _, index, heavy = heapq.heappop(heap)
        _, _, _, other = heapq.heappop(heap)
        joined = [(a + b, items + more) for (a, items), (b, more) in zip(heavy, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (-(joined[0][0] - joined[-1][0]), -joined[0][0], index, joined))
    return [items for _, items in heap[0][3]]


def spread(costs: Sequence[float], parts: Sequence[Sequence[int]]) -> float:
    sums = [sum(costs[item] for item in part) for part in parts]
    return max(sums) - min(sums)


def least_heaviest(costs: Sequence[int], num_parts: int) -> int:
    """The least weight of the heaviest part, by branch and bound; for a dozen items."""
    order = sorted(costs, reverse=True)
    sums = [0] * num_parts
    best = [sum(order)]
    visits = count()

    def place(i: int) -> None:
        assert next(visits) < 10**6, "too many items for the exact answer"
        if i == len(order):
            best[0] = max(sums)
            return
        for p in range(num_parts):
            if sums[p] + order[i] < best[0] and sums[p] not in sums[:p]:  # of equal parts only the first
                sums[p] += order[i]
                place(i + 1)
                sums[p] -= order[i]

    place(0)
    return best[0]
