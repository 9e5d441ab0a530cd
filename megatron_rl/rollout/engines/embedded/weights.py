"""Hugging Face named tensors into the engine's fused matrices, whatever the order and the buckets they come in.

Query, key and value become one matrix, gate and up another; rows of query and key heads are put in rotary pair order
(element i next to element i + head_dim / 2), which leaves attention scores as they are. A missing, unknown or misshapen
tensor is refused. Nothing here reads Megatron; export is `megatron_rl/weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_rl.errors import DataError, EngineError
from megatron_rl.rollout.engines.embedded.linear import Linear
from megatron_rl.rollout.engines.embedded.model import CausalModel


@dataclass
class _Matrix:
    """A matrix being put together from named blocks of rows."""

    linear: Linear
    rows: dict[str, tuple[int, int]]  # weight or bias name -> its first row and the row after its last
    shape: tuple[int, int]
    has_bias: bool
    paired: frozenset[str]  # names whose heads are put in rotary pair order
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    seen: set[str] = field(default_factory=set)


class WeightLoader:
    """Takes every tensor of the model once, then `finish`. One loader serves one load."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._vectors: dict[str, tuple[torch.Tensor, bool]] = {"model.norm.weight": (model.final_norm, False)}
        self._matrices: dict[str, _Matrix] = {}
        self._missing: set[str] = set()
        self._name_parts()

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one full tensor. Raises EngineError for a name or shape the model does not have."""
        if name == "lm_head.weight" and self._model.config.tied_embeddings:
            return  # some folders store the tied head a second time
        if name not in self._missing:
            raise EngineError(f"load_weights: tensor {name} is unknown to this {self._model.config.family} model or came twice")
        if name in self._vectors:
            target, paired = self._vectors[name]
            self._check_shape(name, tensor, tuple(target.shape))
            target.copy_(self._in_pair_order(tensor) if paired else tensor)
        if name == "model.embed_tokens.weight":
            self._check_shape(name, tensor, tuple(self._model.embedding.shape))
            self._model.embedding.copy_(tensor)
            if self._model.config.tied_embeddings:
                self._model.head.set(self._model.embedding, None)
        if name in self._matrices:
            self._take_rows(name, tensor, self._matrices[name])
        self._missing.discard(name)

    def finish(self) -> None:
        """Raises EngineError naming what did not come."""
        if self._missing:
            names = sorted(self._missing)
            raise EngineError(
                f"load_weights: {len(names)} tensors are missing, the first {names[0]}; publish every tensor of the model"
            )

    def _name_parts(self) -> None:
        model, c = self._model, self._model.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        for i, layer in enumerate(model.layers):
            at = f"model.layers.{i}."
            self._vectors[at + "input_layernorm.weight"] = (layer.input_norm, False)
            self._vectors[at + "post_attention_layernorm.weight"] = (layer.post_norm, False)
            if layer.q_norm is not None and layer.k_norm is not None:
                self._vectors[at + "self_attn.q_norm.weight"] = (layer.q_norm, True)
                self._vectors[at + "self_attn.k_norm.weight"] = (layer.k_norm, True)
            names = [at + f"self_attn.{x}_proj" for x in "qkv"]
            self._add_matrix(layer.qkv, names, (q, kv, kv), c.hidden_size, bias=c.qkv_bias, paired=names[:2])
            self._add_matrix(layer.output, [at + "self_attn.o_proj"], (c.hidden_size,), q)
            self._add_matrix(layer.gate_up, [at + "mlp.gate_proj", at + "mlp.up_proj"], (c.ffn_size,) * 2, c.hidden_size)
            self._add_matrix(layer.down, [at + "mlp.down_proj"], (c.hidden_size,), c.ffn_size)
        if not c.tied_embeddings:
            self._add_matrix(model.head, ["lm_head"], (c.vocab_size,), c.hidden_size)
        self._missing = {*self._vectors, *self._matrices, "model.embed_tokens.weight"}

    def _add_matrix(
        self,
        linear: Linear,
        names: list[str],
        num_rows: tuple[int, ...],
        num_columns: int,
        *,
        bias: bool = False,
        paired: list[str] | None = None,
    ) -> None:
        kinds = (".weight", ".bias") if bias else (".weight",)
        rows: dict[str, tuple[int, int]] = {}
        start = 0
        for name, count in zip(names, num_rows, strict=True):
            rows |= {name + kind: (start, start + count) for kind in kinds}
            start += count
        in_pair_order = frozenset(name + kind for name in paired or [] for kind in kinds)
        matrix = _Matrix(linear, rows, (start, num_columns), bias, in_pair_order)
        self._matrices |= dict.fromkeys(rows, matrix)

    def _take_rows(self, name: str, tensor: torch.Tensor, matrix: _Matrix) -> None:
        first, end = matrix.rows[name]
        is_bias = name.endswith(".bias")
        self._check_shape(name, tensor, (end - first,) if is_bias else (end - first, matrix.shape[1]))
        if matrix.weight is None:
            new = self._model.embedding.new_empty
            matrix.weight = new(matrix.shape)
            matrix.bias = new(matrix.shape[0]) if matrix.has_bias else None
        target = matrix.bias if is_bias else matrix.weight
        assert target is not None, "a bias is only named where the matrix has one"
        target[first:end] = self._in_pair_order(tensor) if name in matrix.paired else tensor
        matrix.seen.add(name)
        if len(matrix.seen) == len(matrix.rows):
            matrix.linear.set(matrix.weight, matrix.bias)
            matrix.weight = matrix.bias = None

    def _in_pair_order(self, tensor: torch.Tensor) -> torch.Tensor:
        halves = tensor.unflatten(0, (-1, 2, self._model.config.head_dim // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    def _check_shape(self, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            raise EngineError(f"load_weights: {name} has shape {tuple(tensor.shape)}, the model needs {expected}")


def read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a Hugging Face folder, one in memory at a time. Raises DataError for a missing or damaged file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: no *.safetensors file here; give a Hugging Face model folder with safetensors weights")
    for path in files:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    read: Callable[[str], torch.Tensor]
    try:
        with safe_open(path, framework="pt") as file:
            read = file.get_tensor
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, read(name)
    except SafetensorError as e:
        raise DataError(f"{path}: damaged or truncated ({e}); copy the model folder again") from e
