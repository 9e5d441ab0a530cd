"""Which Hugging Face tensors make up each Megatron parameter, and which rows or columns a tensor-parallel rank holds.

Pure tables and index arithmetic, without tensors or ranks: one table a family, one rule a row. Import (`hf.load`) and
export (`hf.export`) both follow `pieces`, so one is the inverse of the other by construction. Names are those of
Megatron-Core's local layer spec, layers numbered over the whole model. Next: `hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from megatron_rl.model_config import ModelConfig


class Rule(StrEnum):
    """How tensor parallelism cuts a parameter."""

    REPLICATED = "replicated"  # every rank holds all of it
    ROW = "row"  # columns (dimension 1) in equal runs: the layer multiplies its share of the inputs
    VOCABULARY = "vocabulary"  # rows in equal runs, the last ones padded with zero rows
    QKV = "qkv"  # for each KV group its query heads, its key and its value; then rows in equal runs
    GATE_UP = "gate_up"  # on each rank its run of gate's rows, then its run of up's


@dataclass(frozen=True)
class Row:
    """One line of a table. Sizes are named, see `_sizes`; `{layer}` stands for the layer's number."""

    name: str  # Megatron's
    rule: Rule
    sources: tuple[tuple[str, tuple[str, ...]], ...]  # (Hugging Face name, sizes of its dimensions)


_EMBEDDING = Row("embedding.word_embeddings.weight", Rule.VOCABULARY, (("model.embed_tokens.weight", ("vocab", "hidden")),))
_FINAL_NORM = Row("decoder.final_layernorm.weight", Rule.REPLICATED, (("model.norm.weight", ("hidden",)),))
_OUTPUT = Row("output_layer.weight", Rule.VOCABULARY, (("lm_head.weight", ("vocab", "hidden")),))  # absent when tied

_HERE, _THERE = "decoder.layers.{layer}.", "model.layers.{layer}."

_LLAMA = (
    Row(_HERE + "input_layernorm.weight", Rule.REPLICATED, ((_THERE + "input_layernorm.weight", ("hidden",)),)),
    Row(
        _HERE + "self_attention.linear_qkv.weight",
        Rule.QKV,
        (
            (_THERE + "self_attn.q_proj.weight", ("query", "hidden")),
            (_THERE + "self_attn.k_proj.weight", ("key", "hidden")),
            (_THERE + "self_attn.v_proj.weight", ("key", "hidden")),
        ),
    ),
    Row(_HERE + "self_attention.linear_proj.weight", Rule.ROW, ((_THERE + "self_attn.o_proj.weight", ("hidden", "query")),)),
    Row(
        _HERE + "pre_mlp_layernorm.weight",
        Rule.REPLICATED,
        ((_THERE + "post_attention_layernorm.weight", ("hidden",)),),
    ),
    Row(
        _HERE + "mlp.linear_fc1.weight",
        Rule.GATE_UP,
        ((_THERE + "mlp.gate_proj.weight", ("ffn", "hidden")), (_THERE + "mlp.up_proj.weight", ("ffn", "hidden"))),
    ),
    Row(_HERE + "mlp.linear_fc2.weight", Rule.ROW, ((_THERE + "mlp.down_proj.weight", ("hidden", "ffn")),)),
)
_QKV_BIAS = Row(
    _HERE + "self_attention.linear_qkv.bias",
    Rule.QKV,
    (
        (_THERE + "self_attn.q_proj.bias", ("query",)),
        (_THERE + "self_attn.k_proj.bias", ("key",)),
        (_THERE + "self_attn.v_proj.bias", ("key",)),
    ),
)
_QK_NORMS = (
    Row(_HERE + "self_attention.q_layernorm.weight", Rule.REPLICATED, ((_THERE + "self_attn.q_norm.weight", ("head",)),)),
    Row(_HERE + "self_attention.k_layernorm.weight", Rule.REPLICATED, ((_THERE + "self_attn.k_norm.weight", ("head",)),)),
)

