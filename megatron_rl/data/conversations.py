"""What supervised training reads: conversations, and pairs of answers, from JSONL files, as token ids with a loss mask.

A conversation is `messages` that end with the assistant's, or `prompt` and `response`; a pair is `messages` that end with the
user's, or `prompt`, with `chosen` and `rejected`. Loss lies on the assistant's tokens (`tokenizer.encode_conversation`); of a
pair, on the tokens of its two answers. Refuses a line that lacks a field, with file, line and column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.data.jsonl import read_objects
from megatron_rl.data.records import Where, found, message_list, shown
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.types import Message


@dataclass(frozen=True)
class Example:
    """One conversation. Its first token never bears loss: nothing predicts it."""

    where: str  # file and line, for messages
    token_ids: np.ndarray  # int32 [tokens]
    loss_mask: np.ndarray  # bool [tokens]

    @property
    def prompt_ids(self) -> np.ndarray:
        """Tokens before the first that bears loss."""
        return self.token_ids[: int(np.argmax(self.loss_mask))]


@dataclass(frozen=True)
class Pair:
    chosen: Example
    rejected: Example  # begins with the same prompt


def read_conversations(path: Path, tokenizer: ChatTokenizer, setting: str) -> list[Example]:
    """Raises DataError for a file that cannot be read, is empty, or has a line that is no conversation."""
    examples = [
        _example(_conversation(_object(raw, where), where), tokenizer, where) for raw, where in read_objects(path, setting)
    ]
    if not examples:
        raise DataError(f"{setting}={path}: there is no conversation in it; write one JSON object a line")
    return examples


def read_pairs(path: Path, tokenizer: ChatTokenizer, setting: str) -> list[Pair]:
    """Raises DataError for a file that cannot be read, is empty, or has a line that is no pair."""
    pairs = []
    for raw, where in read_objects(path, setting):
        line = _object(raw, where)
        opening = _question(line, where)
        chosen, rejected = (
            _example((*opening, Message("assistant", _text(line, name, where))), tokenizer, where, last_only=True)
            for name in ("chosen", "rejected")
        )
        if not np.array_equal(chosen.prompt_ids, rejected.prompt_ids):
            raise DataError(f"{where('')}: the prompt's tokens before `chosen` and `rejected` differ; correct the chat template")
        pairs.append(Pair(chosen, rejected))
    if not pairs:
        raise DataError(f"{setting}={path}: there is no pair in it; write one JSON object a line")
    return pairs


def _example(messages: tuple[Message, ...], tokenizer: ChatTokenizer, where: Where, *, last_only: bool = False) -> Example:
    try:
        ids, mask = tokenizer.encode_conversation(messages)
    except DataError as e:
        raise DataError(f"{where('')}: {e}") from e
    if last_only:  # answers to earlier questions are given, not judged
        earlier = np.flatnonzero(~mask)
        last = np.flatnonzero(mask)[-1] if mask.any() else 0
        mask = mask.copy()
        mask[: int(earlier[earlier < last].max(initial=-1)) + 1] = False
    mask[:1] = False
    if not mask.any():
        raise DataError(f"{where('')}: no token is the assistant's by the chat template; correct its generation marks")
    return Example(where(""), ids, mask)


def _object(raw: object, where: Where) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise DataError(f"{where('')}: found {shown(raw)}; a line is an object")
    return raw


def _conversation(line: Mapping[str, Any], where: Where) -> tuple[Message, ...]:
    if line.get("messages") is None:
        question, answer = _text(line, "prompt", where), _text(line, "response", where)
        return (Message("user", question), Message("assistant", answer))
    messages = message_list(line["messages"], where)
    if messages[-1].role != "assistant":
        raise DataError(f"{where('messages')}: the last of `messages` is of role {messages[-1].role}; it must be the assistant's")
    return messages


def _question(line: Mapping[str, Any], where: Where) -> tuple[Message, ...]:
    if line.get("messages") is None:
        return (Message("user", _text(line, "prompt", where)),)
    messages = message_list(line["messages"], where)
    if messages[-1].role != "user":
        raise DataError(f"{where('messages')}: the last of `messages` is of role {messages[-1].role}; it must be the user's")
    return messages


def _text(line: Mapping[str, Any], name: str, where: Where) -> str:
    text = line.get(name)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where(name)}: `{name}` is {found(line, name)}; give it as text")
    return text
