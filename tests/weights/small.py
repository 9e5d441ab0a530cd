"""Small random models with nothing left at its initial value, and a rank of our own for one test module."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import parallel
from megatron_rl.training.model import PolicyModel, build_model


def perturbed(make_model: Callable[..., Path], folder: Path, family: str, *, dtype: str = "float32", **options: Any) -> Path:
    """A model whose biases are not zero and whose norms are not one; odd sizes unless `options` say otherwise."""
    shape = {"hidden": 48, "heads": 3, "kv_heads": 1, "head_dim": 16, "ffn": 80, "layers": 2} | options
    shards = shape.pop("max_shard_size", None)
    make_model(folder, family, **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (folder / "model.safetensors").unlink()
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def config_for(folder: Path, run_folder: Path | None = None, dtype: str = "float32", **training: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": run_folder or folder, "iterations": 1, "threads": 1},
            "model": {"folder": folder, "dtype": dtype},
            "data": {"source": "jsonl", "path": folder},
            "rollout": {"groups_per_iteration": 2, "token_budget": 8, "max_response_tokens": 8},
            "training": {"collective_timeout_s": 60, **training},
        }
    )


@contextlib.contextmanager
def one_rank(config: Config) -> Iterator[None]:
    parallel.initialize(config)
    try:
        yield
    finally:
        parallel.shutdown()


def unset_model(folder: Path, dtype: str = "float32") -> list[PolicyModel]:
    return build_model(config_for(folder, dtype=dtype), ModelConfig.from_folder(folder))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder as transformers or we wrote it."""
    tensors: dict[str, torch.Tensor] = {}
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for file in files:
        tensors |= load_file(folder / file)
    return tensors


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        for k in a
    )
