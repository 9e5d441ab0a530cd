"""Attention over a pack whose layout is a tree: a group's prompt once, then its responses, which all attend to it.

Two parts. A pure plan, made once for a micro-batch: `plan_attention` sorts the sequences (prompt plus response) of the pack
into batches of similar length. `TreeAttention`, Megatron's `core_attention` in every layer, applies rotary embedding from
explicit positions, gathers each batch's rows, attends causally with torch's SDPA and puts every row's output back.
Causal order and padding on the right need no mask, so nothing of size [tokens, tokens] exists, here or in the kernel.
Under context parallelism a rank holds a contiguous slice of the pack; for attention it trades tokens for heads.
It knows no prompts or trajectories: see `packing.py` for how a pack is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region

from megatron_rl.training.packing import Branch

MAX_PADDING = 0.25  # share of a batch's positions that may be padding


@dataclass(frozen=True)
class AttentionPlan:
    """Which rows attend together. The batches' outputs, flattened and joined, hold row r's output at `places[r]`."""

    batches: tuple[torch.Tensor, ...]  # int64 [sequences, positions] of rows, padded on the right with row 0
    places: torch.Tensor  # int64 [tokens]


@dataclass
class TreeParams(PackedSeqParams):
    """What reaches `TreeAttention` through Megatron's layers."""

    plan: AttentionPlan | None = None
    cos: torch.Tensor | None = None  # [tokens / CP, 1, head_dim], of this context-parallel rank's rows
    sin: torch.Tensor | None = None  # [tokens / CP, 1, head_dim]


def plan_attention(branches: Sequence[Branch], num_tokens: int, device: torch.device) -> AttentionPlan:
    """Batch the branches by length. Every row of the pack must lie in some branch, itself or as its prefix."""
    places = np.full(num_tokens, -1, np.int64)
    batches, offset = [], 0
    for members in _similar(branches):
        longest = members[0].num_positions
        rows = np.zeros((len(members), longest), np.int64)
        for i, branch in enumerate(members):
            own = branch.rows()
            rows[i, : len(own)] = own
            at = np.arange(offset + i * longest, offset + i * longest + len(own))
            places[own] = at  # a prompt's rows come out equal in each branch: any will do
        batches.append(torch.from_numpy(rows).to(device))
        offset += rows.size
    assert (places >= 0).all(), "a row of the pack lies in no sequence"
    return AttentionPlan(tuple(batches), torch.from_numpy(places).to(device))


def _similar(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Longest first, a new batch whenever the next branch would leave more than MAX_PADDING of its positions empty."""
    batches: list[list[Branch]] = []
    for branch in sorted(branches, key=lambda b: -b.num_positions):
        if batches and branch.num_positions >= (1 - MAX_PADDING) * batches[-1][0].num_positions:
            batches[-1].append(branch)
        else:
            batches.append([branch])
    return batches


def rotary_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [tokens, 1, head_dim]; positions int64 [tokens], inverse_frequencies float32 [head_dim / 2]."""
    angles = positions[:, None].to(torch.float32) * inverse_frequencies[None]
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, head_dim]; the two halves of a head are the two coordinates."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    """query [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim], heads a multiple of kv_heads.
    Returns [tokens, heads, head_dim]: every row attends to the rows before it in its sequence, and to itself."""
    dtype, outputs = query.dtype, []
    if query.device.type == "cpu" and dtype == torch.bfloat16:  # torch's bfloat16 kernel is 5x slower there, backward above all
        query, key, value = query.float(), key.float(), value.float()
    for rows in plan.batches:
        q, k, v = (_take(x, rows).transpose(1, 2) for x in (query, key, value))
        grouped = q.size(1) != k.size(1)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return _take(joined, plan.places).to(dtype)


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows] for x [tokens, heads, head_dim]. As an embedding lookup, whose backward adds whole rows in parallel."""
    return F.embedding(rows, x.flatten(1)).unflatten(-1, x.shape[1:])


class TreeAttention(torch.nn.Module):
    """Megatron's `core_attention`: no parameters, no state but the head geometry."""

    def __init__(self, config: Any, layer_number: int, pg_collection: Any, softmax_scale: float | None = None, **kwargs: Any):
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: TreeParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query [tokens / CP, heads / TP, head_dim], key and value likewise with KV heads; returns query's shape."""
        p = packed_seq_params
        assert p.plan is not None and p.cos is not None and p.sin is not None, "attention needs the layout of its pack"
        query, key = rotate(query, p.cos, p.sin), rotate(key, p.cos, p.sin)
        if self.cp_group.size() == 1:
            return attend(query, key, value, p.plan, self.scale)
        num_heads, num_kv_heads = query.size(1), key.size(1)
        mine = self._kv_heads(num_heads, num_kv_heads).to(key.device)
        key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group)[:, mine] for x in (key, value))
        output = attend(self._tokens_for_heads(query), key, value, p.plan, self.scale)
        return self._heads_for_tokens(output)

    def _kv_heads(self, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        """KV heads this rank's query heads need: each once if all serve equally many query heads, else one a query head."""
        local = num_heads // self.cp_group.size()
        first = self.cp_group.rank() * local
        of_query = torch.arange(first, first + local) * num_kv_heads // num_heads
        needed, served = of_query.unique_consecutive(return_counts=True)
        return needed if bool((served == served[0]).all()) else of_query

    def _tokens_for_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens / CP, heads, head_dim] to [tokens, heads / CP, head_dim]; this rank keeps its block of heads."""
        blocks = x.unflatten(1, (self.cp_group.size(), -1)).transpose(0, 1).contiguous()
        return all_to_all(self.cp_group, blocks).flatten(0, 1)

    def _heads_for_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: [tokens, heads / CP, head_dim] to [tokens / CP, heads, head_dim]."""
        blocks = x.unflatten(0, (self.cp_group.size(), -1)).contiguous()
        return all_to_all(self.cp_group, blocks).transpose(0, 1).flatten(1, 2)
