"""GSPO (arXiv 2507.18071, equation 5): PPO's clipping on the length-normalised ratio of the whole response,

    -min( s_j A_j, clip(s_j, 1 - low, 1 + high) A_j ),     s_j = ( pi(y_j) / pi_i(y_j) )^(1 / T_j).

A response is clipped as a whole. The bounds are of another order than PPO's: the authors use 3e-4 and 4e-4. No departure
but the proximal policy pi_i, the iteration's start by the trainer's own log-probs.
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
class SequenceRatio:
    low: float
    high: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """s_j A_j for every token of a response that is not clipped; the weight holds the 1 / T_j of its gradient."""
        ratio, advantage = self._ratios(inputs), inputs.advantages
        clipped = torch.where(advantage > 0, ratio > 1 + self.high, ratio < 1 - self.low)
        return torch.where(clipped, 0.0, ratio * advantage)[inputs.sequence_ids]

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        ratio, advantage = self._ratios(inputs), inputs.advantages
        least = torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        return -(inputs.weights * least)[inputs.sequence_ids]

    @staticmethod
    def _ratios(inputs: ObjectiveInputs) -> torch.Tensor:
        """float32 [sequences]"""
        return (inputs.log_ratios / inputs.num_tokens.clamp(min=1)).exp()


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(standardized, Normalization.RESPONSE_TOKENS, SequenceRatio(*ratio_bounds(config, 3e-4, 4e-4)))
