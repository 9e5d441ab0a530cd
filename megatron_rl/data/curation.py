"""Which prompts are fit for RL (paper 2.1): the rules, as pure functions. Who applies them: `megatron_rl/curate.py`.

Dropped are repeats, answers that can be guessed from their kind (multiple choice, true or false, proofs), prompts whose answer a
model hits without reasoning, and prompts it always solves. The pass rate becomes the prompt's difficulty.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from enum import StrEnum

from megatron_rl.rewards.exact import normalised
from megatron_rl.types import Message, Prompt

ANSWER_ONLY = "Give only the final answer, without any reasoning."


class Verdict(StrEnum):
    KEPT = "kept"
    REPEAT = "repeat"
    MULTIPLE_CHOICE = "multiple_choice"
    TRUE_FALSE = "true_false"
    PROOF = "proof"
    EASY_TO_HACK = "easy_to_hack"
    TOO_EASY = "too_easy"
    TOO_HARD = "too_hard"


_OPTION = re.compile(r"(?:^|\s)\(?([A-E])[).:]\s", re.MULTILINE)
_CHOSEN = re.compile(r"(?:option |choice )?\(?[a-e](?:[).:].*)?")  # of a normalised answer: a letter, perhaps its wording
_PROOF = re.compile(r"\b(?:prove|show) that\b|^prove\b", re.IGNORECASE)
_BINARY = {"true", "false", "yes", "no"}


def question(prompt: Prompt) -> str:
    """What the user asks last."""
    return prompt.messages[-1].content


def guessable(prompt: Prompt) -> Verdict | None:
    """The kind of a prompt whose answer can be guessed or cannot be checked; None for all others."""
    answer, text = normalised(prompt.answer), question(prompt)
    if _is_choice(answer, text):
        return Verdict.MULTIPLE_CHOICE
    if answer.rstrip(".") in _BINARY:
        return Verdict.TRUE_FALSE
    return Verdict.PROOF if _PROOF.search(text) else None


def _is_choice(answer: str, text: str) -> bool:
    """Whether the text lists options, and the answer is the letter or the wording of one."""
    _, *parts = _OPTION.split(text)  # letter, what stands behind it, letter, ...
    wordings = {normalised(wording).rstrip(".,;?") for wording in parts[1::2]}
    return len(set(parts[0::2])) >= 2 and (bool(_CHOSEN.fullmatch(answer)) or answer.rstrip(".") in wordings)


def answer_kind(answer: str) -> str:
    """For the tag `answer_kind`."""
    text = answer.strip().strip("$")
    if re.fullmatch(r"[-+]?[\d,]+", text):
        return "integer"
    if re.fullmatch(r"[-+]?[\d,]*\.\d+|[-+]?\d+/\d+", text):
        return "number"
    return "expression" if re.search(r"[\\^=+*/()]|\d", text) else "text"


def repeat_key(prompt: Prompt) -> str:
    """Equal for questions that differ only in case, spacing, punctuation or Unicode form."""
    text = unicodedata.normalize("NFKC", question(prompt)).casefold()
    operators = "+-*/^=<>%.,"  # between digits they are the question
    kept = [c if c.isalnum() or c in operators else " " for c in text]
    return " ".join(word.strip(".,") for word in "".join(kept).split() if word.strip(".,"))


def without_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation of the easy-to-hack test: the same question, the answer alone asked for."""
    last = messages[-1]
    return (*messages[:-1], Message(last.role, f"{last.content}\n\n{ANSWER_ONLY}"))


def by_pass_rate(pass_rate: float, *, lowest: float, highest: float) -> Verdict:
    """Kept within the bounds, both included."""
    if pass_rate > highest:
        return Verdict.TOO_EASY
    return Verdict.TOO_HARD if pass_rate < lowest else Verdict.KEPT
