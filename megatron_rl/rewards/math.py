"""Reward term `math`: the response's final expression equals the reference answer mathematically (math-verify).

Reads `\\boxed{...}`, LaTeX in dollars, and plain numbers. Its run time has no bound of its own (`9^{9^{9^9}}`): inside a
run the deadlines of `scorer.py` are the bound, which is why math-verify's own, made of signals, are off here.
Departure from math-verify: it joins boxes that stand close together into a set, which would call a response wrong that
corrects itself; here the last box alone is the answer.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_rl.rewards.exact import normalised
from megatron_rl.types import Prompt

IN_LATEX = ("$", "\\boxed", "\\(", "\\[")


def verify(response: str, answer: str) -> bool:
    """Whether the response's last expression equals `answer`, a number or LaTeX with or without dollars.

    False for a response without an expression. Raises nothing, whatever the text; may take any time, see above."""
    return bool(score(response=response, answer=answer))


def score(*, response: str, answer: str, prompt: Prompt | None = None) -> float | None:
    """1.0 or 0.0; None for a response in which there is no expression."""
    if response.strip() and normalised(response) == normalised(answer):
        return 1.0
    found = _expressions(response[max(0, response.rfind("\\boxed")) :])
    if not found:
        return None
    reference = answer if any(mark in answer for mark in IN_LATEX) else f"\\boxed{{{answer}}}"
    return float(_math_verify().verify(_expressions(reference), found, timeout_seconds=None))


def _expressions(text: str) -> list[Any]:
    return _math_verify().parse(text, parsing_timeout=None)


def _math_verify() -> Any:
    """Imported at first use: it costs 0.4 s, and workers that never judge mathematics start without it."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its signals are off
    return math_verify
