"""What the trainer asks of an objective, per micro-batch, and what an algorithm consists of.

The trainer knows no algorithm: it hands over detached log-probs and gets back, for every loss token, the coefficient on
grad log pi. Advantages were computed over whole groups before packing; sums over sequences that are split among
context-parallel ranks are reduced by the trainer before they come here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from megatron_rl.algorithms.normalization import Normalization


@dataclass(frozen=True)
class ObjectiveInputs:
    """One micro-batch, detached. Tokens are this rank's loss tokens; sequences are all of the micro-batch's."""

    log_probs: torch.Tensor  # float32 [tokens], of the policy being trained
    reference_log_probs: torch.Tensor  # float32 [tokens], at the iteration's start; equal to log_probs before the first step
    behaviour_log_probs: torch.Tensor  # float32 [tokens], the engine's
    entropies: torch.Tensor  # float32 [tokens], of the policy being trained [nats]
    sequence_ids: torch.Tensor  # int64 [tokens], index into the sequences
    log_ratios: torch.Tensor  # float32 [sequences], sum of log_probs - reference over all loss tokens, over all ranks
    num_tokens: torch.Tensor  # float32 [sequences], loss tokens, over all ranks
    advantages: torch.Tensor  # float32 [sequences]
    weights: torch.Tensor  # float32 [sequences], the loss's denominator: `normalization.py`
    group_ids: torch.Tensor  # int64 [sequences]; where the objective needs whole groups, all members are here
    is_supervised: torch.Tensor  # bool [sequences]: given, not sampled; only `cross_entropy.py` trains on them

    @property
    def token_advantages(self) -> torch.Tensor:
        """float32 [tokens]"""
        return self.advantages[self.sequence_ids]

    @property
    def token_log_ratios(self) -> torch.Tensor:
        """float32 [tokens]: to the reference policy"""
        return self.log_probs - self.reference_log_probs


class Objective(Protocol):
    def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """float32 [tokens]: c such that the loss's gradient is -sum(weight * c * grad log pi)."""
        ...

    def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """float32 [tokens]: this rank's share of the loss, for metrics; summed over tokens and ranks it is the loss."""
        ...


@runtime_checkable
class MeasuredObjective(Objective, Protocol):
    """An objective with numbers of its own to report."""

    measures: tuple[str, ...]

    def measure(self, inputs: ObjectiveInputs) -> dict[str, torch.Tensor]:
        """Each of `measures`, [sequences]; reported as means over sequences."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """The three choices that make one."""

    advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (rewards, group ids), both [sequences], whole groups
    normalization: Normalization
    objective: Objective
