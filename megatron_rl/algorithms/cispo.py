"""CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): clip the weight, not the update,

    -sg( clip(ratio_t, 1 - low, 1 + high) ) A_j log pi(y_t),     ratio_t = pi(y_t) / pi_i(y_t).

Every token keeps a gradient. The authors leave the lower bound off: set `algorithm.clip_low` to 1. Departure: pi_i is the
iteration's start by the trainer's own log-probs, as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.objective import ObjectiveInputs


@dataclass(frozen=True)
class ClippedWeight:
    low: float
    high: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return inputs.token_log_ratios.exp().clamp(1 - self.low, 1 + self.high) * inputs.token_advantages

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return -inputs.weights[inputs.sequence_ids] * self.coefficients(inputs) * inputs.log_probs
