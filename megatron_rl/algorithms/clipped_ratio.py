"""PPO's clipped objective per token, which several algorithms share; its formula and source: `ppo.py`.

ratio_t = pi(y_t) / pi_i(y_t). pi_i is the policy at the iteration's start, computed by the trainer: the proximal policy of
decoupled PPO (arXiv 2110.00641). What sampled the token may be older or another engine: `importance.py` corrects for that, apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.objective import ObjectiveInputs
from megatron_rl.config import AlgorithmConfig
from megatron_rl.errors import ConfigError


def ratio_bounds(config: AlgorithmConfig, low: float, high: float) -> tuple[float, float]:
    """How far a ratio may fall below 1 and rise above it: as set, else `low` and `high`, the authors' own.

    Raises ConfigError for a fall of more than 1."""
    if config.clip_low is not None and config.clip_low > 1:
        raise ConfigError(f"algorithm.clip_low={config.clip_low}: a ratio cannot fall more than 1 below 1; set it to 1 or less")
    return low if config.clip_low is None else config.clip_low, high if config.clip_high is None else config.clip_high


@dataclass(frozen=True)
class ClippedRatio:
    low: float  # in (0, 1)
    high: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """ratio_t A_j where the unclipped term is the smaller one, else 0."""
        ratio, advantage = inputs.token_log_ratios.exp(), inputs.token_advantages
        clipped = torch.where(advantage > 0, ratio > 1 + self.high, ratio < 1 - self.low)
        return torch.where(clipped, 0.0, ratio * advantage)

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        ratio, advantage = inputs.token_log_ratios.exp(), inputs.token_advantages
        least = torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        return -inputs.weights[inputs.sequence_ids] * least
