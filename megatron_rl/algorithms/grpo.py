"""GRPO (arXiv 2402.03300, equation 3): PPO's clipped term (`ppo.py`) with the advantages of the group, no value network,

    A_j = (r_j - mean(group)) / std(group),     the mean over each response's tokens, then over the group.

Departure: its KL term is `algorithm.kl_weight`, to the iteration's start (`regularized.py`), and off by default.
"""

from __future__ import annotations

from megatron_rl.algorithms.advantages import standardized
from megatron_rl.algorithms.clipped_ratio import ClippedRatio, ratio_bounds
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm
from megatron_rl.config import AlgorithmConfig


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(standardized, Normalization.RESPONSE_TOKENS, ClippedRatio(*ratio_bounds(config, 0.2, 0.2)))
