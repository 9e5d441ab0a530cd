"""The training loop in a fork of the zygote, killed or told to stop at a point of its work.

A kill point sends this very process SIGKILL, so nothing of ours gets a chance to clean up.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_rl import config as configuration
from megatron_rl import loop, run
from megatron_rl.interval_evaluation import IntervalEvaluation
from megatron_rl.master import Master
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.training import checkpoint, log_probs
from megatron_rl.training.trainer import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_in(owner: Any, name: str, *, call: int, after: bool = False, end: Callable[[], None] = die) -> None:
    """Die, or be told to stop, at the `call`-th call of owner.name, before or after its work."""
    original = getattr(owner, name)
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not after:
            end()
        result = original(*args, **kwargs)
        if count == call and after:
            end()
        return result

    setattr(owner, name, wrapped)


def kill_in_publish() -> None:
    """Die after the first bucket of the third publish (the first one is the start's)."""
    original = Trainer.export_buckets
    count = 0

    def export_buckets(self: Trainer, bucket_bytes: int) -> Any:
        nonlocal count
        count += 1
        for bucket in original(self, bucket_bytes):
            yield bucket
            if count == 3:
                die()

    Trainer.export_buckets = export_buckets  # type: ignore[method-assign]


def poison(iteration: int) -> None:
    """One trajectory of the iteration's batch gets an advantage that is not a number."""
    original = Master.sequences

    def sequences(self: Master, groups: Any, now: int, version: int) -> Any:
        steps = original(self, groups, now, version)
        if now == iteration:
            first = next(i for i, s in enumerate(steps[0]) if s.loss_mask.any() and not s.is_supervised)
            steps[0][first] = replace(steps[0][first], advantage=float("nan"))
        return steps

    Master.sequences = sequences  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {
    "generating": lambda: kill_in(ReplayBuffer, "append_chunk", call=60),
    "told to stop while generating": lambda: kill_in(ReplayBuffer, "append_chunk", call=80, end=stop),
    "told to stop while training": lambda: kill_in(Trainer, "step", call=2, end=stop),
    "told to stop while evaluating": lambda: kill_in(IntervalEvaluation, "_scores", call=4, end=stop),
    "scoring": lambda: kill_in(Scorer, "score", call=12),
    "reference": lambda: kill_in(Trainer, "log_probs", call=2),
    "in_backward": lambda: kill_in(log_probs._ChunkedLogProbs, "backward", call=5),
    "after_optimizer_step": lambda: kill_in(Trainer, "step", call=2, after=True),
    "publish": kill_in_publish,
    "checkpoint_write": lambda: kill_in(checkpoint.sharded, "save", call=1, after=True),
    "a loss that is not finite": lambda: poison(4),
    "after_rename": lambda: kill_in(run.Run, "save", call=1, after=True),
}


def train(config: str, overrides: list[str], kill: str | None) -> int:
    logging.basicConfig(level=logging.INFO)
    if kill:
        POINTS[kill]()
    return loop.train(configuration.load(config, overrides))
