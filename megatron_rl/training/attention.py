"""Attention over a pack whose layout is a tree: a group's prompt once, then its responses, which all attend to it.

Two parts. A pure plan, made once for a micro-batch: `plan_attention` sorts the pack's sequences (prompt plus response) into
batches of similar length. `TreeAttention`, Megatron's `core_attention` in every layer, applies rotary embedding from
explicit positions, gathers each batch's rows, attends causally with torch's SDPA and puts every row's output back.
Causal order and padding on the right need no mask; only short responses to a shared prompt get one, [response, sequence]
and bounded. Nothing of size [tokens, tokens] exists, here or in the kernel.
Under context parallelism a rank holds a contiguous slice of the pack; for attention it trades tokens for heads.
It knows no prompts or trajectories: see `packing.py` for how a pack is made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_rl.training.packing import Branch

MAX_PADDING = 0.25  # share of a batch's positions that may be padding
MAX_MASK = 1 << 22  # elements of all masks of a pack

# Not cuDNN: it plans anew for each shape, over a millisecond a call, and batches differ in shape from pack to pack.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class AttentionBatch:
    """Sequences that attend in one call; rows are padded on the right with row 0."""

    queries: torch.Tensor  # int64 [sequences, query positions]
    keys: torch.Tensor  # int64 [sequences, key positions]
    mask: torch.Tensor | None  # bool [sequences, 1, query positions, key positions]; None: causal, the queries are the keys


@dataclass(frozen=True)
class AttentionPlan:
    """Which rows attend together. The batches' outputs, flattened and joined, hold row r's output at `places[r]`."""

    batches: tuple[AttentionBatch, ...]
    places: torch.Tensor  # int64 [tokens]


@dataclass
class TreeParams(PackedSeqParams):
    """What reaches `TreeAttention` through Megatron's layers."""

    plan: AttentionPlan | None = None
    cos: torch.Tensor | None = None  # [tokens / CP, 1, head_dim], of this context-parallel rank's rows
    sin: torch.Tensor | None = None  # [tokens / CP, 1, head_dim]


def plan_attention(branches: Sequence[Branch], num_tokens: int, device: torch.device) -> AttentionPlan:
    """Batch the branches by length. Every row of the pack must lie in some branch, itself or as its prefix."""
    whole, short = _whole_and_short(branches)
    arrays = [_causal(members) for members in _similar(whole)] + [_masked(members) for members in _buckets(short)]
    places = np.full(num_tokens, -1, np.int64)
    offset = 0
    for queries, _, _, used in arrays:
        places[queries[used]] = offset + np.flatnonzero(used)  # a prompt's rows come out equal in each branch: any will do
        offset += queries.size
    assert (places >= 0).all(), "a row of the pack lies in no sequence"

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    batches = [AttentionBatch(tensor(q), tensor(k), None if m is None else tensor(m)) for q, k, m, _ in arrays]
    return AttentionPlan(tuple(batches), tensor(places))


def _whole_and_short(branches: Sequence[Branch]) -> tuple[list[Branch], list[Branch]]:
    """Most branches attend as a whole, prompt and all, which needs no mask. But k short responses would compute a long
    prompt's attention k times, so they send only their own rows as queries, and their prompt attends once, alone. Their
    masks are small, and MAX_MASK bounds their sum."""
    sharing = Counter(b.prefix_start for b in branches if b.prefix_length)
    whole, short, room = [], [], MAX_MASK
    for branch in sorted(branches, key=lambda b: b.length * b.num_positions):
        cost = branch.length * branch.num_positions
        if 0 < branch.length < branch.prefix_length and sharing[branch.prefix_start] > 1 and cost <= room:
            room -= cost
            short.append(branch)
        else:
            whole.append(branch)
    covered = {b.prefix_start for b in whole if b.prefix_length}
    prompts = {b.prefix_start: b.prefix_length for b in short if b.prefix_start not in covered}
    return whole + [Branch(start, length) for start, length in prompts.items()], short


def _similar(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Longest first, a new batch whenever the next branch would leave more than MAX_PADDING of its positions empty."""
    batches: list[list[Branch]] = []
    for branch in sorted(branches, key=lambda b: -b.num_positions):
        if batches and branch.num_positions >= (1 - MAX_PADDING) * batches[-1][0].num_positions:
            batches[-1].append(branch)
        else:
            batches.append([branch])
    return batches


def _buckets(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Responses alike in length (within a factor 2) and in length with their prompt."""
    buckets: dict[tuple[int, int], list[Branch]] = {}
    for branch in branches:
        key = (branch.length.bit_length(), int(math.log(branch.num_positions, 1 / (1 - MAX_PADDING))))
        buckets.setdefault(key, []).append(branch)
    return list(buckets.values())


# queries, keys, mask, and which query positions are no padding
_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]


def _causal(members: list[Branch]) -> _Arrays:
    rows, used = _padded([b.rows() for b in members])
    return rows, rows, None, used


def _masked(members: list[Branch]) -> _Arrays:
    queries, used = _padded([b.rows()[b.prefix_length :] for b in members])
    keys, _ = _padded([b.rows() for b in members])
    prefixes = np.array([b.prefix_length for b in members])
    last = prefixes[:, None] + np.arange(queries.shape[1])  # the newest key position each query may see
    mask = np.arange(keys.shape[1]) <= last[:, :, None]  # padding queries see padding keys: finite, and never used
    return queries, keys, mask[:, None], used


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[sequences, longest] rows, and which of them are real."""
    used = np.arange(max(len(r) for r in rows)) < np.array([len(r) for r in rows])[:, None]
    padded = np.zeros(used.shape, np.int64)
    padded[used] = np.concatenate(rows)
    return padded, used


def rotary_tables(positions: torch.Tensor, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [tokens, 1, head_dim]; positions int64 [tokens], inverse_frequencies float32 [head_dim / 2]."""
    angles = positions[:, None].to(torch.float32) * inverse_frequencies[None]
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, head_dim]; the two halves of a head are the two coordinates. In float32,
    as engines do it: cosines in bfloat16 are off by up to 0.4 %, and log-probs would tell."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    """query [tokens, heads, head_dim]; key, value [tokens, kv_heads, head_dim], heads a multiple of kv_heads.
    Returns [tokens, heads, head_dim]: every row attends to the rows before it in its sequence, and to itself."""
    dtype, outputs = query.dtype, []
    if query.device.type == "cpu" and dtype == torch.bfloat16:  # torch's bfloat16 kernel is 5x slower there, backward above all
        query, key, value = query.float(), key.float(), value.float()
    with sdpa_kernel(_BACKENDS):
        for batch in plan.batches:
            q = _take(query, batch.queries).transpose(1, 2)
            k, v = (_take(x, batch.keys).transpose(1, 2) for x in (key, value))
            if batch.mask is not None and q.size(1) != k.size(1):  # only unmasked kernels take fewer KV heads on a GPU
                k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
            causal, grouped = batch.mask is None, q.size(1) != k.size(1)
            output = F.scaled_dot_product_attention(q, k, v, batch.mask, is_causal=causal, scale=scale, enable_gqa=grouped)
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
