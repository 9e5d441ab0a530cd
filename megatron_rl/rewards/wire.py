"""What a scoring worker and the process that owns it say to each other.

To the worker: `Setup` once, then `Call`s, pickled, each after its length. From the worker: one JSON line a message,
a `Reply`; the first one says that the set-up is done. JSON because the far end runs code we do not know.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import IO, Any

from megatron_rl.types import OutcomeKind, Prompt

LENGTH_BYTES = 8


class Cause(StrEnum):
    """Why a call failed."""

    DEADLINE = "deadline"  # rewards.timeout_s of CPU time, or its wall-clock backstop
    CRASH = "crash"  # the worker ended: sys.exit, abort, a signal
    EXCEPTION = "exception"  # the term raised, MemoryError included
    NOT_A_NUMBER = "not_a_number"  # NaN, infinite, or of another type
    REPORTED = "reported"  # the term itself returned a failed Outcome
    UNUSABLE = "unusable"  # the term cannot be loaded or does not fit the data: the user's to repair, never retried


@dataclass(frozen=True)
class TermSpec:
    name: str  # of `terms.REWARDS`, or a dotted path
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Setup:
    terms: Mapping[str, TermSpec]  # by label
    memory_bytes: int


@dataclass(frozen=True)
class Call:
    """Score one response by one term. A label that the set-up does not know is a term name without options."""

    label: str
    prompt: Prompt
    response: str
    cpu_s: float


@dataclass(frozen=True)
class Reply:
    kind: OutcomeKind
    value: float = 0.0
    cause: Cause | None = None  # only of failures
    detail: str = ""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> Reply:
        raw = json.loads(line)
        cause = None if raw["cause"] is None else Cause(raw["cause"])
        return cls(OutcomeKind(raw["kind"]), float(raw["value"]), cause, str(raw["detail"]))


def failed(cause: Cause, detail: str) -> Reply:
    return Reply(OutcomeKind.FAILED, cause=cause, detail=detail)


def send(pipe: IO[bytes], message: Setup | Call) -> None:
    body = pickle.dumps(message)
    pipe.write(len(body).to_bytes(LENGTH_BYTES, "big") + body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Setup | Call | None:
    """The next message; None at the end of the stream."""
    head = pipe.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return pickle.loads(pipe.read(int.from_bytes(head, "big")))
