"""Advantages from the rewards of whole groups, in the forms that several algorithms share; one algorithm's own is in its file.

rewards and group_ids: [sequences] in, float32 [sequences] out; computed in float64. A group of one gets 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EPS = 1e-6  # beside a standard deviation: equal rewards get 0, not NaN


def over_groups(rewards: torch.Tensor, group_ids: torch.Tensor, of_group: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`of_group` applied to the float64 rewards [k] of each group."""
    out = torch.empty_like(rewards, dtype=torch.float32)
    groups, index = torch.unique(group_ids, return_inverse=True)
    for g in range(len(groups)):
        out[index == g] = of_group(rewards[index == g].to(torch.float64)).to(torch.float32)
    return out


def centred(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """r - mean(group), the sample itself included."""
    return over_groups(rewards, group_ids, lambda r: r - r.mean())


def standardized(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(r - mean(group)) / std(group)"""
    return over_groups(rewards, group_ids, in_deviations)


def in_deviations(r: torch.Tensor) -> torch.Tensor:
    """(r - mean) / std of all of `r`, with the unbiased standard deviation."""
    return (r - r.mean()) / ((r.std() if len(r) > 1 else r.new_zeros(())) + EPS)
