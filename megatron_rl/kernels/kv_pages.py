"""KV pages between a paged pool and a packed slab: gather, scatter, and moves inside the pool, each one launch for all layers.

A slot of the slab is one page of every region, layer after layer, key before value; compressed, one byte an element and then a
float32 scale per token and head. Refused, as KernelError: other dtypes, strides and devices than those named below, and pages
outside the pool. On a CPU such a page stops the call before anything is written. On a GPU, where looking would mean waiting, the
kernel skips it, counts it in `PagedPool.faults`, and `raise_faults` tells. Host copies: `snapshot.py`. The same in plain torch:
`kv_pages_reference.py`. Kernels: csrc/kv/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from megatron_rl.errors import KernelError
from megatron_rl.kernels.build import load_operators

load_operators()

Scheme = Literal["none", "int8", "fp8"]
COMPRESSIBLE = (torch.float32, torch.bfloat16, torch.float16)
MAX_REGIONS, MAX_ROW_ELEMENTS = 448, 512  # csrc/kv/pages.h


@dataclass(frozen=True, eq=False)
class PagedPool:
    """A pool of pages in 2 * layers regions; region 2 * layer holds keys, 2 * layer + 1 values. Make it with `from_layers` or
    `from_pool`. It keeps the tensors alive; writing into a page through it writes into them."""

    regions: list[torch.Tensor]  # each [pages, page_size, kv_heads, head_dim], or [pages, kv_heads, page_size, head_dim]
    page_size: int  # tokens
    kv_heads: int
    is_token_major: bool  # a page holds token after token (SGLang), else head after head (the embedded engine)
    faults: torch.Tensor  # int64 [1]: pages outside the pool that kernels have skipped since `raise_faults`

    @staticmethod
    def from_layers(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], page_size: int) -> PagedPool:
        """SGLang's buffers, each [slots, kv_heads, head_dim]; slots after the last whole page are left alone."""
        if not keys or len(keys) != len(values):
            refuse("PagedPool.from_layers", "keys, values", "one of each a layer", f"{len(keys)} and {len(values)}")
        layers = [tensor for pair in zip(keys, values, strict=True) for tensor in pair]
        first = layers[0]
        for i, layer in enumerate(layers):
            name = f"{'values' if i % 2 else 'keys'}[{i // 2}]"
            if layer.dim() != 3 or not layer.is_contiguous() or describe(layer) != describe(first):
                refuse(
                    "PagedPool.from_layers", name, f"contiguous {describe(first)} [slots, kv_heads, head_dim]", describe(layer)
                )
        slots, kv_heads, head_dim = first.shape
        if not 1 <= page_size <= slots:
            refuse("PagedPool.from_layers", "page_size", f"1 .. {slots} (slots of a layer)", page_size)
        num_pages = slots // page_size
        regions = [layer[: num_pages * page_size].view(num_pages, page_size, kv_heads, head_dim) for layer in layers]
        return _checked(PagedPool(regions, page_size, kv_heads, True, _no_faults(first.device)))

    @staticmethod
    def from_pool(pool: torch.Tensor) -> PagedPool:
        """The embedded engine's pool: [layers, pages, 2 (key, value), kv_heads, page_size, head_dim], contiguous."""
        if pool.dim() != 6 or pool.shape[2] != 2 or not pool.is_contiguous():
            refuse("PagedPool.from_pool", "pool", "contiguous [layers, pages, 2, kv_heads, page_size, head_dim]", describe(pool))
        regions = [pool[layer, :, part] for layer in range(pool.shape[0]) for part in (0, 1)]
        return _checked(PagedPool(regions, pool.shape[4], pool.shape[3], False, _no_faults(pool.device)))

    @property
    def num_regions(self) -> int:
        return len(self.regions)

    @property
    def num_pages(self) -> int:
        return self.regions[0].shape[0]

    @property
    def head_dim(self) -> int:
        return self.regions[0].shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.regions[0].dtype

    @property
    def device(self) -> torch.device:
        return self.regions[0].device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one region."""
        return self.page_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one page over all regions, the unit of an uncompressed slab."""
        return self.num_regions * self.page_bytes


