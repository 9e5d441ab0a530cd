"""The nouns of megatron_rl: prompt, segment, trajectory, group, and what the trainer is given.

Frozen facts over numpy arrays, with views and no behaviour. Token ids are int32, log-probs float32; arrays are
one-dimensional unless their comment says otherwise. Where they are stored: `rollout/buffer.py`. How they become
micro-batches: `training/packing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np


class Ending(StrEnum):
    """Why a segment ended. `stop`, `length` and `repeat` also end the trajectory."""

    STOP = "stop"  # the model emitted a stop token
    LENGTH = "length"  # the response, the context or `max_segments` is used up
    BUDGET = "budget"  # the iteration's token budget is spent; continued in a later iteration
    REPEAT = "repeat"  # the repetition detector fired
    ABORT = "abort"  # the phase ended, or the process died, while it was running; continued later

    @property
    def ends_trajectory(self) -> bool:
        return self in (Ending.STOP, Ending.LENGTH, Ending.REPEAT)


class DropReason(StrEnum):
    """Why a trajectory left the buffer untrained."""

    STALE = "stale"  # its group holds a token older than `rollout.max_staleness`
    REWARD = "reward"  # its reward failed twice
    GROUP = "group"  # its group was left with fewer than two scored members


@dataclass(frozen=True)
class Message:
    role: str  # system, user, assistant
    content: str


@dataclass(frozen=True)
class Prompt:
    """One problem. `id` is a stable hash of its text, so that it means the same in every run and split."""

    id: str
    messages: tuple[Message, ...]
    token_ids: np.ndarray  # int32 [prompt_tokens], chat template applied, generation prompt included
    answer: str  # the reference answer, in whatever form its verifier reads
    verifier: str  # name of a reward term in `rewards/`
    tags: Mapping[str, str] = field(default_factory=dict)
    difficulty: float | None = None  # pass rate of the unaided model, lower is harder (paper 2.1)


@dataclass(frozen=True)
class Segment:
    """The tokens of a trajectory generated in one rollout phase under one weight version."""

    iteration: int
    weight_version: int
    lineage: int  # +1 at each resume whose replay is not bit-exact
    temperature: float
    engine: str
    ending: Ending
    token_ids: np.ndarray  # int32 [tokens]
    log_probs: np.ndarray  # float32 [tokens], the engine's, at `temperature`
    kv_versions: np.ndarray  # int32 [tokens], weight version of the KV each token was sampled on
    from_policy: np.ndarray  # bool [tokens], False for tool tokens, which carry no loss


class OutcomeKind(StrEnum):
    VALUE = "value"
    WRONG_FORMAT = "wrong_format"  # a verifier found no answer: reward 0
    FAILED = "failed"  # our failure (deadline, crash, NaN): never a reward


@dataclass(frozen=True)
class Outcome:
    """What scoring said of one response."""

    kind: OutcomeKind
    reward: float  # weighted sum of the terms; 0.0 when failed
    correct: bool  # True only at a full score
    terms: Mapping[str, float] = field(default_factory=dict)  # each term's own value, before its weight
    detail: str = ""  # for failures: which term, and why


@dataclass(frozen=True)
class Trajectory:
    """One response to a prompt: segments in order. `id` is `group_id * group_size + index in the group`."""

    id: int
    group_id: int
    segments: tuple[Segment, ...]
    outcome: Outcome | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.segments)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [tokens]"""
        return _joined([s.token_ids for s in self.segments], np.int32)

    @property
    def log_probs(self) -> np.ndarray:
        """float32 [tokens]: the engines' log-probs"""
        return _joined([s.log_probs for s in self.segments], np.float32)

    @property
    def weight_versions(self) -> np.ndarray:
        """int32 [tokens]"""
        return _joined([np.full(len(s.token_ids), s.weight_version, np.int32) for s in self.segments], np.int32)

    @property
    def temperatures(self) -> np.ndarray:
        """float32 [tokens]: the sampling temperature of each one's segment"""
        return _joined([np.full(len(s.token_ids), s.temperature, np.float32) for s in self.segments], np.float32)

    @property
    def from_policy(self) -> np.ndarray:
        """bool [tokens]"""
        return _joined([s.from_policy for s in self.segments], np.bool_)

    @property
    def ending(self) -> Ending | None:
        """Of its last segment; None before the first."""
        return self.segments[-1].ending if self.segments else None


@dataclass(frozen=True)
class Group:
    """The trajectories of one prompt that are trained together (dropped members left out)."""

    id: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class TrainingSequence:
    """One trajectory as the trainer needs it. Trajectories of one group share `prompt_ids`."""

    group_id: int
    trajectory_id: int
    prompt_ids: np.ndarray  # int32 [prompt_tokens]
    response_ids: np.ndarray  # int32 [tokens]
    loss_mask: np.ndarray  # bool [tokens]; masked tokens stay in the context but leave the loss and the log-ratio
    behaviour_log_probs: np.ndarray  # float32 [tokens], the engine's
    weight_versions: np.ndarray  # int32 [tokens]
    advantage: float  # computed over the whole group, before packing
    weight: float  # 1 / (members of its group * groups of its optimizer step): the loss denominator is global
    temperatures: np.ndarray | None = None  # float32 [tokens]: of the softmax that each was drawn from; None: 1
    is_supervised: bool = False  # given, not sampled: cross entropy, and no part in advantages or mismatch

    def weighing(self, weight: float) -> TrainingSequence:
        return replace(self, weight=weight)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
