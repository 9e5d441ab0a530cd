"""A model's float32 weights as a Megatron distributed checkpoint, independent of the parallel layout.

Keys, shapes and shards are Megatron-Core's own, so any TP, PP, VPP, CP and DP can read what another wrote. Departure from
its save: each rank writes its file itself. Megatron's writer starts processes that import the main script again, which
takes seconds and never ends where that script has no main guard. When a checkpoint becomes current: `training/checkpoint.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)

from megatron_rl.errors import CheckpointError
from megatron_rl.weights.tables import parameters

if TYPE_CHECKING:
    from megatron_rl.model_config import ModelConfig
    from megatron_rl.training.model import PolicyModel


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """Megatron's format through torch's plain writer. A failing rank makes all of them raise."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        shards: dict[str, list[ShardedBase]] = defaultdict(list)
        for shard in nested_values(sharded_state_dict):
            if is_main_replica(shard.replica_id):
                shards[shard.key].append(shard)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(dict(shards), is_loading=False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def num_bytes(model: ModelConfig) -> int:
    """Size of the weights in a checkpoint [bytes]."""
    return sum(4 * torch.Size(t.shape).numel() for p in parameters(model) for t in p.tensors)


def save(chunks: Sequence[PolicyModel], folder: Path, values: Callable[[torch.nn.Parameter], torch.Tensor]) -> None:
    """Write into the empty `folder`; `values` gives a parameter's float32 weights in its own shape. Collective.

    Raises CheckpointError on every rank when one cannot write."""
    state = {name: sharded for name, _, sharded in _sharded(chunks, values)}
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=_SaveInProcess())
    # torch.save reports a full disk as RuntimeError; torch's CheckpointException carries every rank's cause
    except (torch_checkpoint.CheckpointException, OSError, RuntimeError) as e:
        raise CheckpointError(f"{folder}: cannot write: {_cause(e)}") from e


def load(chunks: Sequence[PolicyModel], folder: Path) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter of this rank with its float32 weights, on the CPU. Collective.

    Raises CheckpointError where `folder` is no checkpoint, is damaged, or is of a model of another shape."""
    entries = list(_sharded(chunks, lambda p: torch.zeros(p.shape, dtype=torch.float32)))
    try:
        state = dist_checkpointing.load({name: sharded for name, _, sharded in entries}, str(folder))
    except (torch_checkpoint.CheckpointException, CheckpointingException, OSError, KeyError, RuntimeError) as e:
        raise CheckpointError(f"{folder}: cannot read: {_cause(e)}") from e
    for name, parameter, _ in entries:
        yield parameter, state[name]


def _sharded(
    chunks: Sequence[PolicyModel], values: Callable[[torch.nn.Parameter], torch.Tensor]
) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
    """(unique name, parameter, Megatron's description of this rank's shard, holding `values`)."""
    metadata = {
        "non_homogeneous_layers": True,  # one key a layer, as newer Megatron-Core always writes
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    for number, chunk in enumerate(chunks):
        for name, sharded in chunk.sharded_state_dict(metadata=metadata).items():
            if isinstance(sharded.data, torch.nn.Parameter):  # the rest is empty extra state of fp8 layers
                parameter = sharded.data
                sharded.data = values(parameter)
                if hasattr(sharded, "dtype"):
                    sharded.dtype = torch.float32
                yield f"{number}.{name}", parameter, sharded


def _cause(error: BaseException) -> str:
    """The first rank's reason, without torch's traceback."""
    if isinstance(error, torch_checkpoint.CheckpointException) and error.failures:
        rank, (reason, _) = sorted(error.failures.items(), key=lambda item: item[0])[0]
        return f"rank {rank}: {reason}"
    return str(error)
