"""The incremental detector agrees with the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.rollout.repetition import RepetitionDetector
from tests.rollout.repetition_reference import PlainDetector


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


@settings(max_examples=100, deadline=None)
@given(responses(), st.integers(1, 7), st.integers(2, 4), st.integers(1, 16))
def test_fires_exactly_where_the_definition_holds(tokens, max_period, min_repeats, min_tokens):
    detector = RepetitionDetector(max_period, min_repeats, min_tokens)
    for i, token in enumerate(tokens):
        assert detector.push(token) == repeats(tokens[: i + 1], max_period, min_repeats, min_tokens)


@settings(max_examples=20, deadline=None)
@given(responses(), st.integers(500, 1000), st.sampled_from([1, 3, 64, 512]), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_agrees_with_the_plain_detector_on_long_streams(block, num_blocks, max_period, min_repeats, seed):
    """Long enough that the recent tokens are moved to the front of their array; of tokens that occur often, seldom and once, so
    that runs are found and ended each way."""
    rng = np.random.default_rng(seed)
    tokens = np.tile(np.array(block, np.int32), num_blocks)[:20_000]
    tokens[:: 7 * max_period] = 9  # an error now and then: runs end and begin again
    for start in range(0, len(tokens), 2_000):
        num_tokens = len(stretch := tokens[start : start + rng.integers(1_000)])
        num_different = rng.integers(1, max_period + 1)
        once, seldom = rng.integers(-(2**31), 2**31, num_tokens), np.arange(num_tokens) % num_different
        stretch[:] = once if rng.integers(2) else seldom
    detector, plain = RepetitionDetector(max_period, min_repeats), PlainDetector(max_period, min_repeats)
    assert detector.window == plain.window
    expected = [i for i, token in enumerate(tokens.tolist()) if plain.push(token)]
    found, start = [], 0
    while start < len(tokens) and (at := detector.push_many(tokens[start:])) is not None:
        start += at + 1
        found.append(start - 1)
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(responses(), st.integers(1, 7), st.integers(2, 4), st.integers(1, 16), st.data())
def test_a_new_detector_given_the_window_goes_on_like_the_old_one(tokens, max_period, min_repeats, min_tokens, data):
    cut = data.draw(st.integers(0, len(tokens)))
    old, new = (RepetitionDetector(max_period, min_repeats, min_tokens) for _ in range(2))
    for token in tokens[:cut]:
        old.push(token)
    for token in tokens[:cut][-new.window :]:
        new.push(token)
    assert [old.push(t) for t in tokens[cut:]] == [new.push(t) for t in tokens[cut:]]


def test_fires_at_the_last_token_of_the_last_copy_needed():
    detector = RepetitionDetector(max_period=512, min_repeats=4)
    assert [detector.push(i % 300) for i in range(1300)].index(True) == 1199
    detector = RepetitionDetector(max_period=512, min_repeats=4)
    assert [detector.push(7) for _ in range(70)].index(True) == 63


def test_limits_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match=r"rollout\.repetition.*min_repeats=1"):
        RepetitionDetector(max_period=8, min_repeats=1)
    with pytest.raises(ConfigError, match=r"min_repeats=1000000000.*2\*\*31"):
        RepetitionDetector(max_period=8, min_repeats=10**9)


def test_only_contiguous_int32_tokens_are_taken():
    detector = RepetitionDetector(max_period=8, min_repeats=2)
    with pytest.raises(ValueError, match=r"token_ids: expected a contiguous int32 array .* got int64 of 1 dimensions"):
        detector.push_many(np.zeros(4, np.int64))
    assert detector.push_many(np.zeros(0, np.int32)) is None
