"""Every parallel layout under test, and what each rank does in it. Run by `launch.py`, judged by `test_training.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.algorithms.dpo import DPO
from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.errors import MegatronRLError
from megatron_rl.model_config import ModelConfig
from megatron_rl.training.optimizer import MOMENTS
from megatron_rl.training.trainer import Trainer
from megatron_rl.types import TrainingSequence
from tests.training.material import exported, flat, gradients, make_config, make_groups, make_model

TAU = 0.3
MAX_TOKENS = 16  # of a micro-batch: splits groups over micro-batches and ranks
VPP = {"pipeline_parallel": 2, "virtual_pipeline": 2}
SP = {"tensor_parallel": 2, "sequence_parallel": True}

PREFERENCE = {"DPO, CP": {"context_parallel": 2}, "DPO, PP": {"pipeline_parallel": 2}, "DPO, DP": {"distributed_optimizer": True}}

# name: (ranks, model, settings of `training`)
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "TP": (2, "qwen3", {"tensor_parallel": 2}),
    "TP, more ranks than KV heads": (2, "qwen2", {"tensor_parallel": 2}),
    "TP+SP": (2, "qwen3", SP),
    "TP+SP, recomputed": (2, "qwen2", SP | {"recompute": True}),
    "PP": (2, "qwen3", {"pipeline_parallel": 2}),
    "PP, untied": (2, "qwen2", {"pipeline_parallel": 2, "recompute": True}),
    "VPP": (2, "qwen3", VPP),
    "CP": (2, "qwen3", {"context_parallel": 2}),
    "CP, one KV head, prompts repeated": (2, "qwen2", {"context_parallel": 2, "share_prompts": False}),
    "DP": (2, "qwen3", {}),
    "DP, distributed optimizer": (2, "qwen3", {"distributed_optimizer": True}),
    "TPxPP": (4, "qwen3", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "TPxCP": (4, "qwen3", {"tensor_parallel": 2, "context_parallel": 2}),
    "TP(SP)xDP, distributed optimizer": (4, "qwen3", SP | {"distributed_optimizer": True}),
    "TP(SP)xCP": (4, "qwen2", SP | {"context_parallel": 2}),
    "PPxCP": (4, "qwen3", {"pipeline_parallel": 2, "context_parallel": 2}),
}


def make_models(folder: Path) -> None:
    """Qwen3: tied, with norms of queries and keys. Qwen2: untied, biased, one KV head. Both have an odd vocabulary."""
    make_model(folder / "qwen3", "qwen3", tied=True)
    make_model(folder / "qwen2", "qwen2", tied=False, num_key_value_heads=1)


def minibatches() -> list[list[TrainingSequence]]:
    """Two optimizer steps, so that tau acts in the second. Unequal lengths, partly masked."""
    groups = make_groups()
    return [[dataclasses.replace(s, weight=2 * s.weight) for s in flat(part)] for part in (groups[:2], groups[2:])]


def config_of(model_folder: Path, training: dict[str, Any]) -> Any:
    return make_config(model_folder, training=training)


def train(config: Any) -> dict[str, Any]:
    """Two steps; metrics of the iteration, gradients of the last step, weights at its end, the same on every rank."""
    trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
    trainer.load_hf(config.model.folder)
    batch = trainer.distribute(minibatches() if trainer.is_master else None)
    metrics = trainer.step(batch, MirrorDescent(TAU), trainer.log_probs(batch))
    sharded = config.training.distributed_optimizer  # then a rank keeps only its part of the gradients
    found = {"metrics": metrics, "gradients": {} if sharded else gradients(trainer), "weights": exported(trainer)}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (metrics, {n: float(w.double().sum()) for n, w in found["weights"].items()}))
    assert all(other == everywhere[0] for other in everywhere), "ranks disagree"
    return found


def prefer(config: Any) -> dict[str, Any]:
    """Two DPO steps on pairs, the second with a log-ratio: metrics, and the weights at the end."""
    trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
    trainer.load_hf(config.model.folder)
    pairs = make_groups(num_groups=7, group_size=2)[1:]  # of the first, a member carries no loss
    steps = [
        [dataclasses.replace(s, advantage=1.0 - 2 * (s.trajectory_id % 2), weight=1 / 3) for s in flat(part)]
        for part in (pairs[:3], pairs[3:])
    ]
    batch = trainer.distribute(steps if trainer.is_master else None, whole_groups=True)
    metrics = trainer.step(batch, DPO(0.3), trainer.log_probs(batch))
    return {"metrics": metrics, "weights": exported(trainer)}


def refuse(config: Any) -> list[str]:
    """A loss that is not finite on one rank: what each rank raised, and that none of them moved."""
    trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
    trainer.load_hf(config.model.folder)
    before = exported(trainer)
    sequences = flat(make_groups())
    poisoned = [dataclasses.replace(s, advantage=float("nan")) if s.trajectory_id == 7 else s for s in sequences]
    batch = trainer.distribute([poisoned])
    said = "nothing"
    try:
        trainer.step(batch, MirrorDescent(TAU), None)
    except MegatronRLError as e:
        said = str(e)
    assert all(torch.equal(value, before[name]) for name, value in exported(trainer).items())
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    return everywhere


def round_trip(config: Any) -> bool:
    """bfloat16 weights, main weights and moments split over ranks: what was set is read back whole, on every rank."""
    trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
    trainer.load_hf(config.model.folder)
    torch.manual_seed(1)
    values = {n: torch.randn(p.shape) for n, p in trainer.chunks[0].named_parameters()}
    for name, parameter in trainer.chunks[0].named_parameters():
        trainer.optimizer.set_main_weight(parameter, values[name])
    optimizer, parameters = trainer.optimizer, list(trainer.chunks[0].named_parameters())
    found = [torch.equal(optimizer.main_weight(p), values[n]) for n, p in parameters]
    for moment in MOMENTS:
        for name, parameter in parameters:
            optimizer.set_moment(moment, parameter, 2 * values[name], num_steps=3)
        found += [torch.equal(optimizer.moment(moment, p), 2 * values[n]) for n, p in parameters]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, all(found))
    return all(everywhere)
