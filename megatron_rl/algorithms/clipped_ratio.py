"""PPO's clipped objective (arXiv 1707.06347, equation 7), per token, with the asymmetric bounds of DAPO (arXiv 2503.14476):

    -min( ratio_t A_j, clip(ratio_t, 1 - low, 1 + high) A_j ),     ratio_t = pi(y_t) / pi_i(y_t).

pi_i is the policy at the iteration's start, computed by the trainer: the proximal policy of decoupled PPO
(arXiv 2110.00641). What sampled the token may be older or another engine: `importance.py` corrects for that, apart.
The same objective serves `ppo` (A centred, mean over the step's tokens; departure: no value network), `grpo`
(arXiv 2402.03300: A standardized, mean over each response), `dr_grpo` (arXiv 2503.20783: A centred, constant denominator) and
`reinforce_pp` (arXiv 2501.03262: A whitened over the batch, mean over tokens; departure: its KL is `algorithm.kl_weight`, in the
coefficient of each token, not in the reward that is whitened).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.objective import ObjectiveInputs


@dataclass(frozen=True)
class ClippedRatio:
    low: float  # in (0, 1)
    high: float

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """ratio_t A_j where the unclipped term is the smaller one, else 0."""
        ratio, advantage = inputs.token_log_ratios.exp(), inputs.token_advantages
        clipped = torch.where(advantage > 0, ratio > 1 + self.high, ratio < 1 - self.low)
        return torch.where(clipped, 0.0, ratio * advantage)

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        ratio, advantage = inputs.token_log_ratios.exp(), inputs.token_advantages
        least = torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        return -inputs.weights[inputs.sequence_ids] * least
