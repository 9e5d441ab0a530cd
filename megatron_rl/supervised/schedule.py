"""Which items each optimizer step trains on, and at which learning rate. Pure functions of sizes, stages and a seed.

The whole course is known before the first step, so a resumed run goes on with the very step at which it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.config import StageConfig
from megatron_rl.errors import DataError


@dataclass(frozen=True)
class Step:
    stage: int
    epoch: int
    lr: float
    items: tuple[int, ...]


def plan_steps(
    lengths: Sequence[int],
    sizes: Sequence[int],
    stages: Sequence[StageConfig],
    *,
    contexts: Sequence[int],
    batch_size: int,
    seed: int,
) -> list[Step]:
    """The steps of all stages, in order.

    An item takes part in a stage whose context holds its length. Each epoch shuffles anew, and cuts what it has shuffled
    into batches of at most `batch_size`, counted in `sizes`; one larger item is a batch. Raises DataError for a stage
    without items."""
    steps = []
    for number, (stage, context) in enumerate(zip(stages, contexts, strict=True)):
        fitting = np.flatnonzero(np.asarray(lengths) <= context)
        if not len(fitting):
            raise DataError(
                f"stage {number + 1} of {len(stages)}: none of the {len(lengths)} examples fits its context of {context} tokens; "
                "raise context_tokens, or leave the stage out"
            )
        batches = [
            (epoch, batch)
            for epoch in range(stage.epochs)
            for batch in _batches(np.random.default_rng((seed, number, epoch)).permutation(fitting).tolist(), sizes, batch_size)
        ]
        for i, (epoch, batch) in enumerate(batches):
            steps.append(Step(number, epoch, learning_rate(stage, i, len(batches)), tuple(batch)))
    return steps


def learning_rate(stage: StageConfig, step: int, num_steps: int) -> float:
    """Of the stage's step `step` (from 0). Over the warm-up, round(warmup * num_steps) steps, linear: the first takes one such
    part of lr_start, the last all of it. Then half a cosine from lr_start to lr_end, which the stage's last step has; where a
    single step follows the warm-up, or makes the stage, it has lr_start."""
    warmup = round(stage.warmup * num_steps)
    if step < warmup:
        return stage.lr_start * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup - 1)
    return stage.lr_end + (stage.lr_start - stage.lr_end) * (1 + math.cos(math.pi * progress)) / 2


def _batches(order: Sequence[int], sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    filled = 0
    for item in order:
        if not batches or filled + sizes[item] > batch_size:
            batches.append([])
            filled = 0
        batches[-1].append(item)
        filled += sizes[item]
    return batches
