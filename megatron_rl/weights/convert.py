"""Conversion between a Hugging Face model folder and a Megatron distributed checkpoint, both ways.

One process converts for any layout, because the checkpoint does not depend on it. A model that one process cannot hold is
converted under torchrun with tensor and pipeline parallelism. The checkpoint has the form of a run's, so a run can be
started from it and a run's checkpoints can be converted. Command: `tools/convert_checkpoint.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megatron_rl.config import Config, check_model
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import checkpoint, parallel
from megatron_rl.training.model import build_model
from megatron_rl.weights import hf, sharded
from megatron_rl.weights.folder import write_model_folder

Dtype = Literal["float32", "bfloat16"]

# What the loop finds beside the weights when a run starts from a converted checkpoint.
FIRST = {"iteration": 0, "version": 0, "sampler": None}


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["megatron", "hf"],
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: Dtype = "bfloat16",
) -> None:
    """Write `target` from `source`. A checkpoint always holds float32; `dtype` is the folder's, when `to` is "hf".

    Collective under torchrun; joins the process groups and leaves them. Raises ConfigError for an existing target or a
    layout that does not fit, DataError for a bad model folder, CheckpointError for a bad checkpoint or a full disk."""
    source, target = Path(source), Path(target)
    if target.exists():
        raise ConfigError(f"{target}: already exists; name a new folder")
    if min(tensor_parallel, pipeline_parallel) < 1:
        raise ConfigError(f"tensor_parallel={tensor_parallel}, pipeline_parallel={pipeline_parallel}: at least 1 rank each")
    if to == "hf" and not (source / checkpoint.STATE_FILE).is_file():
        raise DataError(
            f"{source}: not a checkpoint ({checkpoint.STATE_FILE} is missing); give runs/NAME/checkpoints/iteration_N"
        )
    folder = source if to == "megatron" else source / checkpoint.MODEL_FOLDER
    model = ModelConfig.from_folder(folder)
    config = _config(folder, "float32" if to == "megatron" else dtype, tensor_parallel, pipeline_parallel)
    check_model(config, model)
    launch = parallel.initialize(config)
    try:
        chunks = build_model(config, model)
        if to == "megatron":
            hf.load(chunks, source)
            checkpoint.write(target, chunks, torch.Tensor.detach, source, FIRST)
            return
        checkpoint.read_extra(source)
        with torch.no_grad():
            for parameter, value in sharded.load(chunks, source):
                parameter.copy_(value)
        buckets = hf.export_buckets(chunks, config.weights.bucket_bytes)
        write_model_folder(buckets, target, source=folder, write=launch.rank == 0)
    finally:
        parallel.shutdown()


def _config(folder: Path, dtype: str, tensor_parallel: int, pipeline_parallel: int) -> Config:
    """Only the model and the layout count here; nothing is generated or trained."""
    return Config.model_validate(
        {
            "run": {"folder": folder, "iterations": 1},
            "model": {"folder": folder, "dtype": dtype},
            "data": {"source": "jsonl", "path": folder, "max_prompt_tokens": 1},
            "rollout": {"groups_per_iteration": 1, "token_budget": 1, "max_response_tokens": 1},
            "training": {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel},
        }
    )
