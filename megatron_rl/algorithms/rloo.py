"""RLOO (arXiv 2402.14740, section 3): REINFORCE with a leave-one-out baseline, the whole response one action,

    -A_j log pi(y_j),     A_j = r_j - mean of the k - 1 others.

Departure: its KL term is `algorithm.kl_weight`, off by default.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.advantages import over_groups
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.config import AlgorithmConfig
from megatron_rl.errors import MegatronRLError


def leave_one_out(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """float32 [sequences]. Raises MegatronRLError for a group of one."""

    def of_group(r: torch.Tensor) -> torch.Tensor:
        if len(r) < 2:
            raise MegatronRLError(
                "algorithm.name=rloo: a group of one has no others to compare with; set rollout.group_size >= 2"
            )
        return (r - r.mean()) * len(r) / (len(r) - 1)

    return over_groups(rewards, group_ids, of_group)


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(leave_one_out, Normalization.SEQUENCE, PolicyGradient())
