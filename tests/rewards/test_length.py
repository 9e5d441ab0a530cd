"""Length rewards against the closed form of the paper, section 2.3.3."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rewards import length_rewards


def test_worked_example_by_hand():
    # shortest 100, longest 300: lambda = 0.5, 0, -0.5, 0.25
    assert length_rewards([100, 200, 300, 150], [True, True, True, True]) == [0.5, 0.0, -0.5, 0.25]
    assert length_rewards([100, 200, 300, 150], [False, False, False, False]) == [0.0, 0.0, -0.5, 0.0]


def test_extremes_are_over_wrong_responses_too():
    assert length_rewards([10, 20, 30], [False, True, False]) == [0.0, 0.0, -0.5]


def test_equal_lengths_earn_nothing():
    assert length_rewards([7, 7, 7], [True, False, True]) == [0.0, 0.0, 0.0]
    assert length_rewards([7], [True]) == [0.0]
    assert length_rewards([], []) == []


groups = st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=2, max_size=16)


@given(groups, st.integers(0, 10**6))
def test_bounded_ordered_and_blind_to_a_common_offset(group, offset):
    lengths, correct = [length for length, _ in group], [is_right for _, is_right in group]
    rewards = length_rewards(lengths, correct)
    assert all(-0.5 <= reward <= 0.5 for reward in rewards)
    assert all(reward <= 0 for reward, is_right in zip(rewards, correct, strict=True) if not is_right)
    right = sorted((length, -reward) for length, reward, is_right in zip(lengths, rewards, correct, strict=True) if is_right)
    assert [reward for _, reward in right] == sorted(reward for _, reward in right)
    assert rewards == length_rewards([length + offset for length in lengths], correct)
