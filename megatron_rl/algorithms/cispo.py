"""CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): clip the weight, not the update,

    -sg( clip(ratio_t, 1 - low, 1 + high) ) A_j log pi(y_t),     ratio_t = pi(y_t) / pi_i(y_t).

Every token keeps a gradient. The authors leave the lower bound off: set `algorithm.clip_low` to 1. Departure: pi_i is the
iteration's start by the trainer's own log-probs, as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.advantages import standardized
from megatron_rl.algorithms.clipped_ratio import ratio_bounds
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm, ObjectiveInputs
from megatron_rl.config import AlgorithmConfig


@dataclass(frozen=True)
class ClippedWeight:
    low: float
    high: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return inputs.token_log_ratios.exp().clamp(1 - self.low, 1 + self.high) * inputs.token_advantages

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return -inputs.weights[inputs.sequence_ids] * self.coefficients(inputs) * inputs.log_probs


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(standardized, Normalization.BATCH_TOKENS, ClippedWeight(*ratio_bounds(config, 1.0, 0.2)))
