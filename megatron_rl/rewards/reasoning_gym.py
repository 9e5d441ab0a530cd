"""Reward term `reasoning_gym`: the scorer that comes with a reasoning-gym task, given the entry the question came from.

The entry travels in the prompt's tags as JSON (`data/reasoning_gym.py` writes it). Partial credit is passed on as the
term's value; a response counts as correct only at 1.0. Refuses prompts of other sources.
"""

from __future__ import annotations

import json

from megatron_rl.errors import RewardError
from megatron_rl.rewards.exact import answer_after
from megatron_rl.types import Prompt

TASK_TAG, ENTRY_TAG = "reasoning_gym.task", "reasoning_gym.entry"


def score(*, response: str, answer: str, prompt: Prompt, prefix: str | None = None) -> float | None:
    """The task's own score in [0, 1]; None for a response without an answer (`prefix` as in `exact`)."""
    if ENTRY_TAG not in prompt.tags:
        raise RewardError(
            f"rewards: term reasoning_gym cannot judge prompt {prompt.id}: it is not of data.source=reasoning_gym; "
            "choose another term for this data"
        )
    found = answer_after(response, prefix)
    if found is None:
        return None
    from reasoning_gym import get_score_answer_fn  # 1 s: only workers that use it pay for it

    return float(get_score_answer_fn(prompt.tags[TASK_TAG])(found, json.loads(prompt.tags[ENTRY_TAG])))
