"""K2's loss (arXiv 2507.20534, 3.2): per problem, minimise (1/k) sum_j [ r_j - mean - tau rho_j ]^2.

rho_j = log pi(y_j) - log pi_i(y_j), summed over the response. Its gradient is 2 tau times mirror descent's
(`mirror_descent.py`): the same direction, another size, which matters to gradient clipping and to weight decay.
Departures: Adam instead of Muon; the reference is the iteration's start, as in k1.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.mirror_descent import baseline_of
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm, ObjectiveInputs
from megatron_rl.config import AlgorithmConfig


@dataclass(frozen=True)
class SquaredResidual:
    tau: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """2 tau (A_j - tau rho_j) for every token of sequence j."""
        return 2 * self.tau * self._residuals(inputs)[inputs.sequence_ids]

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """(A_j - tau rho_j)^2, spread evenly over the sequence's loss tokens."""
        share = inputs.weights * self._residuals(inputs) ** 2 / inputs.num_tokens.clamp(min=1)
        return share[inputs.sequence_ids]

    def _residuals(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return inputs.advantages - self.tau * inputs.log_ratios


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(baseline_of(config), Normalization.SEQUENCE, SquaredResidual(config.tau))
