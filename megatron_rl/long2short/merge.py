"""Average the weights of model folders (paper 2.4: a long-CoT and a short-CoT model, plainly averaged).

Streams tensor by tensor, so that models of any size merge in the memory of one tensor; sums in float32. Refuses folders whose
tensors differ in name or shape, and weights that cannot be made to sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_rl.errors import CheckpointError, DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.weights import atomic
from megatron_rl.weights.folder import write_tensors_folder
from megatron_rl.weights.reader import TensorFiles
from megatron_rl.weights.tables import parameters

Shapes = dict[str, tuple[int, ...]]


def merge(folders: Sequence[Path], target: Path, weights: Sequence[float] | None = None) -> list[float]:
    """Write the weighted average of `folders` to `target`, with the first one's config, tokenizer and dtype.

    weights: one a folder, scaled to sum to 1; default equal. Returns them scaled. Raises DataError, CheckpointError."""
    shares = _shares(folders, weights)
    if target.exists():
        raise DataError(f"{target}: exists already; merge into a new folder")
    shapes = [_shapes(folder) for folder in folders]
    for folder, other in zip(folders[1:], shapes[1:], strict=True):
        _check_same(folders[0], shapes[0], folder, other)
    files = [TensorFiles(folder) for folder in folders]
    for file in files:
        file.check(shapes[0])
    try:
        write_tensors_folder(_averaged(files, shapes[0], shares), target, folders[0])
    except OSError as e:
        raise CheckpointError(f"{target}: cannot write the merged model: {e}; make room and merge again") from e
    finally:
        atomic.abandon(target)  # nothing is left of it once it was committed
    return shares


def _averaged(files: Sequence[TensorFiles], shapes: Shapes, shares: Sequence[float]) -> Iterator[tuple[str, torch.Tensor]]:
    dtype = files[0].dtype(next(iter(shapes)))
    for name, shape in shapes.items():
        total = torch.zeros(shape, dtype=torch.float32)
        for file, share in zip(files, shares, strict=True):
            total.add_(file.read(name, 0, 0, shape[0]).float(), alpha=share)
        yield name, total.to(dtype)


def _shares(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if len(folders) < 2:
        raise DataError(f"merge: {len(folders)} model folder given; an average needs at least 2")
    given = [1.0] * len(folders) if weights is None else list(weights)
    if len(given) != len(folders):
        raise DataError(f"merge: {len(given)} weights for {len(folders)} models; give one each")
    total = sum(given)
    if not math.isfinite(total) or total <= 0:
        raise DataError(f"merge: the weights {given} sum to {total}; their sum must be positive")
    return [weight / total for weight in given]


def _shapes(folder: Path) -> Shapes:
    """In the order in which a model folder is written."""
    return {t.name: tuple(t.shape) for p in parameters(ModelConfig.from_folder(folder)) for t in p.tensors}


def _check_same(first: Path, shapes: Shapes, folder: Path, other: Shapes) -> None:
    for name in [*shapes, *other]:
        if shapes.get(name) != other.get(name):
            found = [f"{list(s[name])} in {f}" if name in s else f"absent in {f}" for f, s in ((first, shapes), (folder, other))]
            raise DataError(f"merge: tensor {name} is {found[0]}, {found[1]}; only models of one shape can be averaged")
