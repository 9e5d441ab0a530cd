"""From `data.*` to prompts: read or generate the questions, drop repeats, hold some out, apply the chat template.

The held-out prompts are those whose question hashes lowest, so the split is the same in every run and on every machine
and no held-out question is ever drawn in training, under whatever wording of system message or worked turns.
Refuses prompts longer than `data.max_prompt_tokens`, equal questions with different answers, and blank answers that responses
would be compared with. Next: `samplers.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_rl.config import DataConfig
from megatron_rl.data.huggingface import read_huggingface
from megatron_rl.data.jsonl import read_jsonl
from megatron_rl.data.reasoning_gym import generate
from megatron_rl.data.records import Record
from megatron_rl.errors import DataError, RewardError
from megatron_rl.rewards.terms import check_name
from megatron_rl.types import Message, Prompt

log = logging.getLogger(__name__)


COMPARING = frozenset({"exact", "math"})  # terms to which a response can be right only if there is a reference answer


class Encoder(Protocol):
    """What this module needs of `ChatTokenizer`."""

    def encode_chat(self, messages: tuple[Message, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class PromptSet:
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]  # never drawn in training


def load_prompts(config: DataConfig, tokenizer: Encoder, *, terms: Sequence[str] = ()) -> PromptSet:
    """Both splits, in the source's order. terms: names of the terms that score instead of each prompt's own verifier.

    Raises DataError naming the file, line or question that cannot be used."""
    try:
        check_name(config.verifier)
    except RewardError as e:
        raise DataError(f"data.verifier: {e}") from e
    records = _without_repeats(_read(config))
    _check_answers(records, config.verifier, terms)
    held_out = _held_out(records, config)
    prompts = [(_prompt(record, config, tokenizer), record.question in held_out) for record in records]
    return PromptSet(
        train=tuple(prompt for prompt, is_held_out in prompts if not is_held_out),
        held_out=tuple(prompt for prompt, is_held_out in prompts if is_held_out),
    )


def _check_answers(records: Sequence[Record], verifier: str, terms: Sequence[str]) -> None:
    blank = [r for r in records if not r.answer.strip() and COMPARING & set(terms or [r.verifier or verifier])]
    if blank:
        compares = ", ".join(sorted(COMPARING & set(terms or [blank[0].verifier or verifier])))
        raise DataError(
            f"{blank[0].where}: `answer` is blank, and {compares} compares every response with it ({len(blank)} of "
            f"{len(records)} questions are so); fill it in, or score by a term that needs none (data.verifier, rewards.terms)"
        )


def _held_out(records: list[Record], config: DataConfig) -> set[str]:
    """The questions with the lowest hashes, as many as `held_out` prompts need."""
    counts = Counter(record.question for record in records)
    chosen: set[str] = set()
    num_prompts = 0
    for question in sorted(counts, key=lambda text: _hash(f"{config.seed}\n{text}")):
        if num_prompts >= config.held_out:
            return chosen
        chosen.add(question)
        num_prompts += counts[question]
    raise DataError(
        f"data.held_out={config.held_out}: there are only {len(records)} different prompts, so none would be left to train "
        "on; lower it or bring more questions"
    )


def _read(config: DataConfig) -> list[Record]:
    if config.source == "reasoning_gym":
        return generate(config)
    assert config.path is not None, "config.load refuses these sources without data.path"
    return read_jsonl(config.path) if config.source == "jsonl" else read_huggingface(config.path)


def _without_repeats(records: list[Record]) -> list[Record]:
    first: dict[str, Record] = {}
    for record in records:
        earlier = first.setdefault(record.text, record)
        if (earlier.answer, earlier.verifier) != (record.answer, record.verifier) and not _is_generated(record):
            raise DataError(
                f"{record.where}: the same question as {earlier.where}, with another answer or verifier "
                f"({record.answer!r}, there {earlier.answer!r}); keep one of the two"
            )
    if len(first) < len(records):
        log.info("%d questions of %d are different; repeats are left out", len(first), len(records))
    return list(first.values())


def _is_generated(record: Record) -> bool:
    """A task's own scorer accepts every right answer, so one question may come with several."""
    return record.verifier == "reasoning_gym"


def _prompt(record: Record, config: DataConfig, tokenizer: Encoder) -> Prompt:
    messages = _with_opening(record, config)
    try:
        token_ids = tokenizer.encode_chat(messages)
    except DataError as e:
        raise DataError(f"{record.where}: {e}") from e
    if len(token_ids) > config.max_prompt_tokens:
        raise DataError(
            f"{record.where}: the prompt has {len(token_ids)} tokens, more than data.max_prompt_tokens="
            f"{config.max_prompt_tokens} (it begins {record.messages[-1].content[:40]!r}); raise the limit or shorten it"
        )
    return Prompt(
        id=_hash(json.dumps([record.tags.get("reasoning_gym.task"), record.text]))[:16],
        messages=messages,
        token_ids=token_ids,
        answer=record.answer,
        verifier=record.verifier or config.verifier,
        tags=record.tags,
        difficulty=record.difficulty,
    )


def _with_opening(record: Record, config: DataConfig) -> tuple[Message, ...]:
    """The system message and the worked turns, then the question's own messages."""
    own = record.messages
    system: tuple[Message, ...] = ()
    if config.system_message is not None:
        system = (Message("system", config.system_message),)
    if own[0].role == "system":
        if system:
            raise DataError(f"{record.where}: it brings its own system message; unset data.system_message, or remove that one")
        system, own = own[:1], own[1:]
    worked = [(Message("user", turn.question), Message("assistant", turn.answer)) for turn in config.worked_turns]
    return (*system, *(message for turn in worked for message in turn), *own)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
