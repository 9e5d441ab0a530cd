"""Two ranks that save, load and export under every layout, forked from the zygote.

What they find goes to FOLDER/results.pt, judged by `test_checkpoint_layouts.py`.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.errors import CheckpointError
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import checkpoint, parallel
from megatron_rl.training.trainer import Trainer
from megatron_rl.weights import atomic, hf, sharded
from megatron_rl.weights.convert import convert
from megatron_rl.weights.folder import write_model_folder
from tests.distributed.ranks import Meeting, run_ranks
from tests.training.material import flat, make_config, make_groups

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP": {"tensor_parallel": 2},
    "TP+SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP": {"pipeline_parallel": 2},
    "VPP": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "CP": {"context_parallel": 2},
    "DP, distributed optimizer": {"distributed_optimizer": True},
}
BUCKET_BYTES = 9_000


def trainer_of(folder: Path, training: dict[str, Any], dtype: str = "float32") -> Trainer:
    config = make_config(folder, dtype=dtype, training=training)
    if dist.get_world_size() > 1:
        parallel.place_ranks(config)
    return Trainer(config, ModelConfig.from_folder(folder))


def step(trainer: Trainer) -> float:
    batch = trainer.distribute([flat(make_groups())] if trainer.is_master else None)
    return trainer.step(batch, MirrorDescent(tau=0.3), None)["loss"]


def saved(folder: Path) -> Any:
    """TP=2: one step, a checkpoint, two more steps."""
    trainer = trainer_of(folder / "qwen3", LAYOUTS["TP"])
    trainer.load_hf(folder / "qwen3")
    step(trainer)
    checkpoint.save(trainer, folder / "run", 1, {"version": 1} if trainer.is_master else {}, keep=1)
    return [step(trainer), step(trainer)]


def continued(folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """The saved weights as this layout reads them, and its next two losses."""
    trainer = trainer_of(folder / "qwen3", training)
    path = checkpoint.latest(folder / "run")
    assert path is not None
    extra = checkpoint.load(trainer, path)
    weights = {name: tensor.clone() for name, tensor in hf.export(trainer.chunks)}
    return {"extra": extra, "weights": weights, "losses": [step(trainer), step(trainer)]}


def rewritten(folder: Path) -> None:
    """bfloat16, main weights split over DP ranks after one step; saved, loaded by another layout, saved again."""
    trainer = trainer_of(folder / "qwen3", {"distributed_optimizer": True}, "bfloat16")
    trainer.load_hf(folder / "qwen3")
    step(trainer)
    path = checkpoint.save(trainer, folder / "split", 1, {}, keep=1)
    trainer = trainer_of(folder / "qwen3", LAYOUTS["PP"], "bfloat16")
    checkpoint.load(trainer, path)
    checkpoint.save(trainer, folder / "whole", 1, {}, keep=1)


def exported_as_read(folder: Path, model: str, training: dict[str, Any]) -> list[bool]:
    """Whether each rank exports the bytes it read, in buckets that are equal on both."""
    trainer = trainer_of(folder / model, training)
    trainer.load_hf(folder / model)
    source = load_file(folder / model / "model.safetensors")
    buckets = [[(name, tensor.clone()) for name, tensor in bucket] for bucket in trainer.export_buckets(BUCKET_BYTES)]
    tensors = dict(tensor for bucket in buckets for tensor in bucket)
    plans = everywhere([[name for name, _ in bucket] for bucket in buckets])
    same = tensors.keys() == source.keys() and all(torch.equal(tensors[name], source[name]) for name in source)
    write_model_folder(
        trainer.export_buckets(BUCKET_BYTES),
        folder / "written" / model / "-".join(training),
        source=folder / model,
        write=trainer.is_master,
        shard_bytes=30_000,
    )
    return everywhere(same and plans[0] == plans[1])


def failures(folder: Path) -> dict[str, list[str]]:
    """What both ranks raise when only one cannot write."""
    trainer = trainer_of(folder / "qwen3", LAYOUTS["TP"])
    trainer.load_hf(folder / "qwen3")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save() -> None:
        checkpoint.save(trainer, folder / "run", 2, {}, keep=1)

    def export() -> None:
        target = folder / "never"
        write_model_folder(trainer.export_buckets(9_000), target, source=folder / "qwen3", write=trainer.is_master)

    found = {}
    for what, rank, owner, name, action in (
        ("weights of rank 1", 1, sharded.torch_checkpoint.FileSystemWriter, "write_data", save),
        ("commit of rank 0", 0, atomic, "commit", save),
        ("export of rank 0", 0, atomic, "commit", export),
    ):
        original = getattr(owner, name)
        if dist.get_rank() == rank:
            setattr(owner, name, full)
        said = "nothing"
        try:
            action()
        except CheckpointError as e:
            said = str(e)
        setattr(owner, name, original)
        found[what] = everywhere(said)
    return found


def everywhere(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save_and_load(folder: str) -> int:
    return run_ranks(run_rank, 2, Path(folder))


def run_rank(meeting: Meeting, folder: Path) -> None:
    meeting.prepare()
    parallel.initialize(make_config(folder / "qwen3"))
    results: dict[str, Any] = {"saved": saved(folder)}
    results["continued"] = {name: continued(folder, training) for name, training in LAYOUTS.items()}
    rewritten(folder)
    results["exported"] = {
        (model, name): exported_as_read(folder, model, LAYOUTS[name])
        for model in ("qwen3", "qwen2")
        for name in ("TP", "PP", "VPP")
    }
    results["failures"] = failures(folder)
    parallel.shutdown()
    for source, target, to, layout in (
        ("qwen2", "converted/megatron", "megatron", LAYOUTS["TP"]),
        ("converted/megatron", "converted/hf", "hf", LAYOUTS["PP"]),
    ):
        meeting.prepare()
        convert(folder / source, folder / target, to=to, dtype="float32", **layout)
    if meeting.rank == 0:
        torch.save(results, folder / "results.pt")
