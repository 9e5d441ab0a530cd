"""The incremental detector agrees with the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.rollout.repetition import RepetitionDetector


def repeats(tokens: list[int], max_period: int, min_repeats: int, min_tokens: int) -> bool:
    for p in range(1, max_period + 1):
        for r in range(min_repeats, len(tokens) // p + 1):
            if p * r >= min_tokens and tokens[-p * r :] == tokens[-p:] * r:
                return True
    return False


@st.composite
def responses(draw) -> list[int]:
    """Random tokens with repeated blocks in them, some with an error inside."""
    tokens: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        block = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        tokens += block * draw(st.integers(1, 6))
        tokens += draw(st.lists(st.integers(0, 2), max_size=3))
    return tokens


@settings(max_examples=300, deadline=None)
@given(responses(), st.integers(1, 7), st.integers(2, 4), st.integers(1, 16))
def test_fires_exactly_where_the_definition_holds(tokens, max_period, min_repeats, min_tokens):
    detector = RepetitionDetector(max_period, min_repeats, min_tokens)
    for i, token in enumerate(tokens):
        assert detector.push(token) == repeats(tokens[: i + 1], max_period, min_repeats, min_tokens)


def test_fires_at_the_last_token_of_the_last_copy_needed():
    detector = RepetitionDetector(max_period=512, min_repeats=4)
    assert [detector.push(i % 300) for i in range(1300)].index(True) == 1199
    detector = RepetitionDetector(max_period=512, min_repeats=4)
    assert [detector.push(7) for _ in range(70)].index(True) == 63


def test_limits_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match=r"rollout\.repetition.*min_repeats=1"):
        RepetitionDetector(max_period=8, min_repeats=1)
