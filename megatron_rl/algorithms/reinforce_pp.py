"""REINFORCE++ (arXiv 2501.03262): PPO's clipped term (`ppo.py`) with advantages whitened over the whole batch,

    A_j = (r_j - mean(batch)) / std(batch),     the mean over the step's tokens.

Departure: its KL is `algorithm.kl_weight`, in the coefficient of each token, not in the reward that is whitened.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.advantages import in_deviations
from megatron_rl.algorithms.clipped_ratio import ClippedRatio, ratio_bounds
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm
from megatron_rl.config import AlgorithmConfig


def whitened(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Blind to groups; float32 [sequences]. A group of one gets its reward's place in the batch."""
    return in_deviations(rewards.to(torch.float64)).to(torch.float32)


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(whitened, Normalization.BATCH_TOKENS, ClippedRatio(*ratio_bounds(config, 0.2, 0.2)))
