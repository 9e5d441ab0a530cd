"""Processes and their places: torch.distributed, Megatron's parallel state, seeds. The only file that reads RANK and friends.

Under torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) the ranks find each other
there; without it there is one rank, which needs no port. gloo on a CPU; NCCL on CUDA, with a second gloo group for
plans and messages. Next: `model.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rl.config import TrainerConfig, check_layout
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.training import cpu

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """How this process was started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_host: str  # address of rank 0 that all ranks reach

    @classmethod
    def from_environment(cls) -> Launch:
        """Raises ConfigError when only part of the variables is set."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = {name: os.environ.get(name) for name in names}
        if all(value is None for value in found.values()):
            return cls(0, 1, 0, 1, "127.0.0.1")
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise ConfigError(f"environment: {', '.join(missing)} not set although others of {names} are; start with torchrun")
        rank, world_size, local_rank = (int(value or 0) for value in found.values())
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank, world_size, local_rank, local_world_size, os.environ.get("MASTER_ADDR", "127.0.0.1"))


def initialize(config: TrainerConfig) -> Launch:
    """Join the other ranks and take a place in the layout. Collectives that wait longer than
    `training.collective_timeout_s` fail. Raises ConfigError where the layout does not fit the number of ranks."""
    launch = Launch.from_environment()
    check_layout(config.training, launch.world_size)
    cpu.install()
    timeout = timedelta(seconds=config.training.collective_timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    else:
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // launch.local_world_size))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if launch.world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:  # one rank finds itself in its own memory: no port, no file
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    place_ranks(config)
    return launch


def place_ranks(config: TrainerConfig) -> None:
    """Megatron's parallel state and seeds, over an initialised torch.distributed; in place of those of another layout, if any."""
    t = config.training
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        t.tensor_parallel,
        t.pipeline_parallel,
        t.virtual_pipeline,
        context_parallel_size=t.context_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=t.collective_timeout_s / 60,
    )
    torch.manual_seed(config.run.seed)
    model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)


def on_rank_0(action: Callable[[], T]) -> T | None:
    """Collective: what rank 0 does while the others wait; its result there, None on them.

    A MegatronRLError of rank 0 is raised on every rank, so that none waits in a collective for one that has ended."""
    result = None
    failure: list[MegatronRLError | None] = [None]
    if dist.get_rank() == 0:
        try:
            result = action()
        except MegatronRLError as e:
            failure = [e]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    return result


def shutdown() -> None:
    """Leave the groups; afterwards `initialize` may be called again."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Messages:
    """Python objects between rank 0 and the others, over gloo whatever the backend of the tensors."""

    def __init__(self, timeout_s: float) -> None:
        plain = dist.get_backend() == "gloo"
        self._group = dist.group.WORLD if plain else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Collective: each rank gets its own of rank 0's values, one for each rank; the others' argument is ignored."""
        box: list[Any] = [None]
        dist.scatter_object_list(box, list(values) if values is not None and dist.get_rank() == 0 else None, group=self._group)
        return box[0]

    def share(self, value: Any) -> Any:
        """Collective: rank 0's value, on every rank."""
        return self.scatter([value] * dist.get_world_size())

    def gather_all(self, value: Any) -> list[Any]:
        """Collective: every rank's value, on every rank."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values
