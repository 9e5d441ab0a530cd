"""-A_j log pi(y_j): REINFORCE, and with other advantages RLOO and ReST.

RLOO (arXiv 2402.14740): A_j by leave-one-out, the whole response one action, no ratio and no clipping. Its KL term is
`algorithm.kl_weight`, off by default. ReST as the paper compares with (k1.5 3.5; method: arXiv 2308.08998): fit the best
response of each group, no negative gradients; A_j by `advantages.best_only`. From the second optimizer step of an iteration
on, both train on samples of the policy at its start, uncorrected, as published.
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
