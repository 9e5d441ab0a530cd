"""ReST as the paper compares with (k1.5 3.5; method: arXiv 2308.08998), without negative gradients: the mean over groups of

    -log pi(y_j),     y_j the response of the largest reward, if that is above `algorithm.rest_threshold`.

Equally good ones share the group's weight.
"""

from __future__ import annotations

from functools import partial

import torch

from megatron_rl.algorithms.advantages import over_groups
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.config import AlgorithmConfig


def best_only(rewards: torch.Tensor, group_ids: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """float32 [sequences]: k / (number of best) for a group's best responses if they exceed `threshold`, 0 for all others: with
    the weight 1 / (G k), the mean over the best responses of each group."""
    least = rewards.new_tensor(threshold).to(torch.float64)  # rounded as rewards are: one at the threshold is not above it

    def of_group(r: torch.Tensor) -> torch.Tensor:
        best = (r == r.max()) & (r > least)
        return best * len(r) / best.sum().clamp(min=1)

    return over_groups(rewards, group_ids, of_group)


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(best_only, threshold=config.rest_threshold), Normalization.SEQUENCE, PolicyGradient())
