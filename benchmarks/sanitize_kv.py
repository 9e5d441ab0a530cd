"""Every kernel on KV pages once, at sizes with tails, for `sanitize.sh`: each access width, each compressed dtype and row length.

Bad pages are among those given, so that the guard is exercised too. Correctness is the tests' concern; here only a restored copy
is looked at, to see that the kernels ran. With `--planted`, only a gather that reads behind its pool, which must be reported.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from megatron_rl.kernels import kv_pages
from megatron_rl.kernels.kv_pages import PagedPool, slot_bytes_of
from megatron_rl.kernels.snapshot import PageCopier, slab

DEVICE = torch.device("cuda", 0)
PAGES, BAD = 6, (-1, 6)


def make_pool(kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype) -> PagedPool:
    host = torch.arange(2 * PAGES * 2 * kv_heads * page_size * head_dim).remainder(251).to(dtype)
    return PagedPool.from_pool(host.view(2, PAGES, 2, kv_heads, page_size, head_dim).to(DEVICE))


def round_trip(pool: PagedPool, scheme: kv_pages.Scheme) -> None:
    pages = torch.tensor([3, BAD[0], 0, BAD[1], 5], device=DEVICE)
    packed = torch.zeros((len(pages), slot_bytes_of(pool, scheme)), dtype=torch.uint8, device=DEVICE)
    for max_blocks in (None, 1):  # the two ways a copy is cut up
        kv_pages.gather(pool, pages, packed, scheme=scheme, max_blocks=max_blocks)
        kv_pages.scatter(pool, pages, packed, scheme=scheme, max_blocks=max_blocks)
    assert pool.faults.item() == 8
    pool.faults.zero_()


def read_too_far() -> None:
    """From a pool whose memory ends before its pages do."""
    pool = make_pool(4, 4, 128, torch.bfloat16)
    storage = pool.regions[0].untyped_storage()
    storage.resize_(storage.nbytes() // 2)
    packed = torch.zeros((PAGES, pool.slot_bytes), dtype=torch.uint8, device=DEVICE)
    kv_pages.gather(pool, torch.arange(PAGES, device=DEVICE), packed)
    torch.cuda.synchronize()


def run_every_kernel() -> None:
    # Bytes of a page: 4096 (16 a thread), 24 (8), 12 (4), 6 (2), 3 (1).
    for kv_heads, page_size, head_dim, dtype in (
        (4, 4, 128, torch.bfloat16),
        (3, 1, 4, torch.bfloat16),
        (3, 2, 1, torch.bfloat16),
        (3, 1, 1, torch.bfloat16),
        (3, 1, 1, torch.uint8),
    ):
        pool = make_pool(kv_heads, page_size, head_dim, dtype)
        round_trip(pool, "none")
        kv_pages.move(pool, np.array([4, 5]), np.array([0, 1]))
    for scheme in ("int8", "fp8"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for head_dim in (100, 132, 260):
                round_trip(make_pool(3, 3, head_dim, dtype), scheme)
    pool = make_pool(2, 3, 64, torch.bfloat16)
    memory, pages = slab(PAGES, pool.slot_bytes, DEVICE), np.arange(PAGES)[::-1].copy()
    before = [region.clone() for region in pool.regions]
    copier = PageCopier(pool, chunk_bytes=2 * pool.slot_bytes)
    copier.save(pages, memory, np.arange(PAGES))
    for region in pool.regions:
        region.zero_()
    copier.load(pages, memory, np.arange(PAGES))
    assert all(torch.equal(a, b) for a, b in zip(pool.regions, before, strict=True))
    kv_pages.raise_faults(pool)
    print("every kernel ran")


def main() -> None:
    torch.cuda.set_device(DEVICE)
    if "--planted" in sys.argv[1:]:
        read_too_far()
    else:
        run_every_kernel()


if __name__ == "__main__":
    main()
