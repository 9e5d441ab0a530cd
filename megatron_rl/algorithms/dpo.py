"""Direct preference optimization (arXiv 2305.18290, equation 7), on the pairs of k1.5's long2short (paper 2.4).

A group is a pair, chosen (advantage 1) and rejected (advantage -1); rho = log pi(y) - log pi_ref(y), summed over the response:

    loss = -log sigmoid(m),   m = beta (rho_chosen - rho_rejected)

Its gradient is -beta sigmoid(-m) (grad log pi(chosen) - grad log pi(rejected)), so both members must lie in one
micro-batch (`needs_whole_groups`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from megatron_rl.algorithms.objective import ObjectiveInputs


@dataclass(frozen=True)
class DPO:
    beta: float
    needs_whole_groups: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "margin")

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """+-beta sigmoid(-m)"""
        slope = self.beta * torch.sigmoid(-self._margins(inputs))
        return inputs.token_advantages * slope[inputs.sequence_ids]

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """A pair's loss, spread evenly over its tokens."""
        share = inputs.weights * -logsigmoid(self._margins(inputs)) / (2 * inputs.num_tokens)
        return share[inputs.sequence_ids]

    def measure(self, inputs: ObjectiveInputs) -> dict[str, torch.Tensor]:
        """Means over sequences, each pair counted by both members: how often the chosen one gains, and m."""
        margins = self._margins(inputs)
        return {"accuracy": (margins > 0).to(margins.dtype), "margin": margins}

    def _margins(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[sequences]: m of each sequence's pair."""
        _, pair = torch.unique(inputs.group_ids, return_inverse=True)
        signed = self.beta * inputs.advantages * inputs.log_ratios
        return torch.zeros_like(signed).index_add(0, pair, signed)[pair]
