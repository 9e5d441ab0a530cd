"""Weights of a Megatron model from and to Hugging Face names and layout.

`load` reads a model folder, each rank its own slices. `export` gives back full tensors, the same on every rank: each
rank's shard is sent along the pipeline, then gathered over the tensor-parallel ranks, one parameter at a time; a single
rank communicates nothing and, but for the fused QKV projection, copies nothing. Writing files is `folder.py`'s business.
Which rows belong where: `tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.weights.reader import TensorFiles
from megatron_rl.weights.tables import HFTensor, Parameter, Rule, parameters, pieces, shard_shape

if TYPE_CHECKING:
    from megatron_rl.training.model import PolicyModel

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


def load(chunks: Sequence[PolicyModel], folder: str | Path) -> None:
    """Fill this rank's parameters from a model folder, converted to their dtype. Padding rows become zero.

    Raises DataError naming file and tensor where the folder is not what the model's shape asks for; every rank checks
    the whole folder, so all raise alike. No collectives."""
    model = chunks[0].model_config
    files = TensorFiles(folder)
    wanted = parameters(model)
    files.check({t.name: t.shape for p in wanted for t in p.tensors})
    table = {p.name: p for p in wanted}
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, target in local_parameters(chunks):
            parameter = table[name]
            assert tuple(target.shape) == shard_shape(parameter, num_ranks), f"{name}: {tuple(target.shape)}"
            offset = 0
            for piece in pieces(parameter, model, num_ranks, rank):
                source = files.read(parameter.tensors[piece.tensor].name, piece.dim, piece.start, piece.stop)
                target.narrow(piece.dim, offset, piece.length).copy_(source)
                offset += piece.length
            if parameter.rule is Rule.VOCABULARY:
                target[offset:].zero_()


def export(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (Hugging Face name, full tensor) in one fixed order, in the model's dtype, on its device. Collective.

    All ranks must iterate to the end, in step. A tensor may be a view of the live weights: copy what is to be kept."""
    model = chunks[0].model_config
    gatherer = _Gatherer(chunks)
    for parameter in parameters(model):
        shards = gatherer.shards(parameter)
        holdings = [pieces(parameter, model, len(shards), rank) for rank in range(len(shards))]
        for index, tensor in enumerate(parameter.tensors):
            parts = []
            for shard, held in zip(shards, holdings, strict=True):
                offset = 0
                for piece in held:
                    if piece.tensor == index:
                        parts.append((piece.dim, piece.start, shard.narrow(piece.dim, offset, piece.length)))
                    offset += piece.length
            yield tensor.name, _joined(parts, tensor)
        del shards


def export_buckets(chunks: Sequence[PolicyModel], bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """`export` in lists of at most `bucket_bytes`; a larger tensor has a bucket of its own. Collective.

    A bucket is emptied when the next one is asked for: take what is to be kept out of it before."""
    tensors = export(chunks)
    plan = [t for p in parameters(chunks[0].model_config) for t in p.tensors]
    for count in plan_buckets(plan, chunks[0].config.params_dtype.itemsize, bucket_bytes):
        bucket = [next(tensors) for _ in range(count)]
        yield bucket
        bucket.clear()  # the caller's loop still names it while the next one is gathered
    assert next(tensors, None) is None, "the bucket plan left tensors out"


def plan_buckets(tensors: Sequence[HFTensor], element_bytes: int, bucket_bytes: int) -> list[int]:
    """How many consecutive tensors go into each bucket."""
    counts: list[int] = []
    filled = bucket_bytes
    for tensor in tensors:
        size = torch.Size(tensor.shape).numel() * element_bytes
        if counts and filled + size <= bucket_bytes:
            counts[-1] += 1
            filled += size
        else:
            counts.append(1)
            filled = size
    return counts


def local_parameters(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with the layer's number in the whole model, parameter) of this rank. Where the embedding is tied and a later
    pipeline stage keeps a copy as its output layer, that copy appears under the embedding's name."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            prefix, found, rest = name.partition("decoder.layers.")
            if found:
                here, _, rest = rest.partition(".")
                yield f"{prefix}{found}{chunk.decoder.layers[int(here)].layer_number - 1}.{rest}", parameter
            elif name == _OUTPUT and chunk.model_config.tied_embeddings:
                yield _EMBEDDING, parameter
            else:
                yield name, parameter


class _Gatherer:
    """This rank's parameters and who holds the others."""

    def __init__(self, chunks: Sequence[PolicyModel]) -> None:
        self.local: dict[str, torch.Tensor] = {}
        for name, parameter in local_parameters(chunks):
            self.local.setdefault(name, parameter.detach())
        self.dtype = chunks[0].config.params_dtype
        self.device = next(chunks[0].parameters()).device
        self.num_ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.num_stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.owner = self._owners() if self.num_stages > 1 else {}

    def _owners(self) -> dict[str, int]:
        """Parameter name -> the first pipeline stage that holds it."""
        names: list[list[str]] = [[] for _ in range(self.num_stages)]
        dist.all_gather_object(names, list(self.local), group=parallel_state.get_pipeline_model_parallel_group())
        return {name: stage for stage in reversed(range(self.num_stages)) for name in names[stage]}

    def shards(self, parameter: Parameter) -> list[torch.Tensor]:
        """The parts of all tensor-parallel ranks in order; one part where it is replicated."""
        if self.num_stages == 1:
            own = self.local[parameter.name]
        else:
            owner = self.owner[parameter.name]
            # Received into fresh memory even by a stage that keeps a copy of the tied embedding: export writes no weights.
            shape = shard_shape(parameter, self.num_ranks)
            own = self.local[parameter.name] if owner == self.stage else torch.empty(shape, dtype=self.dtype, device=self.device)
            dist.broadcast(own, group=parallel_state.get_pipeline_model_parallel_group(), group_src=owner)
        if self.num_ranks == 1 or parameter.rule is Rule.REPLICATED:
            return [own]
        gathered = [torch.empty_like(own) for _ in range(self.num_ranks)]
        dist.all_gather(gathered, own.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        return gathered


def _joined(parts: list[tuple[int, int, torch.Tensor]], tensor: HFTensor) -> torch.Tensor:
    """A full tensor from (dimension, start, part). The part itself where there is only one."""
    if len(parts) == 1:
        return parts[0][2]
    full = torch.empty(tensor.shape, dtype=parts[0][2].dtype, device=parts[0][2].device)
    for dim, start, part in parts:
        full.narrow(dim, start, part.shape[dim]).copy_(part)
    return full
