"""k1.5's online policy mirror descent (paper 2.3.2, equation 3), and its two baselines.

Per problem with k responses: minimise (1/k) sum_j [ -(r_j - b) log pi(y_j) + (tau/2) rho_j^2 ],
rho_j = log pi(y_j) - log pi_i(y_j), summed over the response's tokens, not normalised by length. Its gradient is minus
equation 3; the paper's squared loss ((r_j - b) - tau rho_j)^2 has that gradient times 2 tau.
Departure, off by default: `level="token"` penalises each token's own log-ratio instead of the sequence's sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from megatron_rl.algorithms.advantages import over_groups
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm, ObjectiveInputs
from megatron_rl.config import AlgorithmConfig

Baseline = Literal["mean", "log_z"]
Level = Literal["sequence", "token"]


def advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *, baseline: Baseline, tau: float) -> torch.Tensor:
    """r_j - b over each whole group; float32 [sequences] in, float32 [sequences] out.

    `mean`: b is the group's mean reward, the sample itself included. `log_z`: b = tau log (1/k) sum_j exp(r_j / tau)."""

    def of_group(r: torch.Tensor) -> torch.Tensor:
        return r - (r.mean() if baseline == "mean" else tau * (torch.logsumexp(r / tau, 0) - math.log(len(r))))

    return over_groups(rewards, group_ids, of_group)


@dataclass(frozen=True)
class MirrorDescent:
    """The objective the trainer is given."""

    tau: float
    level: Level = "sequence"

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """A_j - tau rho_j for every token of sequence j (token level: A_j - tau rho_t)."""
        return inputs.token_advantages - self.tau * self._penalized(inputs)

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """-A_j log pi_t + (tau/2) rho_t rho_j: sums to equation 3's objective; rho_t^2 at token level."""
        penalty = 0.5 * self.tau * inputs.token_log_ratios * self._penalized(inputs)
        return inputs.weights[inputs.sequence_ids] * (penalty - inputs.token_advantages * inputs.log_probs)

    def _penalized(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """float32 [tokens]: the log-ratio whose square is the penalty."""
        return inputs.log_ratios[inputs.sequence_ids] if self.level == "sequence" else inputs.token_log_ratios


def baseline_of(config: AlgorithmConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`advantages` as `algorithm.baseline` says."""
    return partial(advantages, baseline=config.baseline, tau=config.tau)


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(baseline_of(config), Normalization.SEQUENCE, MirrorDescent(config.tau, config.level))


def mirror_descent(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    sequence_ids: torch.Tensor,
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    tau: float,
    baseline: Baseline = "mean",
    level: Level = "sequence",
    loss_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """One whole batch: the reference the distributed trainer must agree with.

    log_probs, reference_log_probs: [tokens]; sequence_ids: int64 [tokens]; rewards, group_ids: [sequences];
    loss_mask: bool [tokens]. Returns a differentiable scalar (mean over groups of the mean over members) and metrics."""
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask.to(log_probs.dtype)
    advantage = advantages(rewards, group_ids, baseline=baseline, tau=tau).to(log_probs.dtype)
    ratios = (log_probs - reference_log_probs.detach()) * mask
    zeros = log_probs.new_zeros(len(rewards))
    log_pi = zeros.index_add(0, sequence_ids, log_probs * mask)
    rho = zeros.index_add(0, sequence_ids, ratios)
    penalty = rho**2 if level == "sequence" else zeros.index_add(0, sequence_ids, ratios**2)
    per_sequence = -advantage * log_pi + 0.5 * tau * penalty
    _, index, members = torch.unique(group_ids, return_inverse=True, return_counts=True)
    loss = (per_sequence / members[index]).sum() / len(members)
    return loss, {"log_ratio/mean": float(rho.detach().mean()), "log_ratio/abs_max": float(rho.detach().abs().max())}
