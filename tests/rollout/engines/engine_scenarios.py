"""Small random models of each family, engines over them, and what a test asks of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_rl.config import EmbeddedConfig, KVStoreConfig
from megatron_rl.rollout.engines.base import Chunk, Request, Sampling
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.kv_store import KeepKV

VOCABULARY = 331  # no multiple of anything

ODD = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "eos_token_id": None,  # requests end where they say
    "initializer_range": 0.25,  # sharp distributions, so that greedy has no near ties
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama-tied": lambda: LlamaConfig(**ODD, tie_word_embeddings=True),
    "llama-scaled-rope": lambda: LlamaConfig(**ODD, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: Qwen2Config(**{**ODD, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen3-tied": lambda: Qwen3Config(**ODD, tie_word_embeddings=True),
}


def save_random_model(name: str, folder: Path) -> Path:
    """Biases and norms are random too."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(MODELS[name]())
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    """An engine scenario with a deadline, so that a hang is a failure."""
    return asyncio.run(asyncio.wait_for(scenario, 60))


def open_engine(folder: Path, **options: Any) -> EmbeddedEngine:
    """Small pages and batches, so that edges are met; `options` of EmbeddedConfig and of the engine.

    With `kv_folder` KV is kept: `max_age`, and options of KVStoreConfig."""
    if "kv_folder" in options:
        kept = {key: options.pop(key) for key in list(options) if key in KVStoreConfig.model_fields}
        options["keep"] = KeepKV(options.pop("max_age", 1), KVStoreConfig(**kept), options.pop("kv_folder"))
    fields = {key: options.pop(key) for key in list(options) if key in EmbeddedConfig.model_fields}
    config = EmbeddedConfig(**{"page_size": 4, "kv_bytes": 4 << 20, "batch_sizes": (1, 2, 4, 8, 64), **fields})
    options = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    return EmbeddedEngine.from_folder(folder, config=config, **options)


def kv_of(engine: EmbeddedEngine, trajectory_id: int) -> torch.Tensor:
    """A copy of a retained trajectory's KV: [layers, 2, kv_heads, tokens, head_dim]."""
    held = engine._runner.scheduler.retained[trajectory_id]
    pages = engine._runner.cache.pool[:, held.pages]  # [layers, pages, 2, kv_heads, page_size, head_dim]
    return pages.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[:, :, :, : held.num_computed].clone()


def request(trajectory_id: int, context: Sequence[int], max_new_tokens: int, **options: Any) -> Request:
    """options: those of Sampling, and `weight_version`, `kv_key` of Request."""
    version, key = options.pop("weight_version", 0), options.pop("kv_key", f"alone {trajectory_id}")
    return Request(trajectory_id, np.asarray(context, np.int32), max_new_tokens, Sampling(**options), version, key)


def prompt(seed: int, num_tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, num_tokens).tolist()


async def collect(engine: Any, requests: Sequence[Request]) -> dict[int, Chunk]:
    """All chunks of each request as one; the ending is the last chunk's."""
    chunks: dict[int, list[Chunk]] = {r.trajectory_id: [] for r in requests}
    async for chunk in engine.generate(requests):
        chunks[chunk.trajectory_id].append(chunk)
    return {trajectory_id: joined(parts) for trajectory_id, parts in chunks.items()}


def joined(parts: Sequence[Chunk]) -> Chunk:
    assert [p.ending is None for p in parts] == [True] * (len(parts) - 1) + [False], "exactly the last chunk has an ending"
    last = parts[-1]
    return Chunk(
        last.trajectory_id,
        np.concatenate([p.token_ids for p in parts]),
        np.concatenate([p.log_probs for p in parts]),
        last.weight_version,
        np.concatenate([p.kv_versions for p in parts]),
        last.cached_tokens,
        last.ending,
    )
