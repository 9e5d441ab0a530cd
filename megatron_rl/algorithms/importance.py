"""Truncated importance sampling: any objective for tokens that another policy sampled than the reference.

Multiplies each token's term by min(pi_i(y_t) / behaviour(y_t), cap), where the behaviour log-probs are the engine's at the
time: older weights for the old segments of a partial rollout, and the engine's own rounding for all. With `ClippedRatio` this
is PPO with behaviour and proximal policy apart (decoupled PPO, arXiv 2110.00641; truncation: IMPALA, arXiv 1802.01561).
Departure: per token, not per sequence, so it is biased where a sequence's earlier tokens are off-policy too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.objective import Objective, ObjectiveInputs


@dataclass(frozen=True)
class TruncatedImportance:
    objective: Objective
    cap: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self._factors(inputs) * self.objective.coefficients(inputs)

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return self._factors(inputs) * self.objective.loss(inputs)

    def _factors(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return (inputs.reference_log_probs - inputs.behaviour_log_probs).exp().clamp(max=self.cap)
