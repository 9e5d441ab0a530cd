"""Reward term `regex`: what a pattern's one group captured in its last match equals the reference answer.

Refuses a pattern that does not compile or has another number of groups. Compared as `exact.py` compares.
"""

from __future__ import annotations

import re

from megatron_rl.errors import RewardError
from megatron_rl.rewards.exact import normalised
from megatron_rl.types import Prompt


def compiled(pattern: str) -> re.Pattern[str]:
    """Raises RewardError for a pattern this term cannot use."""
    try:
        expression = re.compile(pattern)
    except re.error as e:
        raise RewardError(f"rewards: regex pattern {pattern!r}: {e}; correct it") from e
    if expression.groups != 1:
        raise RewardError(
            f"rewards: regex pattern {pattern!r} has {expression.groups} groups; it needs exactly one, around the answer"
        )
    return expression


def score(*, response: str, answer: str, prompt: Prompt, pattern: str) -> float | None:
    """1.0 or 0.0; None when the pattern does not occur."""
    captured = [match.group(1) for match in compiled(pattern).finditer(response)]
    if not captured or captured[-1] is None:
        return None
    return float(normalised(captured[-1]) == normalised(answer))
