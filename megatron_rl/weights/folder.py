"""Write a Hugging Face model folder: weights streamed tensor by tensor, config and tokenizer copied from the source folder.

The folder appears whole or not at all (`atomic.py`). Nothing of the model is held in memory: names, shapes and so the
headers of the files are known from the tables before the last tensor is gathered. Used by the run's export and `convert.py`.
"""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.errors import CheckpointError
from megatron_rl.model_config import ModelConfig
from megatron_rl.weights import atomic
from megatron_rl.weights.hf import plan_buckets
from megatron_rl.weights.reader import DTYPES, INDEX_FILE, SINGLE_FILE
from megatron_rl.weights.tables import HFTensor, parameters

SHARD_BYTES = 5_000_000_000
CODES = {dtype: code for code, dtype in DTYPES.items()}
# What a model needs beside its weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def write_model_folder(
    buckets: Iterable[Sequence[tuple[str, torch.Tensor]]],
    target: str | Path,
    *,
    source: str | Path,
    write: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write exported tensors (`hf.export_buckets`) with the companions of `source`; an existing `target` is replaced.

    Collective; `write` is true on rank 0 alone. All tensors have one dtype. Raises CheckpointError on every rank when
    rank 0 cannot write."""
    target = Path(target)
    tensors = itertools.chain.from_iterable(buckets)
    failure = None
    if write:
        try:
            write_tensors_folder(tensors, target, Path(source), shard_bytes)
        except (OSError, CheckpointError) as e:
            failure = str(e)
            atomic.abandon(target)
    for _ in tensors:  # on the other ranks, and on rank 0 after a failure: the export is collective to its end
        pass
    _agree(failure, target)


def write_tensors_folder(
    tensors: Iterator[tuple[str, torch.Tensor]], target: Path, source: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """`write_model_folder` in one process, without process groups. After an error the caller calls `atomic.abandon`."""
    first = next(tensors)
    dtype = first[1].dtype
    plan = [t for p in parameters(ModelConfig.from_folder(source)) for t in p.tensors]
    folder = atomic.begin(target)
    atomic.require_space(folder, dtype.itemsize * sum(map(_numel, plan)))
    copy_companions(source, folder, dtype)
    _write_tensors(folder, itertools.chain([first], tensors), plan, dtype, shard_bytes)
    atomic.commit(target)


def copy_companions(source: str | Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Config and tokenizer files of a model folder. With `dtype`, config.json names it; unchanged bytes where it already does."""
    for pattern in COMPANIONS:
        for path in sorted(Path(source).glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    if dtype is None:
        return
    config = target / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in settings and "dtype" not in settings else "dtype"
    name = str(dtype).removeprefix("torch.")
    if settings.get(key) != name:
        settings[key] = name
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], plan: list[HFTensor], dtype: torch.dtype, shard_bytes: int
) -> None:
    """One file, or numbered files of at most `shard_bytes` and their index."""
    counts = plan_buckets(plan, dtype.itemsize, shard_bytes)
    weight_map: dict[str, str] = {}
    start = 0
    for number, count in enumerate(counts, start=1):
        name = SINGLE_FILE if len(counts) == 1 else f"model-{number:05}-of-{len(counts):05}.safetensors"
        part = plan[start : start + count]
        start += count
        weight_map |= {tensor.name: name for tensor in part}
        with (folder / name).open("wb") as file:
            file.write(_header(part, dtype))
            for planned in part:
                name_found, tensor = next(tensors)
                found = (name_found, tuple(tensor.shape), tensor.dtype)
                assert found == (planned.name, planned.shape, dtype), f"exported {found}, planned {planned} {dtype}"
                own = tensor.to("cpu", copy=True).contiguous()  # numpy nails a storage down, and the trainer must free its own
                file.write(own.view(torch.uint8).numpy().data)
    if len(counts) > 1:
        index = {"metadata": {"total_size": dtype.itemsize * sum(map(_numel, plan))}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _numel(tensor: HFTensor) -> int:
    return torch.Size(tensor.shape).numel()


def _header(tensors: Sequence[HFTensor], dtype: torch.dtype) -> bytes:
    """Safetensors: length of the header (uint64, little endian), then JSON, padded so that the data is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _numel(tensor) * dtype.itemsize
        entries[tensor.name] = {"dtype": CODES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _agree(failure: str | None, target: Path) -> None:
    """Rank 0's failure is everyone's."""
    box = [failure]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise CheckpointError(f"{target}: cannot write the model: {box[0]}; make room and export again")
