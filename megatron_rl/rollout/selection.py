"""From groups to what the trainer is given: which tokens carry loss, how old the oldest of them is.

Pure functions. Which groups make a batch is decided in `scheduler.py`; how sequences are packed, in `training/packing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.algorithms.normalization import Normalization, sequence_weights
from megatron_rl.types import Group, TrainingSequence, Trajectory


def training_sequences(
    groups: Sequence[Group],
    advantages: Sequence[float],
    *,
    loss_segments: str,
    weight_version: int,
    normalization: Normalization = Normalization.SEQUENCE,
    max_tokens: int = 1,
) -> list[TrainingSequence]:
    """`groups` of one optimizer step, with one advantage a living member, in order.

    By default each group counts the same, and each member of it: weight = 1 / (members * groups) (paper 2.3.2, eq. 3).
    `max_tokens`: the longest response allowed, for `constant` only."""
    members = [(group, trajectory) for group in groups for trajectory in group.trajectories]
    masks = [loss_mask(trajectory, loss_segments, weight_version) for _, trajectory in members]
    counts = iter([int(mask.sum()) for mask in masks])
    num_tokens = [[next(counts) for _ in group.trajectories] for group in groups]
    weights = sequence_weights(num_tokens, normalization, max_tokens=max_tokens)
    return [
        TrainingSequence(
            group_id=group.id,
            trajectory_id=trajectory.id,
            prompt_ids=group.prompt.token_ids,
            response_ids=trajectory.token_ids,
            loss_mask=mask,
            behaviour_log_probs=trajectory.log_probs,
            weight_versions=trajectory.weight_versions,
            advantage=float(advantage),
            weight=weight,
            temperatures=trajectory.temperatures,
        )
        for (group, trajectory), mask, advantage, weight in zip(members, masks, advantages, weights, strict=True)
    ]


def with_advantage(sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    """Those whose advantage is not 0; where there is none, the shortest one, for a step needs a sequence.

    Weights stay: the loss's denominator counts those left out. Exact where `algorithms/silence.py` holds and
    the step is the only one of its iteration."""
    found = [s for s in sequences if s.advantage != 0 and s.loss_mask.any()]
    bearing = [s for s in sequences if s.loss_mask.any()]
    return found or sorted(bearing, key=lambda s: len(s.prompt_ids) + len(s.response_ids))[:1]


def share_without_loss(sequences: Sequence[TrainingSequence]) -> float:
    """Share of the sequences in which every token is masked; what `loss_segments: current` is warned of."""
    return sum(not s.loss_mask.any() for s in sequences) / len(sequences) if sequences else 0.0


def loss_mask(trajectory: Trajectory, loss_segments: str, weight_version: int) -> np.ndarray:
    """bool [tokens]: `all`, `last` (the tokens of its last phase) or `current` (those of `weight_version`), without a
    tool's tokens."""
    masks = {
        "all": lambda: np.ones(trajectory.num_tokens, np.bool_),
        "last": lambda: _phases(trajectory) == _phases(trajectory)[-1:],
        "current": lambda: trajectory.weight_versions == weight_version,
    }
    return masks[loss_segments]() & trajectory.from_policy


def oldest_loss_version(group: Group, loss_segments: str, weight_version: int) -> int | None:
    """Weight version of the oldest token that carries loss; None where no token does."""
    versions = [t.weight_versions[loss_mask(t, loss_segments, weight_version)] for t in group.trajectories]
    return min((int(v.min()) for v in versions if len(v)), default=None)


def _phases(trajectory: Trajectory) -> np.ndarray:
    """int [tokens]: the iteration each was generated in. A segment cut by a kill goes on in a second row of its iteration."""
    parts = [np.full(len(s.token_ids), s.iteration) for s in trajectory.segments]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