LAYERS: dict[str, tuple[Row, ...]] = {
    "llama": _LLAMA,
    "qwen2": (*_LLAMA, _QKV_BIAS),
    "qwen3": (*_LLAMA, *_QK_NORMS),
}


@dataclass(frozen=True)
class HFTensor:
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model and the Hugging Face tensors it is made of."""

    name: str
    rule: Rule
    tensors: tuple[HFTensor, ...]


@dataclass(frozen=True)
class Piece:
    """[start, stop) of dimension `dim` of a Hugging Face tensor. A rank's shard is its pieces, one after another."""

    tensor: int  # index in `Parameter.tensors`
    dim: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def parameters(model: ModelConfig) -> list[Parameter]:
    """Every parameter once, in the order of export: embedding, layers, final norm, output layer unless tied."""
    sizes = _sizes(model)
    rows = [(_EMBEDDING, 0)]
    rows += [(row, layer) for layer in range(model.num_layers) for row in LAYERS[model.family]]
    rows.append((_FINAL_NORM, 0))
    if not model.tied_embeddings:
        rows.append((_OUTPUT, 0))
    return [
        Parameter(
            row.name.format(layer=layer),
            row.rule,
            tuple(HFTensor(name.format(layer=layer), tuple(sizes[s] for s in shape)) for name, shape in row.sources),
        )
        for row, layer in rows
    ]


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "query": model.num_heads * model.head_dim,
        "key": model.num_kv_heads * model.head_dim,
        "head": model.head_dim,
        "ffn": model.ffn_size,
    }


def shard_shape(parameter: Parameter, num_ranks: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel rank's part, vocabulary padding included."""
    first = parameter.tensors[0].shape
    match parameter.rule:
        case Rule.REPLICATED:
            return first
        case Rule.ROW:
            return (first[0], first[1] // num_ranks)
        case Rule.VOCABULARY:
            return (math.ceil(first[0] / num_ranks), first[1])
        case Rule.QKV | Rule.GATE_UP:
            return (sum(t.shape[0] for t in parameter.tensors) // num_ranks, *first[1:])


def pieces(parameter: Parameter, model: ModelConfig, num_ranks: int, rank: int) -> list[Piece]:
    """What tensor-parallel rank `rank` of `num_ranks` holds. Vocabulary padding is in no piece."""
    first = parameter.tensors[0].shape
    match parameter.rule:
        case Rule.REPLICATED:
            return [Piece(0, 0, 0, first[0])]
        case Rule.ROW:
            run = first[1] // num_ranks
            return [Piece(0, 1, rank * run, (rank + 1) * run)]
        case Rule.VOCABULARY:
            run = math.ceil(first[0] / num_ranks)
            start, stop = min(rank * run, first[0]), min((rank + 1) * run, first[0])
            return [Piece(0, 0, start, stop)] if start < stop else []
        case Rule.GATE_UP:
            run = first[0] // num_ranks
            return [Piece(tensor, 0, rank * run, (rank + 1) * run) for tensor in (0, 1)]
        case Rule.QKV:
            run = shard_shape(parameter, num_ranks)[0]
            return list(_cut(_interleaved(model), rank * run, (rank + 1) * run))


def _interleaved(model: ModelConfig) -> Iterator[Piece]:
    """All rows of the fused projection in Megatron's order."""
    head = model.head_dim
    queries = model.num_heads // model.num_kv_heads * head
    for group in range(model.num_kv_heads):
        yield Piece(0, 0, group * queries, (group + 1) * queries)
        yield Piece(1, 0, group * head, (group + 1) * head)
        yield Piece(2, 0, group * head, (group + 1) * head)


def _cut(blocks: Iterator[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The parts of `blocks` that lie in rows [start, stop) of their concatenation. With fewer KV heads than ranks a cut
    falls inside a group: Megatron-Core then gathers the projections and each rank picks its own heads."""
    offset = 0
    for block in blocks:
        low, high = max(start, offset), min(stop, offset + block.length)
        if low < high:
            yield Piece(block.tensor, 0, block.start + low - offset, block.start + high - offset)
        offset += block.length
