"""K2.5's objective (arXiv 2602.02276, section 4): the mean over a group's tokens of

    -ratio_t A_j [low <= log ratio_t <= high] + tau (log ratio_t)^2,     ratio_t = pi(y_t) / pi_old(y_t).

A token whose log-ratio lies outside the bounds gets no policy gradient, whatever the sign of A_j; the squared log-ratio
still pulls it back. pi_old is the policy that sampled the token, by the engine's log-probs: the bounds are there for
what trainer and engine disagree on, and `algorithm.importance_cap` has no place beside them. Departures: Adam instead of
Muon; the printed sign of the squared term, which belongs to a maximisation, is turned. The report does not say whether masked
tokens keep the squared term; here they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.algorithms.advantages import centred
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm, ObjectiveInputs
from megatron_rl.config import AlgorithmConfig


@dataclass(frozen=True)
class MaskedRatio:
    tau: float
    low: float  # least log-ratio, below 0
    high: float  # largest log-ratio, above 0

    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        log_ratio = self._log_ratios(inputs)
        return self._policy_term(inputs, log_ratio) - 2 * self.tau * log_ratio

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        log_ratio = self._log_ratios(inputs)
        return inputs.weights[inputs.sequence_ids] * (self.tau * log_ratio**2 - self._policy_term(inputs, log_ratio))

    def _policy_term(self, inputs: ObjectiveInputs, log_ratio: torch.Tensor) -> torch.Tensor:
        """ratio_t A_j inside the bounds; it is its own derivative with respect to log pi."""
        inside = (log_ratio >= self.low) & (log_ratio <= self.high)
        return torch.where(inside, log_ratio.clamp(self.low, self.high).exp() * inputs.token_advantages, 0.0)

    @staticmethod
    def _log_ratios(inputs: ObjectiveInputs) -> torch.Tensor:
        return inputs.log_probs - inputs.behaviour_log_probs


def algorithm(config: AlgorithmConfig) -> Algorithm:
    low = 1.0 if config.clip_low is None else config.clip_low
    high = 1.0 if config.clip_high is None else config.clip_high
    return Algorithm(centred, Normalization.GROUP_TOKENS, MaskedRatio(config.tau, -low, high))
