"""One packed micro-batch as tensors, cut to what this rank computes.

Under context parallelism a rank takes a contiguous slice of the pack's rows and the loss tokens predicted by them; the
attention plan covers the whole pack, because attention trades tokens for heads. Next: `trainer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.kernels import packed_index
from megatron_rl.training.attention import TreeParams, plan_attention, rotary_tables
from megatron_rl.training.packing import PackedBatch


@dataclass(frozen=True)
class MicroBatch:
    """Loss tokens are this context-parallel rank's; sequences are all of the pack's."""

    index: int  # among the micro-batches of this data-parallel rank's optimizer step
    token_ids: torch.Tensor  # int64 [1, tokens / CP]
    params: TreeParams
    loss_rows: torch.Tensor  # int64 [loss_tokens], rows of this rank's slice
    targets: torch.Tensor  # int64 [loss_tokens]
    sequence_ids: torch.Tensor  # int64 [loss_tokens]
    behaviour_log_probs: torch.Tensor  # float32 [loss_tokens]
    weight_versions: torch.Tensor  # int32 [loss_tokens]
    temperatures: torch.Tensor  # float32 [loss_tokens]
    advantages: torch.Tensor  # float32 [sequences]
    weights: torch.Tensor  # float32 [sequences]
    group_ids: torch.Tensor  # int64 [sequences]
    is_supervised: torch.Tensor  # bool [sequences]
    trajectory_ids: np.ndarray  # int64 [sequences]


@dataclass(frozen=True)
class Place:
    """What a micro-batch is cut and made for."""

    context_rank: int
    context_size: int
    device: torch.device
    inverse_frequencies: torch.Tensor  # float32 [head_dim / 2]


def prepare(packed: PackedBatch, index: int, place: Place) -> MicroBatch:
    """The planner has padded the pack to a multiple of the context-parallel size."""
    own = packed_index.context_slice(packed, place.context_rank, place.context_size)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(place.device)

    cos, sin = rotary_tables(tensor(own.positions), place.inverse_frequencies)
    plan = plan_attention(packed.branches, len(packed.token_ids), place.device)
    return MicroBatch(
        index=index,
        token_ids=tensor(own.token_ids)[None],
        params=TreeParams(qkv_format="thd", plan=plan, cos=cos, sin=sin),
        loss_rows=tensor(own.loss_rows),
        targets=tensor(own.targets),
        sequence_ids=tensor(own.sequence_ids),
        behaviour_log_probs=tensor(own.behaviour_log_probs),
        weight_versions=tensor(own.weight_versions),
        temperatures=tensor(packed.temperatures[own.loss_tokens]),
        advantages=tensor(packed.advantages),
        weights=tensor(packed.weights),
        group_ids=tensor(packed.group_ids),
        is_supervised=tensor(packed.is_supervised),
        trajectory_ids=packed.trajectory_ids,
    )
