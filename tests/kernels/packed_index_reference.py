"""A pack and its slices in numpy, array by array: what csrc/packing/index.cpp is tested against and measured beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.kernels.packed_index import ContextSlice, PackedIndex
from megatron_rl.types import TrainingSequence


def build(families: Sequence[Sequence[TrainingSequence]], multiple: int) -> PackedIndex:
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    loss_rows: list[np.ndarray] = []
    parents: list[int] = []
    num_rows = 0

    def append(token_ids: np.ndarray, first_position: int, parent: int) -> None:
        nonlocal num_rows
        num_rows += len(token_ids)
        tokens.append(token_ids)
        positions.append(np.arange(first_position, first_position + len(token_ids)))
        parents.append(parent)

    for members in families:
        prompt, run = members[0].prompt_ids, len(parents)
        append(prompt, 0, run)
        last_prompt_row = num_rows - 1
        for member in members:
            bearing, start = np.flatnonzero(member.loss_mask), num_rows
            loss_rows.append(np.where(bearing > 0, start + bearing - 1, last_prompt_row))
            if bearing[-1]:
                append(member.response_ids[: bearing[-1]], len(prompt), run)
    num_padding = -num_rows % multiple if num_rows else multiple
    if num_padding:
        append(np.zeros(num_padding), 0, len(parents))
    everyone = [m for members in families for m in members]
    lengths = [len(t) for t in tokens]
    return PackedIndex(
        token_ids=_joined(tokens, np.int64),
        positions=_joined(positions, np.int64),
        segment_ids=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        parents=np.array(parents, np.int32),
        num_padding=num_padding,
        loss_rows=_joined(loss_rows, np.int64),
        targets=_joined([m.response_ids[m.loss_mask] for m in everyone], np.int64),
        sequence_ids=_joined([np.full(int(m.loss_mask.sum()), i) for i, m in enumerate(everyone)], np.int64),
        behaviour_log_probs=_joined([m.behaviour_log_probs[m.loss_mask] for m in everyone], np.float32),
        weight_versions=_joined([m.weight_versions[m.loss_mask] for m in everyone], np.int32),
    )


def context_slice(index: PackedIndex, rank: int, size: int) -> ContextSlice:
    rows = np.array_split(np.arange(len(index.token_ids)), size)[rank]
    own = np.flatnonzero(np.isin(index.loss_rows, rows))
    return ContextSlice(
        token_ids=index.token_ids[rows],
        positions=index.positions[rows],
        loss_tokens=own,
        loss_rows=np.searchsorted(rows, index.loss_rows[own]),
        targets=index.targets[own],
        sequence_ids=index.sequence_ids[own],
        behaviour_log_probs=index.behaviour_log_probs[own],
        weight_versions=index.weight_versions[own],
    )


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
