"""`kv_pages.py` in plain torch, one region after another: what tests compare the kernels with, and what benchmarks beat.

Same signatures as the operators, except that it takes no grid and looks for no bad page.
"""

from __future__ import annotations

import torch

from megatron_rl.kernels.kv_pages import PagedPool, Scheme, slot_bytes_of

LARGEST = {"int8": 127.0, "fp8": 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def gather(pool: PagedPool, pages: torch.Tensor, out: torch.Tensor, *, scheme: Scheme = "none") -> None:
    if scheme == "none":
        slots = out.view(-1, pool.num_regions, pool.page_bytes)
        for i, region in enumerate(pool.regions):
            slots[:, i] = region.view(torch.uint8).index_select(0, pages).flatten(1)
        return
    codes, scales = _parts(pool, out, scheme)
    for i, region in enumerate(pool.regions):
        rows = region.index_select(0, pages).flatten(1, 2).float()  # [n, rows, head_dim]
        largest = rows.abs().amax(2)
        scale = torch.where(
            largest.isfinite(), (largest / largest.new_tensor(LARGEST[scheme])).clamp(min=SMALLEST_SCALE), torch.nan
        )
        scaled = torch.where(scale.isfinite()[..., None], rows / scale[..., None], 0.0)
        if scheme == "int8":
            codes[:, i] = scaled.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        else:
            codes[:, i] = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        scales[:, i] = scale


def scatter(pool: PagedPool, pages: torch.Tensor, slab: torch.Tensor, *, scheme: Scheme = "none") -> None:
    if scheme == "none":
        slots = slab.view(-1, pool.num_regions, pool.page_bytes)
        for i, region in enumerate(pool.regions):
            bytes_of = region.view(torch.uint8)
            bytes_of[pages] = slots[:, i].view(-1, *bytes_of.shape[1:])
        return
    codes, scales = _parts(pool, slab, scheme)
    for i, region in enumerate(pool.regions):
        stored = codes[:, i].contiguous().view(torch.int8 if scheme == "int8" else torch.float8_e4m3fn)
        region[pages] = (stored.float() * scales[:, i, :, None]).to(pool.dtype).view(-1, *region.shape[1:])


def move(pool: PagedPool, sources: torch.Tensor, targets: torch.Tensor) -> None:
    for region in pool.regions:
        region.view(torch.uint8)[targets] = region.view(torch.uint8)[sources]


def _parts(pool: PagedPool, slab: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a compressed slab: codes, uint8 [n, regions, rows, head_dim], and scales, float32 [n, regions, rows]."""
    rows = pool.page_size * pool.kv_heads
    num_codes = pool.num_regions * rows * pool.head_dim
    assert slab.shape[1] == slot_bytes_of(pool, scheme)
    codes = slab[:, :num_codes].view(-1, pool.num_regions, rows, pool.head_dim)
    scales = slab[:, num_codes:].view(torch.float32).view(-1, pool.num_regions, rows)
    return codes, scales
