"""The safetensors of a Hugging Face model folder: one file, or shards named by an index.

Reads slices, so that a rank touches only the bytes it holds. Refuses a folder that is not exactly what the model needs:
`check` is the same on every rank, so that all of them stop, not one. Which slices are wanted is `hf.py`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_rl.errors import DataError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Constants that older exports stored beside the weights; they follow from config.json.
DERIVED = ".rotary_emb.inv_freq"


class TensorFiles:
    """Opens every file's header; raises DataError for missing, truncated or contradicting files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._slices: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        index = _index(self.folder)
        for path in sorted({self.folder / name for name in index.values()}) if index else [self.folder / SINGLE_FILE]:
            self._open(path)
        for name, file in index.items():
            if name not in self._files:
                raise DataError(f"{self.folder / INDEX_FILE}: tensor {name} should be in {file}, but is not; fetch it again")

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path}: missing; the model folder is not complete, fetch it again")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as e:
            raise DataError(f"{path}: truncated or damaged ({e}); fetch it again") from e
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            if name in self._files:
                raise DataError(f"{path}: tensor {name} is also in {self._files[name]}; remove one of the files")
            self._files[name] = path
            self._slices[name] = file.get_slice(name)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The folder holds exactly these tensors, in these shapes, in a floating dtype; else DataError."""
        for name, shape in shapes.items():
            if name not in self._slices:
                raise DataError(f"{self.folder}: tensor {name} is missing; the model's config.json asks for it")
            found = tuple(self._slices[name].get_shape())
            if found != shape:
                raise DataError(
                    f"{self._files[name]}: tensor {name} has shape {list(found)}, the model's config.json makes it {list(shape)}"
                )
            dtype = self._slices[name].get_dtype()
            if dtype not in DTYPES:
                raise DataError(f"{self._files[name]}: tensor {name} is {dtype}; supported are {', '.join(DTYPES)}")
        for name in self._slices:
            if name not in shapes and not name.endswith(DERIVED):
                reason = "the model's config.json has no place for it"
                if name == "lm_head.weight":
                    reason += "; remove it, or set tie_word_embeddings to false"
                raise DataError(f"{self._files[name]}: extra tensor {name}: {reason}")

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._slices[name].get_dtype()]

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """[start, stop) of dimension `dim` (0 or 1), in the file's dtype."""
        values = self._slices[name]
        return values[start:stop] if dim == 0 else values[:, start:stop]


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty when the model is in a single file."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise DataError(f"{path}: not an index of safetensors files ({e}); fetch it again") from e
    return dict(weight_map)
