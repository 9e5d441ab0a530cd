"""Where every token of a micro-batch lies: the tree of prompts and responses as flat arrays, in one pass of csrc/packing/, and
what of them a context-parallel rank computes.

For each family: its prompt's tokens once, at positions 0..P-1, then each response, at positions P... A response's rows end
before its last loss-bearing token, because that one predicts nothing more. The first token of every response is predicted by
the prompt's last row, which they share. Which sequences share a pack is decided in `training/packing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.errors import KernelError
from megatron_rl.kernels.build import state
from megatron_rl.types import TrainingSequence


@dataclass(frozen=True)
class PackedIndex:
    """A run is what follows each other in rows: a prompt, a response that has rows, the padding. Loss tokens are listed by
    sequence, in order; sequences count over all families."""

    token_ids: np.ndarray  # int64 [tokens], padding included
    positions: np.ndarray  # int64 [tokens]
    segment_ids: np.ndarray  # int32 [tokens]: the run of each row
    cu_seqlens: np.ndarray  # int32 [runs + 1]: the first row of each run, and the end
    parents: np.ndarray  # int32 [runs]: the run of its prompt; a prompt, or padding, is its own
    num_padding: int
    loss_rows: np.ndarray  # int64 [loss_tokens]: the row whose hidden state predicts the token
    targets: np.ndarray  # int64 [loss_tokens]
    sequence_ids: np.ndarray  # int64 [loss_tokens]
    behaviour_log_probs: np.ndarray  # float32 [loss_tokens], the engine's
    weight_versions: np.ndarray  # int32 [loss_tokens]


@dataclass(frozen=True)
class ContextSlice:
    """One context-parallel rank's share of a pack: consecutive rows, and the loss tokens they predict, in the pack's order."""

    token_ids: np.ndarray  # int64 [tokens / size]
    positions: np.ndarray  # int64 [tokens / size]
    loss_tokens: np.ndarray  # int64 [own loss tokens]: which of the pack's
    loss_rows: np.ndarray  # int64 [own loss tokens], counted from the rank's first row
    targets: np.ndarray  # int64 [own loss tokens]
    sequence_ids: np.ndarray  # int64 [own loss tokens], of the pack's sequences
    behaviour_log_probs: np.ndarray  # float32 [own loss tokens]
    weight_versions: np.ndarray  # int32 [own loss tokens]


def build(families: Sequence[Sequence[TrainingSequence]], multiple: int) -> PackedIndex:
    """The members of a family share a prompt, the first one's; each has a token that bears loss. Rows are padded to a multiple
    of `multiple`; a pack without rows is all padding. Raises KernelError for an array of another dtype, rank or length than
    TrainingSequence says, an empty family or prompt, and 2**31 rows."""
    try:
        return PackedIndex(*state.packed_index(families, multiple))
    except ValueError as e:
        raise KernelError(str(e)) from e


def context_slice(index: PackedIndex, rank: int, size: int) -> ContextSlice:
    """The `rank`-th of `size` equal shares of the rows. Raises KernelError where `size` does not divide them."""
    try:
        first, end, *loss = state.context_slice(index, rank, size)
    except ValueError as e:
        raise KernelError(str(e)) from e
    return ContextSlice(index.token_ids[first:end], index.positions[first:end], *loss)
