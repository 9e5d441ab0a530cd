"""What carries loss, and how old it is."""

from __future__ import annotations

import numpy as np
import pytest
from material import prompt

from megatron_rl.rollout.selection import loss_mask, oldest_loss_version, share_without_loss, training_sequences
from megatron_rl.types import Ending, Group, Segment, Trajectory


def segment(iteration: int, version: int, n: int, ending: Ending, tool: int = 0) -> Segment:
    """`n` tokens, the last `tool` of them a tool's."""
    from_policy = np.arange(n) < n - tool
    return Segment(
        iteration,
        version,
        0,
        1.0,
        "e",
        ending,
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.float32),
        np.full(n, version),
        from_policy,
    )


OLD = Trajectory(0, 0, (segment(0, 0, 2, Ending.BUDGET, tool=1), segment(3, 2, 3, Ending.ABORT), segment(3, 2, 1, Ending.STOP)))
CLOSED_LATER = Trajectory(1, 0, (segment(3, 2, 2, Ending.ABORT), segment(4, 3, 0, Ending.LENGTH)))
NEW = Trajectory(2, 0, (segment(4, 3, 2, Ending.STOP),))
GROUP = Group(0, prompt(0), (OLD, CLOSED_LATER, NEW))


@pytest.mark.parametrize(
    ("loss_segments", "masks", "oldest"),
    [
        ("all", ([1, 0, 1, 1, 1, 1], [1, 1], [1, 1]), 0),
        ("last", ([0, 0, 1, 1, 1, 1], [1, 1], [1, 1]), 2),
        ("current", ([0, 0, 0, 0, 0, 0], [0, 0], [1, 1]), 3),
    ],
)
def test_loss_segments_choose_the_tokens_that_carry_loss(loss_segments: str, masks: tuple, oldest: int):
    assert [loss_mask(t, loss_segments, 3).astype(int).tolist() for t in GROUP.trajectories] == list(masks)
    assert oldest_loss_version(GROUP, loss_segments, 3) == oldest
    sequences = training_sequences([GROUP], [0.5, -0.5, 0.0], loss_segments=loss_segments, weight_version=3)
    assert share_without_loss(sequences) == (2 / 3 if loss_segments == "current" else 0.0)
    assert sequences[0].weight_versions.tolist() == [0, 0, 2, 2, 2, 2]


def test_nothing_of_this_version_means_no_age():
    assert oldest_loss_version(GROUP, "current", 9) is None


def test_groups_and_their_members_weigh_the_same():
    other = Group(1, prompt(1), (NEW, NEW))
    sequences = training_sequences([GROUP, other], [1, 2, 3, 4, 5], loss_segments="all", weight_version=3)
    assert [s.weight for s in sequences] == [1 / 6] * 3 + [1 / 4] * 2
    assert [(s.group_id, s.advantage) for s in sequences] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]
    with pytest.raises(ValueError, match="shorter"):
        training_sequences([GROUP], [1.0], loss_segments="all", weight_version=3)
