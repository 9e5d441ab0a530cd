"""Reward term `reasoning_gym`: the scorer that comes with a reasoning-gym task, given the entry the question came from.

The entry travels in the prompt's tags as JSON (`data/reasoning_gym.py` writes it). Partial credit is passed on as the
term's value; a response counts as correct only at 1.0. Refuses prompts of other sources, and tasks whose scorer evaluates the
response as Python: nothing that a model wrote is executed.
"""

from __future__ import annotations

import json
import re

from megatron_rl.errors import RewardError
from megatron_rl.rewards.exact import answer_after
from megatron_rl.types import Prompt

TASK_TAG, ENTRY_TAG = "reasoning_gym.task", "reasoning_gym.entry"

# Tasks whose scorer puts the response through `eval` or sympy's parse_expr, which is eval. Of the first ones every right
# response is plain arithmetic, so others need not reach it.
EVALUATED_ARITHMETIC = frozenset({"countdown", "puzzle24"})
EXECUTED = frozenset(
    {
        "binary_matrix",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
_ARITHMETIC = re.compile(r"[\d\s()+*/.-]+")


def refusal(task: str) -> str | None:
    """Why a task cannot be scored here; None where it can."""
    if task not in EXECUTED:
        return None
    return f"reasoning-gym scores {task} by evaluating the response as Python, which is not done here; choose another task"


def score(*, response: str, answer: str, prompt: Prompt, prefix: str | None = None) -> float | None:
    """The task's own score in [0, 1]; None for a response without an answer (`prefix` as in `exact`)."""
    if ENTRY_TAG not in prompt.tags:
        raise RewardError(
            f"rewards: term reasoning_gym cannot judge prompt {prompt.id}: it is not of data.source=reasoning_gym; "
            "choose another term for this data"
        )
    task = prompt.tags[TASK_TAG]
    if reason := refusal(task):
        raise RewardError(f"rewards: term reasoning_gym cannot judge prompt {prompt.id}: {reason}")
    found = answer_after(response, prefix)
    if found is None:
        return None
    if task in EVALUATED_ARITHMETIC and not _ARITHMETIC.fullmatch(found):
        return 0.0
    from reasoning_gym import get_score_answer_fn  # 1 s: only workers that use it pay for it

    return float(get_score_answer_fn(task)(found, json.loads(prompt.tags[ENTRY_TAG])))
