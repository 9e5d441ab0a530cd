"""The forward pass of Llama, Qwen2 and Qwen3 over a flat row of tokens, in plain torch.

It knows no requests: a layout (`attention.py`) says where each token's keys and values are stored and what it attends
to. It computes no gradients and no loss; training has its own model. Weights come in through `weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.embedded.linear import Linear


class Layout(Protocol):
    """Where the tokens of one forward pass stand. Tokens are flat: [tokens], of any number of trajectories."""

    positions: torch.Tensor  # int64 [tokens], position in the trajectory

    def attend(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """Store key_value [tokens, 2, kv_heads, head_dim], then attend with query [tokens, heads, head_dim].

        Returns [tokens, heads * head_dim]."""
        ...


@dataclass
class Layer:
    """Weights of one layer. Query and key rows are in rotary pair order (see `weights.py`)."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # [(heads + 2 kv_heads) * head_dim, hidden]
    q_norm: torch.Tensor | None  # [head_dim], Qwen3
    k_norm: torch.Tensor | None
    output: Linear  # [hidden, heads * head_dim]
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # [2 ffn, hidden]
    down: Linear  # [hidden, ffn]


class CausalModel:
    """Weights and forward pass. All tensors are of one dtype on one device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.embedding = empty(config.vocab_size, config.hidden_size)
        self.final_norm = empty(config.hidden_size)
        self.head = Linear(dtype, device)
        self.layers = [
            Layer(
                input_norm=empty(config.hidden_size),
                qkv=Linear(dtype, device),
                q_norm=empty(config.head_dim) if config.qk_norm else None,
                k_norm=empty(config.head_dim) if config.qk_norm else None,
                output=Linear(dtype, device),
                post_norm=empty(config.hidden_size),
                gate_up=Linear(dtype, device),
                down=Linear(dtype, device),
            )
            for _ in range(config.num_layers)
        ]
        self._inverse_frequencies = config.inverse_frequencies().to(device)

    def linears(self) -> Iterator[Linear]:
        """All matrices but the embedding."""
        for layer in self.layers:
            yield from (layer.qkv, layer.output, layer.gate_up, layer.down)
        yield self.head

    def forward(self, token_ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """token_ids: int64 [tokens] -> hidden states before the head, [tokens, hidden]."""
        x = self.embedding[token_ids]
        rotation = self._rotation(layout.positions)
        for index, layer in enumerate(self.layers):
            query, key_value = self._qkv(layer, self._norm(x, layer.input_norm), rotation)
            x = x + layer.output(layout.attend(index, query, key_value))
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            x = x + layer.down(functional.silu(gate).mul_(up))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden] -> float32 [rows, vocabulary]"""
        return self.head(self._norm(hidden, self.final_norm)).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _rotation(self, positions: torch.Tensor) -> torch.Tensor:
        """complex64 [tokens, 1, head_dim / 2]"""
        angles = positions.float()[:, None] * self._inverse_frequencies
        return torch.polar(torch.ones_like(angles), angles)[:, None]

    def _qkv(self, layer: Layer, x: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated query [tokens, heads, head_dim], and key with value [tokens, 2, kv_heads, head_dim]."""
        c = self.config
        qkv = layer.qkv(x).view(len(x), c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        rotated = qkv[:, : c.num_heads + c.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated[:, : c.num_heads] = self._norm(rotated[:, : c.num_heads], layer.q_norm)
            rotated[:, c.num_heads :] = self._norm(rotated[:, c.num_heads :], layer.k_norm)
        # Pair order makes the rotation one complex product, in place where the dtype has a complex form.
        pairs = rotated.float().unflatten(-1, (c.head_dim // 2, 2))
        torch.view_as_complex(pairs).mul_(rotation)
        if self.dtype != torch.float32:
            rotated.copy_(pairs.flatten(-2))
        return qkv[:, : c.num_heads], qkv[:, c.num_heads :].unflatten(1, (2, c.num_kv_heads))
