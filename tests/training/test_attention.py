"""Tree attention against one dense mask over the whole pack."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.training.attention import MAX_MASK, MAX_PADDING, attend, plan_attention, rotary_tables, rotate
from megatron_rl.training.packing import Branch

CPU = torch.device("cpu")


def tree(prompts_and_responses: list[tuple[int, list[int]]]) -> tuple[list[Branch], int]:
    branches, row = [], 0
    for prompt, responses in prompts_and_responses:
        start, row = row, row + prompt
        for response in responses:
            branches.append(Branch(row, response, start, prompt))
            row += response
    return branches, row


def dense(query, key, value, branches, num_tokens, scale):
    """[tokens, tokens] mask: row i sees j where some branch holds both and j is not after i."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for branch in branches:
        rows = torch.from_numpy(branch.rows())
        mask[rows[:, None], rows[None]] |= torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


shapes = st.lists(st.tuples(st.integers(1, 25), st.lists(st.integers(0, 20), min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from([(4, 4), (4, 2), (6, 3), (3, 1)]), st.integers(0, 9))
def test_outputs_and_gradients_equal_a_dense_mask(shape, heads, seed):
    branches, n = tree(shape)
    torch.manual_seed(seed)
    query, key, value = (torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    weight = torch.randn(n, heads[0], 8, dtype=torch.float64)
    ours = attend(query, key, value, plan_attention(branches, n, CPU), 0.3)
    expected = dense(query, key, value, branches, n, 0.3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad((ours * weight).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.lists(st.integers(1, 500), min_size=1, max_size=8)), min_size=1, max_size=8))
def test_padding_and_masks_stay_below_their_bounds(shape):
    branches, n = tree(shape)
    plan = plan_attention(branches, n, CPU)
    computed = sum(b.queries.numel() for b in plan.batches if b.mask is None)
    positions = sum(b.num_positions for b in branches) + sum(prompt for prompt, _ in shape)
    assert computed * (1 - MAX_PADDING) <= positions
    assert sum(b.mask.numel() for b in plan.batches if b.mask is not None) <= 4 * MAX_MASK


def test_short_responses_do_not_recompute_their_prompt():
    plan = plan_attention(*tree([(100, [6] * 8), (100, [5] * 8)]), CPU)
    assert sorted(tuple(b.queries.shape) for b in plan.batches) == [(2, 100), (16, 6)]


def test_masks_are_bounded_whatever_the_lengths():
    """40 responses of 400 tokens to a prompt of 4000 would need masks of 70 million elements: most go as a whole."""
    plan = plan_attention(*tree([(4000, [400] * 40)]), CPU)
    masked = sum(b.mask.numel() for b in plan.batches if b.mask is not None)
    assert 0 < masked <= 2 * MAX_MASK


def test_one_long_sequence_needs_no_padding_and_no_mask():
    [batch] = plan_attention(*tree([(1000, [31_000])]), CPU).batches
    assert tuple(batch.queries.shape) == (1, 32_000) and batch.mask is None


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_embedding_equals_transformers(scaled):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    from megatron_rl.model_config import ModelConfig

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = scaling | {"original_max_position_embeddings": 64} if scaled else {"rope_type": "default"}
    raw = {"rope_theta": 500.0} | parameters
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=512, rope_parameters=raw)
    model = ModelConfig._from_dict(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, "config.json")
    torch.manual_seed(0)
    positions = torch.from_numpy(np.random.default_rng(0).permutation(300)[:40])
    query, key = torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    own = rotary_tables(positions, model.inverse_frequencies())
    for x, wanted in zip((query, key), expected, strict=True):
        torch.testing.assert_close(rotate(x, *own), wanted[0].transpose(0, 1), rtol=0, atol=1e-6)
