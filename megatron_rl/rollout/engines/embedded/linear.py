"""One weight matrix as the engine multiplies with it: y = x W^T + b.

On a CPU the weight is kept in the blocked order oneDNN wants, packed once at each load: for the few rows of a decode step
that is two to three times as fast as the row-major matrix. Elsewhere it is kept as it comes. Which weights make up a
matrix is `weights.py`'s business. Read next: `model.py`.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class Linear:
    """`set` once for each weight version, then call. weight: [out, in], bias: [out] or None."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._packs = device.type == "cpu" and torch.backends.mkldnn.is_available() and _packable(dtype)
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def set(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if self._packs:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._weight, self._bias = weight, bias

    def clear(self) -> None:
        """Give the memory back until the next `set`."""
        self._weight = self._bias = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in] -> [rows, out]"""
        assert self._weight is not None, "weights are loaded before the first forward pass"
        if self._packs:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return functional.linear(x, self._weight, self._bias)


def _packable(dtype: torch.dtype) -> bool:
    # Without AVX-512 oneDNN refuses bfloat16 matrices; float32 it always takes.
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