def slot_bytes_of(pool: PagedPool, scheme: Scheme) -> int:
    """Bytes of one page over all regions, compressed by `scheme`."""
    if scheme == "none":
        return pool.slot_bytes
    if scheme not in ("int8", "fp8"):
        refuse("slot_bytes_of", "scheme", "none, int8 or fp8", scheme)
    if pool.dtype not in COMPRESSIBLE or pool.head_dim % 4 or pool.head_dim > MAX_ROW_ELEMENTS:
        rule = f"a pool of float32, bfloat16 or float16 whose head_dim is a multiple of 4, at most {MAX_ROW_ELEMENTS}"
        refuse("slot_bytes_of", "scheme", rule, f"{scheme} of {pool.dtype}, head_dim {pool.head_dim}; use none")
    return pool.num_regions * pool.page_size * pool.kv_heads * (pool.head_dim + 4)


def gather(
    pool: PagedPool, pages: torch.Tensor, out: torch.Tensor, *, scheme: Scheme = "none", max_blocks: int | None = None
) -> None:
    """Copies pages, int64 [n], into out, uint8 [n, slot_bytes_of(pool, scheme)], both on the pool's device.

    `int8`, `fp8` (e4m3): scale = largest magnitude of the row / 127 or 448, no smaller than 2^-126. An element comes back within
    scale / 2 for int8, within the larger of 2^-4 of itself and scale * 2^-10 for fp8, then rounded to the pool's dtype. A row
    that holds an infinity or NaN comes back as NaN. max_blocks: of the GPU's grid at most, each 512 threads, to run beside other
    work; None fills the device. Runs on the current stream and does not wait. Copies are exact, and equal inputs give equal
    bytes."""
    _check("gather", pool, pages, out, "out", scheme)
    with_pages = (pool.regions, pages, out, pool.faults, scheme, max_blocks or 0)
    try:
        torch.ops.megatron_rl.kv_gather(*with_pages)
    except IndexError as e:
        raise KernelError(f"gather: {e}") from e


def scatter(
    pool: PagedPool, pages: torch.Tensor, slab: torch.Tensor, *, scheme: Scheme = "none", max_blocks: int | None = None
) -> None:
    """The reverse of `gather`: slab [n, slot bytes] into the pool's pages [n], which are distinct."""
    _check("scatter", pool, pages, slab, "slab", scheme)
    with_pages = (pool.regions, pages, slab, pool.faults, scheme, max_blocks or 0)
    try:
        torch.ops.megatron_rl.kv_scatter(*with_pages)
    except IndexError as e:
        raise KernelError(f"scatter: {e}") from e


def move(pool: PagedPool, sources: np.ndarray, targets: np.ndarray) -> None:
    """Copies page sources[i] over page targets[i], int64 [n] on the host; no page is both, none a target twice. See
    `plan_compaction`. In place, on the current stream, without waiting."""
    for name, pages in (("sources", sources), ("targets", targets)):
        check_host_pages("move", name, pages, pool.num_pages)
    if len(sources) != len(targets):
        refuse("move", "targets", f"as many as sources, {len(sources)}", len(targets))
    _check_distinct("move", "targets", targets, pool.num_pages)
    both = np.intersect1d(sources, targets)
    if len(both):
        refuse("move", "sources, targets", "no page in both", f"page {both[0]} and {len(both) - 1} more")
    on_device = [torch.from_numpy(np.ascontiguousarray(pages)).to(pool.device) for pages in (sources, targets)]
    torch.ops.megatron_rl.kv_move(pool.regions, *on_device, pool.faults, 0)


