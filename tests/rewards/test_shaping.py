"""Reward shaping against rules computed by hand; Toggle's memory across a resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config import LengthRewardConfig, RewardsConfig
from megatron_rl.rewards import length_rewards
from megatron_rl.rewards.shaping import Shaping, correct_length, length_weight, toggled, within_budget
from megatron_rl.types import Ending, Group, Message, Outcome, OutcomeKind, Prompt, Segment, Trajectory


def group(lengths, rewards, *, prompt_id="p", tags=None) -> Group:
    """One trajectory a length; correct where the reward is 1."""

    def trajectory(i: int) -> Trajectory:
        n = lengths[i]
        tokens, values = np.zeros(n, np.int32), np.zeros(n, np.float32)
        segment = Segment(0, 0, 0, 1.0, "e", Ending.STOP, tokens, values, tokens, np.ones(n, bool))
        return Trajectory(i, 0, (segment,), Outcome(OutcomeKind.VALUE, rewards[i], rewards[i] == 1))

    prompt = Prompt(prompt_id, (Message("user", "?"),), np.zeros(1, np.int32), "a", "exact", tags or {})
    return Group(0, prompt, tuple(trajectory(i) for i in range(len(lengths))))


def shaping(**sections) -> Shaping:
    return Shaping(RewardsConfig.model_validate(sections))


def test_the_length_reward_waits_for_its_iteration_then_stays_or_rises():
    def weights(**settings):
        return [length_weight(LengthRewardConfig(weight=0.8, **settings), i) for i in range(7)]

    assert weights() == [0] * 7
    assert weights(schedule="constant", start_iteration=3) == [0, 0, 0, 0.8, 0.8, 0.8, 0.8]
    assert weights(schedule="linear", start_iteration=2, ramp_iterations=4) == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8])


def test_nothing_is_shaped_by_default():
    g = group([3, 900, 5], [1, -0.25, 0])
    assert shaping().rewards(g, 10**6) == [1, -0.25, 0]


def test_the_length_reward_is_added_to_the_task_reward_of_the_whole_group():
    g = group([100, 200, 300, 150], [1, 0, 1, 0])
    wanted = [r + 0.5 * x for r, x in zip([1, 0, 1, 0], length_rewards([100, 200, 300, 150], [True, False] * 2), strict=True)]
    s = shaping(length={"schedule": "constant", "weight": 0.5, "start_iteration": 4})
    assert s.rewards(g, 3) == [1, 0, 1, 0]
    assert s.rewards(g, 4) == wanted == [1.25, 0, 0.75, 0]


def test_budgets_are_those_of_the_prompts_kind_and_cost_the_answer_beyond_them():
    s = shaping(budget={"tokens": 50, "tag": "kind", "by_tag": {"proof": 500}, "penalty": 0.2})
    assert s.rewards(group([50, 51, 400], [1, 1, -0.5]), 0) == pytest.approx([1, -0.2, -0.7])
    assert s.rewards(group([50, 51, 501], [1, 1, 0], tags={"kind": "proof"}), 0) == pytest.approx([1, 1, -0.2])
    assert s.rewards(group([51], [1], tags={"kind": "other"}), 0) == pytest.approx([-0.2])


@given(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=9), st.integers(1, 99), st.floats(0, 1))
def test_toggle_never_raises_a_reward_and_spares_groups_that_are_not_yet_good_enough(members, budget, accuracy):
    lengths, correct = [n for n, _ in members], [c for _, c in members]
    rewards = [float(c) for c in correct]
    out = toggled(rewards, lengths, correct, budget=budget, accuracy=accuracy)
    good = np.mean(correct) >= accuracy
    assert out == [r if n <= budget or not good else 0 for r, n in zip(rewards, lengths, strict=True)]
    assert within_budget(rewards, lengths, 99, 7.0) == rewards


def test_the_budget_is_a_quantile_of_the_right_lengths():
    lengths, correct = [10, 20, 30, 40, 1], [True, True, True, True, False]
    found = [correct_length(lengths, correct, q) for q in (0.01, 0.25, 0.26, 0.5, 0.75, 1.0)]
    assert found == [10, 10, 20, 20, 30, 40]
    assert correct_length([3, 4], [False, False], 0.5) is None


def test_toggle_fixes_a_budget_once_and_uses_it_in_every_other_period_also_after_a_resume():
    settings = {"toggle": {"period": 2, "quantile": 0.5, "accuracy": 0.5}}
    s, first = shaping(**settings), group([10, 20, 30], [1, 1, 0])
    assert s.rewards(first, 2) == [1, 1, 0], "there is no budget before a right response was trained"
    s.observe(group([7], [0]))
    s.observe(first)
    s.observe(group([1, 1, 1], [1, 1, 1]))  # too late: fixed
    resumed = shaping(**settings)
    resumed.restore(json.loads(json.dumps(s.state())))
    for it in (s, resumed):
        assert [it.rewards(first, i) for i in range(6)] == [[1, 1, 0]] * 2 + [[1, 0, 0]] * 2 + [[1, 1, 0]] * 2
        other = replace(first, prompt=replace(first.prompt, id="other"))
        assert it.rewards(other, 2) == [1, 1, 0]
