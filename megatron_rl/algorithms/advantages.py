"""Advantages from the rewards of whole groups: one pure function for each published form.

rewards and group_ids: [sequences] in, float32 [sequences] out; computed in float64. All but `leave_one_out` accept a group of
one, which then gets 0 (`whitened`: its reward's place in the batch). The baselines of mirror descent: `mirror_descent.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_rl.errors import MegatronRLError

EPS = 1e-6  # beside a standard deviation: a group of equal rewards gets 0, not NaN


def over_groups(rewards: torch.Tensor, group_ids: torch.Tensor, of_group: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`of_group` applied to the float64 rewards [k] of each group."""
    out = torch.empty_like(rewards, dtype=torch.float32)
    groups, index = torch.unique(group_ids, return_inverse=True)
    for g in range(len(groups)):
        out[index == g] = of_group(rewards[index == g].to(torch.float64)).to(torch.float32)
    return out


def centred(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """r - mean(group), the sample itself included (Dr. GRPO, arXiv 2503.20783)."""
    return over_groups(rewards, group_ids, lambda r: r - r.mean())


def standardized(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(r - mean(group)) / std(group) (GRPO, arXiv 2402.03300, 4.1.2); the unbiased standard deviation."""
    return over_groups(rewards, group_ids, lambda r: (r - r.mean()) / (_std(r) + EPS))


def leave_one_out(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """r_j - mean of the k - 1 others (RLOO, arXiv 2402.14740, section 3). Raises MegatronRLError for a group of one."""

    def of_group(r: torch.Tensor) -> torch.Tensor:
        if len(r) < 2:
            raise MegatronRLError(
                "algorithm.name=rloo: a group of one has no others to compare with; set rollout.group_size >= 2"
            )
        return (r - r.mean()) * len(r) / (len(r) - 1)

    return over_groups(rewards, group_ids, of_group)


def whitened(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(r - mean(batch)) / std(batch), blind to groups (REINFORCE++, arXiv 2501.03262)."""
    r = rewards.to(torch.float64)
    return ((r - r.mean()) / (_std(r) + EPS)).to(torch.float32)


def best_only(rewards: torch.Tensor, group_ids: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """k / (number of best) for a group's best responses if they exceed `threshold`, 0 for all others: with the weight
    1 / (G k), the mean over the best responses of each group."""

    least = rewards.new_tensor(threshold).to(
        torch.float64
    )  # rounded as the rewards are: a reward at the threshold is not above it

    def of_group(r: torch.Tensor) -> torch.Tensor:
        best = (r == r.max()) & (r > least)
        return best * len(r) / best.sum().clamp(min=1)

    return over_groups(rewards, group_ids, of_group)


def _std(r: torch.Tensor) -> torch.Tensor:
    return r.std() if len(r) > 1 else r.new_zeros(())