def plan_compaction(used_pages: np.ndarray, num_pages: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves (sources, targets), int64 [moves], after which the used pages are 0 .. len(used_pages) - 1.

    Tail pages go into low holes, lowest first; pages already low stay, so nothing is moved twice. A reserved page counts as
    used. Raises KernelError for a page outside the pool or named twice."""
    check_host_pages("plan_compaction", "used_pages", used_pages, num_pages)
    _check_distinct("plan_compaction", "used_pages", used_pages, num_pages)
    is_low = np.zeros(len(used_pages), dtype=bool)
    is_low[used_pages[used_pages < len(used_pages)]] = True
    sources = np.sort(used_pages[used_pages >= len(used_pages)])
    return sources, np.flatnonzero(~is_low).astype(np.int64)


def raise_faults(pool: PagedPool) -> None:
    """Waits for the GPU; KernelError if a kernel was given pages outside the pool since the last call."""
    num_faults = int(pool.faults.item())
    pool.faults.zero_()
    if num_faults:
        refuse("kv_pages", "pages", f"0 .. {pool.num_pages - 1}", f"{num_faults} outside, which were skipped")


def check_host_pages(function: str, argument: str, pages: np.ndarray, limit: int) -> None:
    """KernelError unless `pages` is int64 [n] on the host within 0 .. limit - 1."""
    if not isinstance(pages, np.ndarray) or pages.dtype != np.int64 or pages.ndim != 1:
        found = f"{pages.dtype} {list(pages.shape)}" if isinstance(pages, np.ndarray) else type(pages).__name__
        refuse(function, argument, "numpy int64 [n]", found)
    outside = pages[(pages < 0) | (pages >= limit)]
    if len(outside):
        refuse(function, argument, f"0 .. {limit - 1}", f"{outside[0]} and {len(outside) - 1} more outside")


def describe(tensor: Any) -> str:
    """Dtype, shape and device, as errors name them."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    layout = "" if tensor.is_contiguous() else f", strides {list(tensor.stride())}"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"


def refuse(function: str, argument: str, expected: object, got: object) -> NoReturn:
    raise KernelError(f"{function}: {argument}: expected {expected}, got {got}")


def _check(function: str, pool: PagedPool, pages: torch.Tensor, slab: torch.Tensor, slab_name: str, scheme: Scheme) -> None:
    if not isinstance(pages, torch.Tensor) or pages.dtype != torch.int64 or pages.dim() != 1 or not pages.is_contiguous():
        refuse(function, "pages", f"contiguous int64 [n] on {pool.device}", describe(pages))
    if pages.device != pool.device:
        refuse(function, "pages", f"contiguous int64 [n] on {pool.device}", describe(pages))
    shape = (pages.shape[0], slot_bytes_of(pool, scheme))
    is_bytes = isinstance(slab, torch.Tensor) and slab.dtype == torch.uint8 and slab.is_contiguous()
    if not is_bytes or slab.shape != shape or slab.device != pool.device:
        refuse(function, slab_name, f"contiguous uint8 {list(shape)} on {pool.device}", describe(slab))


def _check_distinct(function: str, argument: str, pages: np.ndarray, num_pages: int) -> None:
    if len(pages) != np.count_nonzero(np.bincount(pages, minlength=num_pages)):
        refuse(function, argument, "every page once", f"page {np.bincount(pages).argmax()} twice")


def _checked(pool: PagedPool) -> PagedPool:
    if not 1 <= pool.num_regions <= MAX_REGIONS:
        refuse("PagedPool", "layers", f"1 .. {MAX_REGIONS // 2}", pool.num_regions // 2)
    if pool.page_bytes == 0 or pool.num_pages == 0:
        refuse("PagedPool", "pages", "at least one, of at least one byte", f"{pool.num_pages} of {pool.page_bytes} bytes")
    return pool


def _no_faults(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


@torch.library.register_fake("megatron_rl::kv_gather")
@torch.library.register_fake("megatron_rl::kv_scatter")
def _transfer_fake(regions: Any, pages: Any, slab: Any, faults: Any, scheme: str, max_blocks: int) -> None:
    """Nothing is returned, so nothing is shaped; the schema says what is written."""


@torch.library.register_fake("megatron_rl::kv_move")
def _move_fake(regions: Any, sources: Any, targets: Any, faults: Any, max_blocks: int) -> None:
    """As above."""
