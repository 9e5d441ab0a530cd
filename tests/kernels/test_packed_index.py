"""The packed index, and each rank's slice of it, is what numpy makes of the same sequences, to the element and the dtype."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import KernelError
from megatron_rl.kernels import packed_index
from megatron_rl.types import TrainingSequence
from tests.kernels import packed_index_reference


def sequence(seed: int, prompt_tokens: int, mask: list[bool]) -> TrainingSequence:
    rng, n = np.random.default_rng(seed), len(mask)
    return TrainingSequence(
        group_id=0,
        trajectory_id=seed,
        prompt_ids=rng.integers(0, 150_000, prompt_tokens).astype(np.int32),
        response_ids=rng.integers(0, 150_000, n).astype(np.int32),
        loss_mask=np.array(mask, bool),
        behaviour_log_probs=-rng.random(n, np.float32),
        weight_versions=rng.integers(0, 9, n).astype(np.int32),
        advantage=0.0,
        weight=1.0,
    )


@st.composite
def families(draw: st.DrawFn) -> list[list[TrainingSequence]]:
    masks = st.lists(st.booleans(), min_size=1, max_size=20).filter(any)
    drawn = draw(st.lists(st.tuples(st.integers(1, 12), st.lists(masks, min_size=1, max_size=4)), max_size=5))
    return [[sequence(100 * f + i, p, mask) for i, mask in enumerate(own)] for f, (p, own) in enumerate(drawn)]


@settings(max_examples=60, deadline=None)
@given(families(), st.integers(1, 16))
def test_agrees_with_numpy(drawn, multiple):
    assert_same(packed_index.build(drawn, multiple), packed_index_reference.build(drawn, multiple))


@settings(max_examples=60, deadline=None)
@given(families(), st.integers(1, 6), st.integers(1, 3))
def test_slices_agree_with_numpy_and_hold_every_row_and_loss_token_once(drawn, size, shares):
    index = packed_index.build(drawn, size * shares)
    slices = [packed_index.context_slice(index, rank, size) for rank in range(size)]
    for rank, found in enumerate(slices):
        assert_same(found, packed_index_reference.context_slice(index, rank, size))
    assert np.array_equal(np.concatenate([s.token_ids for s in slices]), index.token_ids)
    assert sorted(np.concatenate([s.loss_tokens for s in slices])) == list(range(len(index.loss_rows)))
    starts = np.repeat(np.arange(size) * (len(index.token_ids) // size), [len(s.loss_rows) for s in slices])
    in_pack = np.concatenate([s.loss_rows for s in slices]) + starts
    assert np.array_equal(in_pack, index.loss_rows[np.concatenate([s.loss_tokens for s in slices])])


def assert_same(found, expected):
    for name, array in vars(expected).items():
        assert np.array_equal(getattr(found, name), array), name
        if isinstance(array, np.ndarray):
            assert getattr(found, name).dtype == array.dtype, name


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        (0, 3, r"size: expected a divisor of 4 rows, got 3"),
        (0, 0, "size: "),
        (2, 2, r"rank: expected 0 .. 1, got 2"),
        (-1, 2, "rank"),
    ],
)
def test_slices_that_a_pack_does_not_have_are_refused(rank, size, message):
    with pytest.raises(KernelError, match=message):
        packed_index.context_slice(packed_index.build([[sequence(0, 2, [True] * 3)]], 4), rank, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_ids": np.zeros(3, np.int64)}, r"response_ids: expected .*int32, got int64 of 1 dimensions"),
        ({"response_ids": np.zeros(6, np.int32)[::2]}, r"response_ids: expected a contiguous array"),
        ({"loss_mask": np.ones(2, bool)}, r"loss_mask: expected 3 elements, got 2"),
        ({"weight_versions": np.zeros((3, 1), np.int32)}, r"weight_versions: .* got int32 of 2 dimensions"),
        ({"prompt_ids": np.zeros(0, np.int32)}, r"prompt_ids: expected at least one token, got none"),
    ],
)
def test_bad_arrays_are_refused(change, message):
    good = sequence(0, 2, [True] * 3)
    with pytest.raises(KernelError, match=message):
        packed_index.build([[replace(good, **change)]], 1)
