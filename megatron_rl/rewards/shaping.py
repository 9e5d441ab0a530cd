"""What a group's rewards become before its advantages: Toggle, token-budget control, length reward, in this order.

The functions are pure. `Shaping` binds them to the settings; all it remembers is Toggle's budget of each prompt, learnt from
the trained batches in their order and kept in the checkpoint, so that a replay shapes as the first pass did. The repetition
penalty belongs to one response, not to a group: `scorer.py`. Refuses nothing: the rules between settings are in `config/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_rl.config import LengthRewardConfig, RewardsConfig, TokenBudgetConfig
from megatron_rl.rewards.length import length_rewards
from megatron_rl.types import Group, Prompt


def length_weight(config: LengthRewardConfig, iteration: int) -> float:
    """The length reward's factor in an iteration (paper 2.3.3: none at first, then constant; the linear ramp is ours)."""
    if config.schedule == "none" or iteration < config.start_iteration:
        return 0.0
    if config.schedule == "constant":
        return config.weight
    return config.weight * min(1.0, (iteration - config.start_iteration + 1) / config.ramp_iterations)


def within_budget(rewards: Sequence[float], lengths: Sequence[int], budget: int, penalty: float) -> list[float]:
    """K2's budget control (arXiv 2507.20534, 3.2): a response of more than `budget` tokens earns what one cut there would.

    It keeps no positive reward, because its answer lies behind the cut, and loses `penalty`. rewards, lengths [tokens]: [k]."""
    return [reward if length <= budget else min(0.0, reward) - penalty for reward, length in zip(rewards, lengths, strict=True)]


def toggled(
    rewards: Sequence[float], lengths: Sequence[int], correct: Sequence[bool], *, budget: int, accuracy: float
) -> list[float]:
    """K2.5's Toggle in its limited phase (arXiv 2602.02276, section 4): a group whose mean correctness has reached `accuracy`
    keeps positive rewards only for responses of at most `budget` tokens; any other group is left alone. All: [k]."""
    if sum(correct) < accuracy * len(correct):
        return list(rewards)
    return within_budget(rewards, lengths, budget, penalty=0.0)


def correct_length(lengths: Sequence[int], correct: Sequence[bool], quantile: float) -> int | None:
    """The least length [tokens] that at least `quantile` of the right responses do not exceed; None where none is right."""
    right = sorted(length for length, is_right in zip(lengths, correct, strict=True) if is_right)
    return right[max(0, math.ceil(quantile * len(right)) - 1)] if right else None


def token_budget(config: TokenBudgetConfig, prompt: Prompt) -> int | None:
    """The budget [tokens] of the prompt's kind of task, else the common one; None: unlimited."""
    kind = prompt.tags.get(config.tag) if config.tag else None
    return config.by_tag.get(kind, config.tokens) if kind is not None else config.tokens


class Shaping:
    """The rewards that advantages are computed from. One event loop owns it."""

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._budgets: dict[str, int] = {}  # Toggle's, of each prompt id

    def rewards(self, group: Group, iteration: int) -> list[float]:
        """One reward a member, in order."""
        c = self._config
        scored = [(t.outcome, t.num_tokens) for t in group.trajectories if t.outcome]
        rewards = [outcome.reward for outcome, _ in scored]
        correct, lengths = [outcome.correct for outcome, _ in scored], [length for _, length in scored]
        if (budget := self._budgets.get(group.prompt.id)) and self._is_limited(iteration):
            rewards = toggled(rewards, lengths, correct, budget=budget, accuracy=c.toggle.accuracy)
        if (budget := token_budget(c.budget, group.prompt)) is not None:
            rewards = within_budget(rewards, lengths, budget, c.budget.penalty)
        if weight := length_weight(c.length, iteration):
            extra = length_rewards(lengths, correct)
            rewards = [reward + weight * more for reward, more in zip(rewards, extra, strict=True)]
        return rewards

    def observe(self, group: Group) -> None:
        """Fix Toggle's budget of a prompt at its first trained group with a right response. Called in the order of batches."""
        if self._config.toggle.period is None or group.prompt.id in self._budgets:
            return
        lengths = [t.num_tokens for t in group.trajectories]
        correct = [bool(t.outcome and t.outcome.correct) for t in group.trajectories]
        if budget := correct_length(lengths, correct, self._config.toggle.quantile):
            self._budgets[group.prompt.id] = budget

    def state(self) -> dict[str, int]:
        """As JSON, for the checkpoint."""
        return dict(self._budgets)

    def restore(self, state: Mapping[str, int]) -> None:
        self._budgets = dict(state)

    def _is_limited(self, iteration: int) -> bool:
        """Every other `period` iterations, the second ones: budgets are measured in the first (ours; K2.5 measures before)."""
        period = self._config.toggle.period
        return period is not None and iteration // period % 2 == 1
