"""A record is one question as a file or a generator gives it, checked field by field, not yet a prompt.

Fields: `prompt` (text) or `messages` (a list of {role, content}), `answer`, and optionally `verifier`, `tags`
(text to text) and `difficulty` (pass rate of the unaided model, 0 to 1). Other fields are left alone.
Refuses a record that lacks a field or holds one of the wrong type, naming place, field and value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.errors import DataError, RewardError
from megatron_rl.rewards.terms import check_name
from megatron_rl.types import Message

FIELDS = frozenset({"prompt", "messages", "answer", "verifier", "tags", "difficulty"})
ROLES = ("system", "user", "assistant")

Where = Callable[[str], str]  # field -> its place for messages, e.g. "questions.jsonl, line 3, column 17"


@dataclass(frozen=True)
class Record:
    where: str  # for messages
    messages: tuple[Message, ...]
    answer: str
    verifier: str | None  # None: data.verifier
    tags: Mapping[str, str] = field(default_factory=dict)
    difficulty: float | None = None

    @property
    def text(self) -> str:
        """What tells one record from another: all messages with their roles."""
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages)

    @property
    def question(self) -> str:
        """What the user says; records that share it are never split between training and held-out."""
        return "\n".join(message.content for message in self.messages if message.role == "user")


def parse_record(raw: object, where: Where) -> Record:
    """Raises DataError naming the place of the first field that is wrong, what was found, and what belongs there."""
    if not isinstance(raw, dict):
        raise DataError(f"{where('')}: found {shown(raw)}; a question is an object with `prompt` and `answer`")
    return Record(
        where=where(""),
        messages=_messages(raw, where),
        answer=_answer(raw, where),
        verifier=_verifier(raw, where),
        tags=_tags(raw, where),
        difficulty=_difficulty(raw, where),
    )


def _messages(raw: Mapping[str, Any], where: Where) -> tuple[Message, ...]:
    if raw.get("prompt") is not None and raw.get("messages") is not None:
        raise DataError(f"{where('messages')}: both `prompt` and `messages` are given; keep one")
    if raw.get("messages") is None:
        text = raw.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where('prompt')}: `prompt` is {found(raw, 'prompt')}; give the question as text, or `messages`")
        return (Message("user", text),)
    messages = message_list(raw["messages"], where)
    if messages[-1].role != "user":
        raise DataError(f"{where('messages')}: the last of `messages` is of role {messages[-1].role}; it must be the user's")
    return messages


def message_list(messages: object, where: Where) -> tuple[Message, ...]:
    """At least one message, each with a role and a text. Raises DataError."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where('messages')}: `messages` is {shown(messages)}; give a list of {{role, content}}")
    for message in messages:
        is_message = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not is_message:
            raise DataError(
                f"{where('messages')}: `messages` holds {shown(message)}; each is an object with role "
                f"({', '.join(ROLES)}) and content (text)"
            )
    return tuple(Message(message["role"], message["content"]) for message in messages)


def _answer(raw: Mapping[str, Any], where: Where) -> str:
    answer = raw.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str):
        raise DataError(f"{where('answer')}: `answer` is {found(raw, 'answer')}; give the reference answer as text")
    return answer


def _verifier(raw: Mapping[str, Any], where: Where) -> str | None:
    verifier = raw.get("verifier")
    if verifier is None:
        return None
    if not isinstance(verifier, str):
        raise DataError(f"{where('verifier')}: `verifier` is {shown(verifier)}; give the name of a reward term")
    try:
        check_name(verifier)
    except RewardError as e:
        raise DataError(f"{where('verifier')}: {e}") from e
    return verifier


def _tags(raw: Mapping[str, Any], where: Where) -> Mapping[str, str]:
    tags = raw.get("tags")
    if tags is None:
        return {}
    if not isinstance(tags, dict) or not all(isinstance(value, str) for value in tags.values()):
        raise DataError(f"{where('tags')}: `tags` is {shown(tags)}; give an object whose values are text")
    return tags


def _difficulty(raw: Mapping[str, Any], where: Where) -> float | None:
    difficulty = raw.get("difficulty")
    if difficulty is None:
        return None
    is_number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool)
    if not is_number or not 0 <= difficulty <= 1:
        raise DataError(
            f"{where('difficulty')}: `difficulty` is {shown(difficulty)}; give the unaided model's pass rate, from 0 to 1"
        )
    return float(difficulty)


def found(raw: Mapping[str, Any], name: str) -> str:
    return shown(raw[name]) if name in raw else "missing"


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
