"""Prompts, configurations and buffer contents that several rollout tests share."""

from __future__ import annotations

import numpy as np

from megatron_rl.config import Config
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.types import Ending, Message, Outcome, OutcomeKind, Prompt


def prompt(i: int) -> Prompt:
    return Prompt(
        id=f"prompt-{i}",
        messages=(Message("system", "Answer."), Message("user", f"{i} ∪ ?")),
        token_ids=np.arange(3 + i % 4, dtype=np.int32),
        answer=str(i),
        verifier="exact",
        tags={"task": "sum"},
        difficulty=None if i % 2 else 0.25,
    )


def outcome(reward: float) -> Outcome:
    return Outcome(OutcomeKind.VALUE, reward, reward == 1.0, {"exact": reward})


def append(buffer: ReplayBuffer, segment: int, n: int, start: int = 0, version: int = 0) -> None:
    buffer.append_chunk(
        segment, np.arange(start, start + n, dtype=np.int32), np.full(n, -0.5, np.float32), np.full(n, version, np.int32)
    )


def finish(buffer: ReplayBuffer, trajectory_id: int, *, iteration: int = 0, n: int = 5, reward: float = 1.0) -> None:
    """One segment that ends the trajectory, and its score."""
    segment = buffer.open_segment(trajectory_id, iteration, iteration, 1.0, "engine-0")
    append(buffer, segment, n, version=iteration)
    buffer.close_segment(segment, Ending.STOP, made=n)
    buffer.set_outcome(trajectory_id, outcome(reward))


def config(**rollout: object) -> Config:
    """A small configuration; `rollout` overrides its section, `loss_segments` the algorithm's."""
    loss_segments = rollout.pop("loss_segments", "all")
    section = {
        "group_size": 2,
        "groups_per_iteration": 2,
        "token_budget": 10,
        "max_response_tokens": 40,
        "commit_tokens": 4,
        "repetition": {"enabled": False},
    }
    tree = {
        "run": {"folder": "unused", "iterations": 1},
        "model": {"folder": "unused"},
        "data": {"source": "reasoning_gym", "task": "none"},
        "algorithm": {"loss_segments": loss_segments},
        "rollout": {**section, **rollout},
    }
    return Config.model_validate(tree)
