"""-log pi(y_t): supervised fine-tuning, and the PTX term beside any objective (K2 3.2; InstructGPT, arXiv 2203.02155).

Advantages, references and behaviour policies play no part: a token's coefficient is 1, and the sequences' weights hold the
denominator, 1 / (tokens of the step) for a mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.objective import Objective, ObjectiveInputs


@dataclass(frozen=True)
class CrossEntropy:
    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return torch.ones_like(inputs.log_probs)

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return -inputs.weights[inputs.sequence_ids] * inputs.log_probs


@dataclass(frozen=True)
class WithPTX:
    """`objective` for sampled sequences, cross entropy for supervised ones."""

    objective: Objective
    supervised: CrossEntropy = CrossEntropy()

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        is_supervised = inputs.is_supervised[inputs.sequence_ids]
        return torch.where(is_supervised, self.supervised.coefficients(inputs), self.objective.coefficients(inputs))

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        is_supervised = inputs.is_supervised[inputs.sequence_ids]
        return torch.where(is_supervised, self.supervised.loss(inputs), self.objective.loss(inputs))
