"""The shape of a model, read from a Hugging Face config.json; shared by the embedded engine, training and weights.

Families: Llama (SmolLM2 among them), Qwen2, Qwen3, dense only. What a family adds is two flags, `qkv_bias` and `qk_norm`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.errors import DataError

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class ModelConfig:
    family: str  # llama, qwen2, qwen3
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, float], ...] | None  # llama3 parameters, sorted; None: plain rotary
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    @property
    def attention_cost(self) -> float:
        """What a row pays for each position it attends to, as a share of its matmuls: both in multiply-adds."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * heads + 2 * kv_heads + 3 * self.ffn_size)
        row = self.num_layers * layer + self.vocab_size * self.hidden_size
        return self.num_layers * 2 * heads / row

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Raises DataError for a missing folder, an unknown architecture or an unsupported feature."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise DataError(f"{folder}: no model here (config.json is missing); give a Hugging Face model folder")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            raise DataError(f"{path}: not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}") from e
        return cls._from_dict(raw, path)

    @classmethod
    def _from_dict(cls, raw: dict[str, Any], path: Path) -> ModelConfig:
        names = raw.get("architectures") or ["(none)"]
        family = FAMILIES.get(names[0])
        if family is None:
            raise DataError(f"{path}: architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
        if raw.get("use_sliding_window"):
            raise DataError(f"{path}: use_sliding_window=true is not supported; set it to false if the model allows")
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise DataError(
                f"{path}: hidden_act={raw.get('hidden_act')!r}, mlp_bias={raw.get('mlp_bias')!r}: supported is silu without bias"
            )
        if family != "qwen2" and raw.get("attention_bias"):
            raise DataError(f"{path}: attention_bias=true is not supported for {names[0]}")
        theta, scaling = _rope(raw, path)
        eos = raw.get("eos_token_id")
        try:
            return cls(
                family=family,
                num_layers=raw["num_hidden_layers"],
                hidden_size=raw["hidden_size"],
                num_heads=raw["num_attention_heads"],
                num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                ffn_size=raw["intermediate_size"],
                vocab_size=raw["vocab_size"],
                max_positions=raw["max_position_embeddings"],
                norm_eps=raw["rms_norm_eps"],
                rope_theta=theta,
                rope_scaling=scaling,
                tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            )
        except KeyError as e:
            raise DataError(f"{path}: {e.args[0]} is missing; the file is damaged or of another kind") from e

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary inverse frequencies, float32 [head_dim / 2], with Llama 3.1's scaling where the config asks for it."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequencies = 1.0 / (self.rope_theta**exponents)
        if self.rope_scaling is None:
            return frequencies
        s = dict(self.rope_scaling)
        wavelengths = 2 * math.pi / frequencies
        old_context = s["original_max_position_embeddings"]
        smooth = (old_context / wavelengths - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        smooth = smooth.clamp(0.0, 1.0)  # 0: fully scaled (long waves), 1: untouched (short waves)
        return (1 - smooth) * frequencies / s["factor"] + smooth * frequencies


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, tuple[tuple[str, float], ...] | None]:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling`."""
    parameters = dict(raw.get("rope_parameters") or {})
    scaling = dict(raw.get("rope_scaling") or {})
    parameters = {**scaling, **parameters}
    theta = float(parameters.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise DataError(f"{path}: rope type {kind!r} is not supported; supported are default and llama3")
    return theta, tuple(sorted((k, float(v)) for k, v in parameters.items()))
