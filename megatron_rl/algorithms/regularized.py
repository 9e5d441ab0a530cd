"""KL and entropy terms for any objective, with its own denominator: + kl * KL(pi || pi_i) - entropy * H(pi).

The KL is to the iteration's start, so it acts from the second optimizer step on (departure from GRPO, whose KL is to the model
before RL). Estimators, x = log pi - log pi_i: `k1` x, of the whole response: its gradient, rho_j grad log pi(y_j), is the
sequence KL's exactly in expectation; `k3` exp(-x) - 1 + x, per token, as GRPO differentiates it (its expected gradient is
that of KL(pi_i || pi)). Names: J. Schulman, "Approximating KL divergence", 2020.
The entropy's gradient is taken from the sampled token: -(log pi + H) grad log pi, unbiased given the context while tokens come
from pi itself; so no gradient of H over the vocabulary is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_rl.algorithms.objective import Objective, ObjectiveInputs

Estimator = Literal["k1", "k3"]


@dataclass(frozen=True)
class Regularized:
    objective: Objective
    kl: float
    estimator: Estimator
    entropy: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        x = inputs.token_log_ratios
        slope = inputs.log_ratios[inputs.sequence_ids] if self.estimator == "k1" else 1 - (-x).exp()
        surprise = inputs.log_probs + inputs.entropies
        return self.objective.coefficients(inputs) - self.kl * slope - self.entropy * surprise

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        x = inputs.token_log_ratios
        divergence = x if self.estimator == "k1" else (-x).exp() - 1 + x
        extra = self.kl * divergence - self.entropy * inputs.entropies
        return self.objective.loss(inputs) + inputs.weights[inputs.sequence_ids] * extra
