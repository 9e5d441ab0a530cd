"""-A_j log pi(y_j), no ratio and no clipping: REINFORCE, which `rloo.py` and `rest.py` share.

From the second optimizer step of an iteration on it trains on samples of the policy at its start, uncorrected, as published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.objective import ObjectiveInputs


@dataclass(frozen=True)
class PolicyGradient:
    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return inputs.token_advantages

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return -inputs.weights[inputs.sequence_ids] * inputs.token_advantages * inputs.log_probs
