"""Packing: which sequences share a micro-batch, on which data-parallel rank, and where every token lies in it.

A pure planner: training sequences in, numpy arrays out; no process group, no model. The layout of a pack is a tree: each
group's prompt once, then its responses (`share_prompts=False`: a prompt for each response); `kernels/packed_index.py` writes
it. Groups stay whole unless one alone exceeds the limit; then it is split and its prompt repeated. Micro-batches are balanced
by cost (`kernels/partition.py`): rows plus attention, which grows with the context of each. Next: `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_rl.kernels import packed_index, partition
from megatron_rl.types import TrainingSequence


@dataclass(frozen=True)
class Branch:
    """One sequence of the pack: rows [start, start + length), preceded by the `prefix_length` rows of its prompt."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def num_positions(self) -> int:
        return self.prefix_length + self.length

    def rows(self) -> np.ndarray:
        """int64 [num_positions]"""
        prefix = np.arange(self.prefix_start, self.prefix_start + self.prefix_length)
        return np.concatenate([prefix, np.arange(self.start, self.start + self.length)])


@dataclass(frozen=True)
class PackedBatch(packed_index.PackedIndex):
    """One micro-batch; `sequence_ids` index the per-sequence arrays."""

    temperatures: np.ndarray  # float32 [loss_tokens]
    trajectory_ids: np.ndarray  # int64 [sequences]
    group_ids: np.ndarray  # int64 [sequences]
    is_supervised: np.ndarray  # bool [sequences]
    advantages: np.ndarray  # float32 [sequences]
    weights: np.ndarray  # float32 [sequences]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What attends: every response after its prompt, and runs that nothing follows. Together they cover every row."""
        runs, parents = list(pairwise(self.cu_seqlens.tolist())), self.parents.tolist()
        followed = {parent for run, parent in enumerate(parents) if parent != run}
        found = []
        for run, ((start, end), parent) in enumerate(zip(runs, parents, strict=True)):
            if parent != run:
                prefix, prefix_end = runs[parent]
                found.append(Branch(start, end - start, prefix, prefix_end - prefix))
            elif run not in followed:
                found.append(Branch(start, end - start))
        return tuple(found)


@dataclass(frozen=True)
class _Piece:
    """Sequences of one group that stay in one micro-batch, and the rows they need."""

    members: tuple[TrainingSequence, ...]
    num_rows: int

    def cost(self, share_prompts: bool, attention_cost: float) -> float:
        """In rows: each computes once, and attends to every position of its branch at `attention_cost` of a row."""
        prompt = len(self.members[0].prompt_ids)
        own = [_num_rows(m) or 0 for m in self.members]
        prompts = 1 if share_prompts else len(own)
        return self.num_rows + attention_cost * (prompts * prompt**2 + sum(n * (prompt + n) for n in own))


def plan(
    sequences: Sequence[TrainingSequence],
    *,
    max_tokens: int,
    share_prompts: bool = True,
    whole_groups: bool = False,
    multiple: int = 1,
    data_parallel: int = 1,
    micro_batch_multiple: int = 1,
    attention_cost: float = 0.0,
) -> list[list[PackedBatch]]:
    """The micro-batches of each data-parallel rank: equally many on every rank, a multiple of `micro_batch_multiple`, the
    i-th of similar cost on all. Each has at most `max_tokens` rows, unless one sequence alone is longer, before it is
    padded to a multiple of `multiple`. Sequences without a loss-bearing token are left out. `whole_groups`: no group is cut,
    however long. `attention_cost`: what a row pays for each position it attends to, as a share of what it costs by itself;
    0 balances rows."""
    bearing = [s for s in sequences if _num_rows(s) is not None]
    pieces = _pieces(bearing, None if whole_groups else max_tokens, share_prompts)
    sizes, costs = [p.num_rows for p in pieces], [p.cost(share_prompts, attention_cost) for p in pieces]
    parts = partition.with_capacity(sizes, costs, max_tokens, data_parallel * micro_batch_multiple)
    packed = [_pack([pieces[i] for i in part], share_prompts, multiple) for part in parts]
    return [packed[rank::data_parallel] for rank in range(data_parallel)]


def _num_rows(sequence: TrainingSequence) -> int | None:
    """Response rows to compute: one for each token before the last loss-bearing one. None: no token bears loss."""
    bearing = np.flatnonzero(sequence.loss_mask)
    return int(bearing[-1]) if len(bearing) else None


def _pieces(sequences: Sequence[TrainingSequence], max_tokens: int | None, share_prompts: bool) -> list[_Piece]:
    """Whole groups where they fit; None: always."""
    groups: dict[int, list[TrainingSequence]] = {}
    for sequence in sequences:
        assert len(sequence.prompt_ids), "a prompt has at least one token"
        groups.setdefault(sequence.group_id, []).append(sequence)
    return [piece for members in groups.values() for piece in _split(members, max_tokens, share_prompts)]


def _split(members: list[TrainingSequence], max_tokens: int | None, share_prompts: bool) -> list[_Piece]:
    """Cut a group into pieces of at most `max_tokens` rows; a single longer sequence is a piece."""
    pieces: list[_Piece] = []
    current: list[TrainingSequence] = []
    rows = 0
    for member in members:
        own = _num_rows(member) or 0
        added = own if current and share_prompts else own + len(member.prompt_ids)
        if current and max_tokens is not None and rows + added > max_tokens:
            pieces.append(_Piece(tuple(current), rows))
            current, rows, added = [], 0, own + len(member.prompt_ids)
        current.append(member)
        rows += added
    return [*pieces, _Piece(tuple(current), rows)]


def _temperatures(sequence: TrainingSequence) -> np.ndarray:
    """float32 [loss_tokens], in the order in which the packed index lists them"""
    if sequence.temperatures is None:
        return np.ones(int(sequence.loss_mask.sum()), np.float32)
    return sequence.temperatures[sequence.loss_mask]


def _pack(pieces: list[_Piece], share_prompts: bool, multiple: int) -> PackedBatch:
    members = [m for piece in pieces for m in piece.members]
    index = packed_index.build([p.members for p in pieces] if share_prompts else [(m,) for m in members], multiple)
    return PackedBatch(
        **vars(index),
        temperatures=np.concatenate([np.zeros(0, np.float32), *map(_temperatures, members)]),
        trajectory_ids=np.array([m.trajectory_id for m in members], np.int64),
        group_ids=np.array([m.group_id for m in members], np.int64),
        is_supervised=np.array([m.is_supervised for m in members], np.bool_),
        advantages=np.array([m.advantage for m in members], np.float32),
        weights=np.array([m.weight for m in members], np.float32),
    )
