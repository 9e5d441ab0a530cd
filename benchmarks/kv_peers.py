"""Other ways to carry pages between a GPU pool and pinned host memory, for `kv_snapshot.py`.

Each peer is a pair of calls, out of the pool and back, on the same pages and the same host memory as ours, and says what it wrote
so that the benchmark can check it. Descriptors and index tensors are made beforehand and are not timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.kernels.kv_pages import PagedPool


@dataclass(frozen=True)
class Peer:
    """save: pool to host; load: host to pool. is_slot_major: the host holds page after page as ours does, else region after
    region."""

    save: Callable[[], object]
    load: Callable[[], object]
    is_slot_major: bool


class CopyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes of CUDA 13: source access in stream order, hints that plain device and pinned memory ignore."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


def memcpy_batch(pool: PagedPool, pages: np.ndarray, host: torch.Tensor) -> Peer:
    """One cudaMemcpyBatchAsync with a descriptor for every page of every region."""
    runtime = ctypes.CDLL("libcudart.so.13")
    function = runtime.cudaMemcpyBatchAsync
    stream = torch.cuda.Stream(pool.device)  # the legacy default stream is not accepted
    bases = np.array([region.data_ptr() for region in pool.regions], dtype=np.uint64)
    stride = pool.regions[0].stride(0) * pool.dtype.itemsize
    device_side = np.ascontiguousarray((bases[None] + pages[:, None].astype(np.uint64) * np.uint64(stride)).reshape(-1))
    count = len(device_side)
    host_side = np.uint64(host.data_ptr()) + np.arange(count, dtype=np.uint64) * np.uint64(pool.page_bytes)
    sizes = np.full(count, pool.page_bytes, dtype=np.uint64)
    attributes, first = CopyAttributes(1, (0, 0), (0, 0), 0), ctypes.c_size_t(0)

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def copy(targets: np.ndarray, sources: np.ndarray) -> None:
        status = function(
            pointer(targets),
            pointer(sources),
            pointer(sizes),
            ctypes.c_size_t(count),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            ctypes.c_void_p(stream.cuda_stream),
        )
        if status:
            raise RuntimeError(f"cudaMemcpyBatchAsync: CUDA error {status}")
        stream.synchronize()

    return Peer(lambda: copy(host_side, device_side), lambda: copy(device_side, host_side), is_slot_major=True)


def index_select(pool: PagedPool, pages: torch.Tensor, host: torch.Tensor, staging: torch.Tensor) -> Peer:
    """torch.index_select a region into a device buffer of the whole size, then one copy; and back with index_copy_.

    host, staging: uint8 [pages * slot_bytes]"""
    per_region = staging.view(pool.num_regions, len(pages), pool.page_bytes)
    regions = [region.view(torch.uint8).flatten(1) for region in pool.regions]

    def save() -> None:
        for region, part in zip(regions, per_region, strict=True):
            torch.index_select(region, 0, pages, out=part)
        host.copy_(staging, non_blocking=True)

    def load() -> None:
        staging.copy_(host, non_blocking=True)
        for region, part in zip(regions, per_region, strict=True):
            region.index_copy_(0, pages, part)

    return Peer(save, load, is_slot_major=False)


def sglang_transfer(pool: PagedPool, pages: np.ndarray, host: torch.Tensor, quota: int) -> Peer:
    """sgl_kernel.kvcacheio.transfer_kv_all_layer: a kernel of `quota` blocks reads and writes pinned memory in place.

    Token by token, as SGLang calls it whatever its page size. host: uint8 [regions * tokens * token bytes]."""
    from sgl_kernel.kvcacheio import transfer_kv_all_layer

    token_bytes = pool.page_bytes // pool.page_size
    tokens = (pages[:, None] * pool.page_size + np.arange(pool.page_size)).reshape(-1)
    rows = host.view(pool.num_regions, len(tokens), token_bytes)

    def table(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)).to(pool.device)

    keys, values = table(pool.regions[0::2]), table(pool.regions[1::2])
    host_keys, host_values = table(list(rows[0::2])), table(list(rows[1::2]))
    in_pool = torch.from_numpy(tokens).to(pool.device)
    in_host = torch.arange(len(tokens), device=pool.device)
    layers = pool.num_regions // 2

    def save() -> None:
        transfer_kv_all_layer(keys, host_keys, values, host_values, in_pool, in_host, token_bytes, layers, block_quota=quota)

    def load() -> None:
        transfer_kv_all_layer(host_keys, keys, host_values, values, in_host, in_pool, token_bytes, layers, block_quota=quota)

    return Peer(save, load, is_slot_major=False)
