"""pass@k against enumeration, the vote by hand, the interval against the normal one."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.statistics import bootstrap_interval, final_answer, majority_is_correct, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_correct_one(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    draws = list(combinations(correct, k))
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_final_answers_are_boxes_then_prefixes_then_last_lines():
    assert final_answer(r"so \boxed{1}, no, \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer(r"cut \boxed{\frac{1}") is None
    assert final_answer("x\nAnswer:  Blue  sky\nbye", "Answer:") == "blue sky"
    assert final_answer("thinking", "Answer:") is None
    assert final_answer("one\n 42 \n\n") == "42"
    assert final_answer(" \n") is None


def test_the_majority_wins_the_earliest_on_a_tie_and_silence_has_no_vote():
    assert majority_is_correct(["7", "8", "8"], [True, False, False]) is False
    assert majority_is_correct(["7", "8"], [True, False]) is True
    assert majority_is_correct([None, None, None, "7"], [False, False, False, True]) is True
    assert majority_is_correct([None, None], [False, False]) is False


def test_the_bootstrap_interval_is_about_the_normal_one_and_repeats():
    values = (np.arange(400) % 4 == 0).astype(float)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.005)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(np.ones(5), seed=0) == (1.0, 1.0)
