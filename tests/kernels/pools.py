"""Pools of random bits in both layouts, and how to read them back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rl.kernels.kv_pages import PagedPool


@dataclass(frozen=True)
class Shape:
    layers: int = 2
    pages: int = 9
    kv_heads: int = 2
    page_size: int = 4
    head_dim: int = 8


LAYOUTS = ("layers", "pool")


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern, NaN too: a copy knows no numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def make_pool(shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, seed: int = 0) -> PagedPool:
    if layout == "pool":
        sizes = (shape.layers, shape.pages, 2, shape.kv_heads, shape.page_size, shape.head_dim)
        return PagedPool.from_pool(random_bits(sizes, dtype, seed).to(device))
    sizes = (shape.pages * shape.page_size + shape.page_size - 1, shape.kv_heads, shape.head_dim)  # a partial page at the end
    layers = [random_bits(sizes, dtype, seed + i).to(device) for i in range(2 * shape.layers)]
    return PagedPool.from_layers(layers[0::2], layers[1::2], shape.page_size)


def fill(pool: PagedPool, value: float) -> None:
    for region in pool.regions:
        region.fill_(value)


def poison(pool: PagedPool) -> None:
    for region in pool.regions:
        region.view(torch.uint8).fill_(0xA5)


def contents(pool: PagedPool) -> torch.Tensor:
    """uint8 [regions, pages, page bytes] on the host"""
    return torch.stack([region.view(torch.uint8).flatten(1).cpu() for region in pool.regions])


def randomize(pool: PagedPool, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Fills the pool with normal numbers and returns them: float32 [regions, pages, page elements] on the host."""
    generator = torch.Generator().manual_seed(seed)
    for region in pool.regions:
        region.copy_(torch.randn(region.shape, generator=generator) * scale)
    return values(pool)


def values(pool: PagedPool) -> torch.Tensor:
    """float32 [regions, pages, page elements] on the host"""
    return torch.stack([region.flatten(1).float().cpu() for region in pool.regions])
