"""Which items share a part, so that the parts cost alike: largest differencing (Karmarkar and Karp, 1982), in csrc/packing/.

Both functions are pure and deterministic: what ties is taken by the lower index. They know no tokens or ranks; what an item
costs is the caller's formula (`training/packing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.errors import KernelError
from megatron_rl.kernels.build import state


def balanced(costs: Sequence[float], num_parts: int) -> list[int]:
    """The part, 0..num_parts - 1, of each item; part 0 is the heaviest. The heaviest and the lightest differ little.

    Differencing, then moves and swaps that take weight off the heaviest part. Parts may be empty where items are few.
    Raises KernelError for a cost that is negative or not finite and for num_parts < 1."""
    if num_parts < 1:
        raise KernelError(f"partition.balanced: num_parts: expected at least 1, got {num_parts}")
    _check_costs("balanced", costs)
    parts = [0] * len(costs)
    for part, items in enumerate(state.balanced(costs, num_parts)):
        for item in items:
            parts[item] = part
    return parts


def with_capacity(sizes: Sequence[int], costs: Sequence[float], capacity: int, multiple: int = 1) -> list[list[int]]:
    """The items of each part, heaviest part first: few parts, a multiple of `multiple`, whose sizes are at most `capacity`.

    Few: what differencing by size or best fit find. An item larger than the capacity has a part of its own; parts are empty
    where the multiple asks for more than items need. Then costs are balanced within the capacity. Raises KernelError for
    sizes, a capacity or a multiple below 1, and for costs that are negative, not finite, or not one an item."""
    _check_costs("with_capacity", costs)
    for name, values in (("sizes", sizes), ("capacity", [capacity]), ("multiple", [multiple])):
        if min(values, default=1) < 1:
            raise KernelError(f"partition.with_capacity: {name}: expected at least 1, got {min(values)}")
    if len(sizes) != len(costs):
        raise KernelError(f"partition.with_capacity: costs: expected one for each of {len(sizes)} sizes, got {len(costs)}")
    return state.with_capacity(sizes, costs, capacity, multiple)


def _check_costs(function: str, costs: Sequence[float]) -> None:
    bad = [cost for cost in costs if not 0 <= cost < float("inf")]
    if bad:
        raise KernelError(f"partition.{function}: costs: expected finite numbers >= 0, got {bad[0]}")
