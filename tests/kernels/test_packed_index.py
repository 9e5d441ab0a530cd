"""The packed index is what numpy makes of the same sequences, to the element and the dtype."""

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
    found, expected = packed_index.build(drawn, multiple), packed_index_reference.build(drawn, multiple)
    for name, array in vars(expected).items():
        assert np.array_equal(getattr(found, name), array), name
        if isinstance(array, np.ndarray):
            assert getattr(found, name).dtype == array.dtype, name


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
