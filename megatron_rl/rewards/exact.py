"""Reward term `exact`: the answer in the response equals the reference answer, up to whitespace and letter case.

`answer_after` is the one rule by which terms find an answer in a response. Next: `regex.py`, `math.py`.
"""

from __future__ import annotations

import unicodedata

from megatron_rl.types import Prompt


def answer_after(response: str, prefix: str | None) -> str | None:
    """The stripped text between the last `prefix` and the end of its line; without a prefix the whole stripped response.

    None when the prefix does not occur or nothing follows it: there is no answer to judge."""
    if prefix is None:
        return response.strip() or None
    before, found, after = response.rpartition(prefix)
    if not found:
        return None
    return after.partition("\n")[0].strip() or None


def normalised(text: str) -> str:
    """Composed Unicode, every run of whitespace one space, letter case folded."""
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def score(*, response: str, answer: str, prompt: Prompt, prefix: str | None = None) -> float | None:
    """1.0 or 0.0; None for a response without an answer. `prefix` is e.g. `Answer:`."""
    found = answer_after(response, prefix)
    return None if found is None else float(normalised(found) == normalised(answer))
