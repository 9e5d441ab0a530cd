"""Adam with float32 main weights, over Megatron's data-parallel gradient buffers.

Gradients are float32 and summed over data- and context-parallel ranks, never averaged: the loss's weights hold the global
denominator. The trainer throws the moments away at the start of every iteration (paper 2.3.2: each iteration is a different
problem), or keeps them from step to step. Adam is apex's or TransformerEngine's where installed, else torch's.
`main_weight`, `moment` and their setters are what `checkpoint.py` reads and writes. Next: `trainer.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rl.config import TrainerConfig
from megatron_rl.training.model import PolicyModel, compute_dtype

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam calls them, whosever it is


class PolicyOptimizer:
    """Wraps the chunks for data parallelism and owns their gradients, main weights and moments."""

    def __init__(self, config: TrainerConfig, chunks: list[PolicyModel]) -> None:
        sharded = config.training.distributed_optimizer
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
        self.wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
        self._clip_grad = config.training.optimizer.clip_grad
        self._megatron = get_megatron_optimizer(_megatron_config(config), self.wrapped, use_gloo_process_groups=False)
        assert len(self._megatron.chained_optimizers) == 1, "a dense model has one Megatron optimizer"
        self._parts = self._megatron.chained_optimizers[0]
        self.num_steps = 0  # that the moments remember
        adam = type(self._adam)
        if adam is torch.optim.AdamW:  # Megatron asks for torch's default, which goes through memory once an operation
            for group in self._adam.param_groups:
                group |= {"fused": True, "foreach": False}
        if dist.get_rank() == 0:
            log.info("optimizer: %s.%s, %s", adam.__module__, adam.__name__, type(self._parts).__name__)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._parts.optimizer

    def reset(self) -> None:
        """Forget the moments and the step count, as if just built. Their memory is free until the first step, while
        activations need it. apex and TransformerEngine keep the count in the group."""
        self.num_steps = 0
        self._adam.state.clear()
        for group in self._adam.param_groups:
            group.pop("step", None)

    @property
    def moments(self) -> list[torch.Tensor]:
        """Everything Adam remembers, step counts included; empty before the first step and after `reset`."""
        return [value for state in self._adam.state.values() for value in state.values() if torch.is_tensor(value)]

    def set_lr(self, lr: float) -> None:
        """From the next step on."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    @property
    def main_weights(self) -> list[torch.Tensor]:
        """What Adam steps on, on this rank; a float32 model's are its parameters, or views of them."""
        return [weight for group in self._adam.param_groups for weight in group["params"]]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The flat buffers that all gradients are views of."""
        return [buffer.grad_data for chunk in self.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def forget_gradients(self) -> None:
        """No tensor holds gradients beside the buffers; `zero_grad` comes before they are added up again."""
        self._megatron.zero_grad()

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self._megatron.zero_grad()

    def gradient_norm(self) -> float:
        """Collective: L2 norm over the whole model, of gradients already reduced. Not finite where any gradient is not."""
        self._megatron.prepare_grads()
        return float(self._megatron.get_grad_norm())

    def step(self, gradient_norm: float) -> None:
        """Collective: clip to `training.optimizer.clip_grad`, one Adam step, main weights to model weights."""
        if self._clip_grad > 0:
            clip_grad_by_total_norm_fp32(self._parts.get_parameters(), self._clip_grad, gradient_norm)
        self._megatron.step_with_ready_grads()
        self.num_steps += 1

    def reload(self) -> None:
        """Main weights from model weights; needed after the model's weights were set."""
        self._megatron.reload_model_params()

    @torch.no_grad()
    def main_weight(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """float32, the parameter's shape on this tensor- and pipeline-parallel rank; for a float32 model the parameter itself.

        Collective over data-parallel ranks with the distributed optimizer: call it for the same parameters in the same
        order everywhere, e.g. `for p in chunk.parameters()`."""
        if parameter.dtype == torch.float32:
            return parameter.detach()
        if not isinstance(self._parts, DistributedOptimizer):
            return parameter.main_param.detach()  # type: ignore[attr-defined]
        return self._gathered(parameter, self._held(parameter))

    @torch.no_grad()
    def set_main_weight(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """The inverse: main weight and model weight from a full float32 tensor. Not collective."""
        parameter.copy_(value)
        if parameter.dtype == torch.float32:
            return
        if not isinstance(self._parts, DistributedOptimizer):
            parameter.main_param.copy_(value)  # type: ignore[attr-defined]
            return
        shard = self._shard(parameter)
        if shard is not None:
            parameter.main_param.copy_(value.reshape(-1)[shard])  # type: ignore[attr-defined]

    @torch.no_grad()
    def moment(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        """float32, one of MOMENTS, in the parameter's shape on this tensor- and pipeline-parallel rank. There must have been a
        step. Collective as `main_weight`."""
        held = self._held(parameter)
        own = None if held is None else self._adam.state[held][name]
        if isinstance(self._parts, DistributedOptimizer):
            return self._gathered(parameter, own)
        assert own is not None, "without a distributed optimizer every rank holds all moments of its parameters"
        return own

    @torch.no_grad()
    def set_moment(self, name: str, parameter: torch.nn.Parameter, value: torch.Tensor, num_steps: int) -> None:
        """The inverse, from a full float32 tensor, with the count that goes with it. Not collective."""
        self.num_steps = num_steps
        held = self._held(parameter)
        if held is None:
            return
        shard = self._shard(parameter) if isinstance(self._parts, DistributedOptimizer) else None
        own = value if shard is None else value.reshape(-1)[shard]
        state = self._adam.state[held]
        state[name] = own.to(held.device, torch.float32, copy=True).view_as(held)
        if isinstance(self._adam, torch.optim.AdamW):
            state["step"] = torch.tensor(float(num_steps), device=held.device)
        else:
            for group in self._adam.param_groups:
                group["step"] = num_steps

    def _held(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """What Adam steps for it on this rank: itself, its float32 copy, or this data-parallel rank's shard of either."""
        if not isinstance(self._parts, DistributedOptimizer):
            return parameter if parameter.dtype == torch.float32 else parameter.main_param  # type: ignore[attr-defined]
        if parameter not in self._parts.model_param_gbuf_map:
            return None
        group, index = self._parts.model_param_group_index_map[parameter]
        return self._adam.param_groups[group]["params"][index]

    def _gathered(self, parameter: torch.nn.Parameter, own: torch.Tensor | None) -> torch.Tensor:
        """Collective over data-parallel ranks: the whole of what each holds a shard of."""
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        shard = self._shard(parameter)
        if shard is not None and own is not None:
            whole[shard] = own.reshape(-1)
        dist.all_reduce(whole, group=self._parts.data_parallel_group)
        return whole.view_as(parameter)

    def _shard(self, parameter: torch.nn.Parameter) -> slice | None:
        """The part of the flattened parameter whose main weight this data-parallel rank holds."""
        if parameter not in self._parts.model_param_gbuf_map:
            return None
        span = self._parts._get_model_param_range_map(parameter)["param"]
        return slice(span.start, span.end)


def _megatron_config(config: TrainerConfig) -> OptimizerConfig:
    o = config.training.optimizer
    dtype = compute_dtype(config)
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": config.initial_lr,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_eps": o.eps,
        "weight_decay": o.weight_decay,
        "clip_grad": o.clip_grad,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": config.training.distributed_optimizer,
    }
    return OptimizerConfig(**settings)
