"""The plan of a supervised run, against the definition of its stages."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config import StageConfig
from megatron_rl.errors import DataError
from megatron_rl.supervised.schedule import learning_rate, plan_steps

PAPER = (  # paper 2.5.2
    StageConfig(context_tokens=32768),
    StageConfig(context_tokens=131072, lr_start=1e-5, lr_end=1e-6),
)


def test_the_papers_two_stages_fall_by_a_cosine_and_warm_up_again():
    lengths = [1000] * 400 + [40000] * 20
    steps = plan_steps(lengths, [1] * 420, PAPER, contexts=[32768, 131072], batch_size=4, seed=0)
    first, second = [s for s in steps if s.stage == 0], [s for s in steps if s.stage == 1]
    assert (len(first), len(second)) == (100, 105)
    assert [s.lr for s in first[:3]] == pytest.approx([2e-5 / 3, 4e-5 / 3, 2e-5]) and first[-1].lr == pytest.approx(2e-6)
    assert second[0].lr == pytest.approx(1e-5 / 3) and max(s.lr for s in second) == 1e-5 and second[-1].lr == pytest.approx(1e-6)
    halfway = learning_rate(PAPER[0], 3 + 48, 100)
    assert halfway == pytest.approx(2e-6 + 1.8e-5 * (1 + math.cos(math.pi / 2)) / 2, rel=0.02)
    assert all(lengths[i] == 1000 for s in first for i in s.items), "longer examples wait for the second stage"
    assert {i for s in second for i in s.items} == set(range(420))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 60))
def test_every_epoch_goes_through_every_item_once_in_batches_within_the_size(sizes, epochs, batch_size):
    stages = [StageConfig(epochs=epochs)]
    steps = plan_steps(sizes, sizes, stages, contexts=[50], batch_size=batch_size, seed=7)
    assert steps == plan_steps(sizes, sizes, stages, contexts=[50], batch_size=batch_size, seed=7)
    seen = Counter((s.epoch, i) for s in steps for i in s.items)
    assert seen == Counter((e, i) for e in range(epochs) for i in range(len(sizes)))
    assert all(len(s.items) == 1 or sum(sizes[i] for i in s.items) <= batch_size for s in steps)
    assert all(0 < s.lr <= 2e-5 for s in steps)


def test_the_rate_falls_only_where_there_are_steps_to_fall_over():
    assert learning_rate(StageConfig(), 0, 1) == 2e-5, "one step makes the stage"
    assert [learning_rate(StageConfig(warmup=0.75), i, 4) for i in range(4)] == pytest.approx([2e-5 / 3, 4e-5 / 3, 2e-5, 2e-5])
    assert learning_rate(StageConfig(warmup=1), 3, 4) == 2e-5
    assert [learning_rate(StageConfig(), i, 2) for i in range(2)] == pytest.approx([2e-5, 2e-6])


def test_a_stage_for_which_nothing_is_short_enough_is_refused():
    with pytest.raises(DataError, match="stage 1 of 2: none of the 2 examples fits its context of 8 tokens"):
        plan_steps([9, 10], [9, 10], PAPER, contexts=[8, 100], batch_size=4, seed=0)
