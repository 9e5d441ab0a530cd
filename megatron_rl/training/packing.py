"""Packing: which sequences share a micro-batch, on which data-parallel rank, and where every token lies in it.

A pure planner: training sequences in, numpy arrays out; no process group, no model. The layout of a pack is a tree. For each
group: its prompt's tokens once, at positions 0..P-1, then each response, at positions P.. (`share_prompts=False`: a prompt
for each response). A response's rows end before its last loss-bearing token, because that one predicts nothing more.
The first token of every response is predicted by the prompt's last row, which they share.
Groups stay whole unless one alone exceeds the limit; then it is split and its prompt repeated. Next: `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
class PackedBatch:
    """One micro-batch. Loss tokens are listed by sequence, in order; `sequence_ids` index the per-sequence arrays."""

    token_ids: np.ndarray  # int64 [tokens], padding included
    positions: np.ndarray  # int64 [tokens]
    branches: tuple[Branch, ...]  # together they cover every row; padding is a branch of its own
    num_padding: int
    loss_rows: np.ndarray  # int64 [loss_tokens]: the row whose hidden state predicts the token
    targets: np.ndarray  # int64 [loss_tokens]
    sequence_ids: np.ndarray  # int64 [loss_tokens]
    behaviour_log_probs: np.ndarray  # float32 [loss_tokens], the engine's
    weight_versions: np.ndarray  # int32 [loss_tokens]
    trajectory_ids: np.ndarray  # int64 [sequences]
    advantages: np.ndarray  # float32 [sequences]
    weights: np.ndarray  # float32 [sequences]


@dataclass(frozen=True)
class _Piece:
    """Sequences of one group that stay in one micro-batch, and the rows they need."""

    members: tuple[TrainingSequence, ...]
    num_rows: int


def plan(
    sequences: Sequence[TrainingSequence],
    *,
    max_tokens: int,
    share_prompts: bool = True,
    multiple: int = 1,
    data_parallel: int = 1,
    micro_batch_multiple: int = 1,
) -> list[list[PackedBatch]]:
    """The micro-batches of each data-parallel rank: equally many on every rank, a multiple of `micro_batch_multiple`, the
    i-th of similar size on all. Each has at most `max_tokens` rows, unless one sequence alone is longer, before it is
    padded to a multiple of `multiple`. Sequences without a loss-bearing token are left out."""
    pieces = _pieces([s for s in sequences if _num_rows(s) is not None], max_tokens, share_prompts)
    step = data_parallel * micro_batch_multiple
    num_bins = max(1, -(-len(_best_fit(pieces, max_tokens)) // step)) * step
    bins = _balanced(pieces, max_tokens, num_bins)
    bins.sort(key=lambda b: -sum(p.num_rows for p in b))
    packed = [_pack(b, share_prompts, multiple) for b in bins]
    return [packed[rank::data_parallel] for rank in range(data_parallel)]


def _num_rows(sequence: TrainingSequence) -> int | None:
    """Response rows to compute: one for each token before the last loss-bearing one. None: no token bears loss."""
    bearing = np.flatnonzero(sequence.loss_mask)
    return int(bearing[-1]) if len(bearing) else None


def _pieces(sequences: Sequence[TrainingSequence], max_tokens: int, share_prompts: bool) -> list[_Piece]:
    """Whole groups where they fit, largest first."""
    groups: dict[int, list[TrainingSequence]] = {}
    for sequence in sequences:
        assert len(sequence.prompt_ids), "a prompt has at least one token"
        groups.setdefault(sequence.group_id, []).append(sequence)
    pieces = [piece for members in groups.values() for piece in _split(members, max_tokens, share_prompts)]
    return sorted(pieces, key=lambda p: -p.num_rows)


def _split(members: list[TrainingSequence], max_tokens: int, share_prompts: bool) -> list[_Piece]:
    """Cut a group into pieces of at most `max_tokens` rows; a single longer sequence is a piece."""
    pieces: list[_Piece] = []
    current: list[TrainingSequence] = []
    rows = 0
    for member in members:
        own = _num_rows(member) or 0
        added = own if current and share_prompts else own + len(member.prompt_ids)
        if current and rows + added > max_tokens:
            pieces.append(_Piece(tuple(current), rows))
            current, rows, added = [], 0, own + len(member.prompt_ids)
        current.append(member)
        rows += added
    return [*pieces, _Piece(tuple(current), rows)]


def _best_fit(pieces: list[_Piece], max_tokens: int) -> list[list[_Piece]]:
    """Each piece, largest first, into the fullest bin it fits in."""
    bins: list[list[_Piece]] = []
    room: list[int] = []
    for piece in pieces:
        fitting = [i for i, left in enumerate(room) if left >= piece.num_rows]
        if fitting:
            i = min(fitting, key=lambda b: room[b])
        else:
            i = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[i].append(piece)
        room[i] -= piece.num_rows
    return bins


def _balanced(pieces: list[_Piece], max_tokens: int, num_bins: int) -> list[list[_Piece]]:
    """Each piece, largest first, into the emptiest bin; the tighter best fit, with empty bins, where that overflows."""
    bins: list[list[_Piece]] = [[] for _ in range(num_bins)]
    rows = [0] * num_bins
    for piece in pieces:
        i = min(range(num_bins), key=lambda b: rows[b])
        if bins[i] and rows[i] + piece.num_rows > max_tokens:
            tight = _best_fit(pieces, max_tokens)
            return tight + [[] for _ in range(num_bins - len(tight))]
        bins[i].append(piece)
        rows[i] += piece.num_rows
    return bins


class _Pack:
    """A pack being written; rows only grow."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.branches: list[Branch] = []
        self.loss_rows: list[np.ndarray] = []
        self.num_rows = 0

    def append(self, token_ids: np.ndarray, first_position: int) -> int:
        """Returns the first of the new rows."""
        start = self.num_rows
        self.tokens.append(token_ids)
        self.positions.append(np.arange(first_position, first_position + len(token_ids)))
        self.num_rows += len(token_ids)
        return start

    def append_members(self, members: Sequence[TrainingSequence]) -> None:
        """One prompt, then the responses that attend to it."""
        prompt = members[0].prompt_ids
        prompt_start, prompt_length = self.append(prompt, 0), len(prompt)
        for member in members:
            num_rows = _num_rows(member) or 0
            start = self.append(member.response_ids[:num_rows], prompt_length)
            bearing = np.flatnonzero(member.loss_mask)
            self.loss_rows.append(np.where(bearing > 0, start + bearing - 1, prompt_start + prompt_length - 1))
            # A response without rows of its own adds nothing to attend: the prompt's branch is needed only once.
            if num_rows or member is members[0]:
                self.branches.append(Branch(start, num_rows, prompt_start, prompt_length))

    def pad(self, multiple: int) -> int:
        missing = -self.num_rows % multiple if self.num_rows else multiple
        if missing:
            self.branches.append(Branch(self.append(np.zeros(missing, np.int64), 0), missing))
        return missing


def _pack(pieces: list[_Piece], share_prompts: bool, multiple: int) -> PackedBatch:
    pack = _Pack()
    members = [m for piece in pieces for m in piece.members]
    for family in [p.members for p in pieces] if share_prompts else [(m,) for m in members]:
        pack.append_members(family)
    num_padding = pack.pad(multiple)
    return PackedBatch(
        token_ids=_joined(pack.tokens, np.int64),
        positions=_joined(pack.positions, np.int64),
        branches=tuple(pack.branches),
        num_padding=num_padding,
        loss_rows=_joined(pack.loss_rows, np.int64),
        targets=_joined([m.response_ids[m.loss_mask] for m in members], np.int64),
        sequence_ids=_joined([np.full(int(m.loss_mask.sum()), i) for i, m in enumerate(members)], np.int64),
        behaviour_log_probs=_joined([m.behaviour_log_probs[m.loss_mask] for m in members], np.float32),
        weight_versions=_joined([m.weight_versions[m.loss_mask] for m in members], np.int32),
        trajectory_ids=np.array([m.trajectory_id for m in members], np.int64),
        advantages=np.array([m.advantage for m in members], np.float32),
        weights=np.array([m.weight for m in members], np.float32),
    )


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
