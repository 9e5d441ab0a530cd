from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.model_config import ModelConfig
from megatron_rl.weights.hf import plan_buckets
from megatron_rl.weights.tables import HFTensor, Piece, Rule, parameters, pieces, shard_shape


def model(family: str = "llama", heads: int = 4, kv_heads: int = 2, **changes: object) -> ModelConfig:
    settings = {
        "family": family, "num_layers": 2, "hidden_size": 8, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 4,
        "ffn_size": 12, "vocab_size": 11, "max_positions": 16, "norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None,
        "tied_embeddings": False, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3", "eos_token_ids": (),
    }  # fmt: skip
    return ModelConfig(**(settings | changes))  # type: ignore[arg-type]


def test_a_rank_holds_each_kv_groups_query_heads_then_its_key_then_its_value() -> None:
    m = model(heads=4, kv_heads=2)  # rows of 4: q0 q1 k0 v0 | q2 q3 k1 v1
    qkv = next(p for p in parameters(m) if p.name.endswith("0.self_attention.linear_qkv.weight"))
    assert pieces(qkv, m, 2, 1) == [Piece(0, 0, 8, 16), Piece(1, 0, 4, 8), Piece(2, 0, 4, 8)]


def test_with_fewer_kv_heads_than_ranks_the_cut_falls_inside_a_group() -> None:
    m = model(heads=4, kv_heads=1)  # rows of 4: q0 q1 q2 | q3 k0 v0
    qkv = next(p for p in parameters(m) if p.name.endswith("0.self_attention.linear_qkv.weight"))
    assert pieces(qkv, m, 2, 0) == [Piece(0, 0, 0, 12)]
    assert pieces(qkv, m, 2, 1) == [Piece(0, 0, 12, 16), Piece(1, 0, 0, 4), Piece(2, 0, 0, 4)]


def test_a_rank_beyond_the_vocabulary_holds_only_padding() -> None:
    m = model(vocab_size=3)
    assert pieces(parameters(m)[0], m, 4, 3) == []
    assert shard_shape(parameters(m)[0], 4) == (1, 8)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("heads", "kv_heads", "num_ranks"), [(4, 2, 1), (4, 2, 2), (4, 4, 4), (4, 1, 2), (4, 2, 4)])
def test_ranks_together_hold_every_element_once_and_each_its_shards_size(
    family: str, heads: int, kv_heads: int, num_ranks: int
) -> None:
    m = model(family, heads, kv_heads)
    for parameter in parameters(m):
        counts = [torch.zeros(t.shape) for t in parameter.tensors]
        for rank in range(num_ranks):
            held = pieces(parameter, m, num_ranks, rank)
            for piece in held:
                counts[piece.tensor].narrow(piece.dim, piece.start, piece.length).add_(1)
            dim = 1 if parameter.rule is Rule.ROW else 0
            total = sum(piece.length for piece in held)
            size = shard_shape(parameter, num_ranks)[dim]
            assert total == size or (parameter.rule is Rule.VOCABULARY and total < size)
        copies = num_ranks if parameter.rule is Rule.REPLICATED else 1
        assert all((count == copies).all() for count in counts), parameter.name


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_buckets_keep_order_and_exceed_their_size_only_for_one_tensor(rows: list[int], bucket_bytes: int) -> None:
    counts = plan_buckets([HFTensor(str(i), (n,)) for i, n in enumerate(rows)], 2, bucket_bytes)
    assert sum(counts) == len(rows)
    start = 0
    for i, count in enumerate(counts):
        size = 2 * sum(rows[start : start + count])
        assert count == 1 or size <= bucket_bytes
        if i + 1 < len(counts):
            assert size + 2 * rows[start + count] > bucket_bytes, "the next tensor would have fitted"
        start += count
