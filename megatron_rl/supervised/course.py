"""A course: all data of a supervised run as training sequences, and the steps that go through it. Rank 0 alone has it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.config import SupervisedConfig
from megatron_rl.data.conversations import Example
from megatron_rl.errors import DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.supervised.schedule import Step, plan_steps
from megatron_rl.types import TrainingSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """What is never separated: one conversation, or the two answers of a pair."""

    where: str  # file and line
    sequences: tuple[TrainingSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Of the longest sequence."""
        return max(len(s.prompt_ids) + len(s.response_ids) for s in self.sequences)


@dataclass(frozen=True)
class Course:
    items: tuple[Item, ...]
    steps: tuple[Step, ...]
    num_dropped: int  # examples longer than every stage's context
    denominator: Callable[[Sequence[Item]], float]  # of one step's loss

    def sequences(self, step: int) -> list[TrainingSequence]:
        """Of one optimizer step, their weights holding its denominator."""
        items = [self.items[i] for i in self.steps[step].items]
        weight = 1 / self.denominator(items)
        return [s.weighing(weight) for item in items for s in item.sequences]

    def places(self, trajectory_ids: Sequence[int]) -> list[str]:
        """File and line of each sequence."""
        wanted = set(trajectory_ids)
        return [item.where for item in self.items if any(s.trajectory_id in wanted for s in item.sequences)]

    @property
    def facts(self) -> dict[str, int]:
        return {"steps": len(self.steps), "examples": len(self.items), "dropped": self.num_dropped}

    @property
    def digest(self) -> str:
        """Of tokens and masks, in order: whether a resumed run reads what it read before."""
        return digest(s for item in self.items for s in item.sequences)


def make_course(
    config: SupervisedConfig,
    model: ModelConfig,
    items: Sequence[Item],
    *,
    too_long: str,
    sizes: Callable[[Item], int],
    batch_size: int,
    denominator: Callable[[Sequence[Item]], float],
) -> Course:
    """Raises DataError for an example that no stage's context holds, where `too_long` says so, and where none is left."""
    contexts = [stage.context_tokens or model.max_positions for stage in config.stages]
    long = [item for item in items if item.num_tokens > max(contexts)]
    if long and too_long == "error":
        raise DataError(
            f"{long[0].where}: {long[0].num_tokens} tokens, more than the longest context of {max(contexts)}; {len(long)} of "
            f"{len(items)} examples are too long; raise context_tokens, shorten them, or set too_long=drop"
        )
    kept = tuple(item for item in items if item.num_tokens <= max(contexts))
    if not kept:
        raise DataError(f"nothing is left to train on: all {len(items)} examples are longer than {max(contexts)} tokens")
    if long:
        log.warning("too_long=drop: %d of %d examples are longer than %d tokens", len(long), len(items), max(contexts))
    steps = plan_steps(
        [item.num_tokens for item in kept],
        [sizes(item) for item in kept],
        config.stages,
        contexts=contexts,
        batch_size=batch_size,
        seed=config.run.seed,
    )
    return Course(kept, tuple(steps), len(long), denominator)


def digest(sequences: Iterable[TrainingSequence]) -> str:
    """Of their tokens and masks, in order."""
    found = hashlib.sha256()
    for s in sequences:
        for array in (s.prompt_ids, s.response_ids, s.loss_mask):
            found.update(len(array).to_bytes(8, "little") + array.tobytes())
    return found.hexdigest()


def sequence(example: Example, *, group_id: int, trajectory_id: int, advantage: float, is_supervised: bool) -> TrainingSequence:
    """Without a weight yet. What comes before the first loss-bearing token is the prompt."""
    first = len(example.prompt_ids)
    num_tokens = len(example.token_ids) - first
    return TrainingSequence(
        group_id=group_id,
        trajectory_id=trajectory_id,
        prompt_ids=example.prompt_ids,
        response_ids=example.token_ids[first:],
        loss_mask=example.loss_mask[first:],
        behaviour_log_probs=np.zeros(num_tokens, np.float32),
        weight_versions=np.zeros(num_tokens, np.int32),
        advantage=advantage,
        weight=0.0,
        is_supervised=is_supervised,
    )
