"""PageCopier: what is saved comes back to the bit, in whatever order, chunk and slot; nothing else is written."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import KernelError
from megatron_rl.kernels import kv_pages_reference
from megatron_rl.kernels.kv_pages import slot_bytes_of
from megatron_rl.kernels.snapshot import PageCopier, runs, slab
from tests.kernels.pools import LAYOUTS, Shape, contents, make_pool, poison, randomize

POISON = 0xA5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_slots", [1, 3, 100])
def test_snapshot_then_restore_is_bit_identical_elsewhere_in_the_pool_too(
    dtype: torch.dtype, layout: str, page_size: int, chunk_slots: int, device: torch.device
) -> None:
    pool = make_pool(Shape(pages=23, page_size=page_size), dtype, layout, device)
    rng = np.random.default_rng(page_size)
    pages, back, slots = (rng.permutation(limit)[:17].astype(np.int64) for limit in (23, 23, 40))
    before = contents(pool)
    memory = slab(40, pool.slot_bytes, device)
    memory.fill_(POISON)
    copier = PageCopier(pool, chunk_bytes=chunk_slots * pool.slot_bytes)
    copier.save(pages, memory, slots)
    assert torch.equal(contents(pool), before)
    assert torch.equal(memory[slots].view(17, pool.num_regions, -1).transpose(0, 1), before[:, pages])
    assert bool((memory[np.setdiff1d(np.arange(40), slots)] == POISON).all())

    poison(pool)
    copier.load(back, memory, slots)
    after = contents(pool)
    assert torch.equal(after[:, back], before[:, pages])
    assert bool((after[:, np.setdiff1d(np.arange(23), back)] == POISON).all())
    copier.close()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_compressed_snapshots_equal_the_reference(scheme: str, device: torch.device) -> None:
    pool, twin = (make_pool(Shape(pages=12, head_dim=64), torch.bfloat16, "pool", device) for _ in range(2))
    for each in (pool, twin):
        randomize(each, seed=5)
    pages = np.random.default_rng(6).permutation(12).astype(np.int64)
    memory = slab(12, slot_bytes_of(pool, scheme), device)
    copier = PageCopier(pool, chunk_bytes=5 * memory.shape[1], scheme=scheme)
    copier.save(pages, memory, np.arange(12))
    packed = torch.empty((12, memory.shape[1]), dtype=torch.uint8, device=device)
    kv_pages_reference.gather(twin, torch.from_numpy(pages).to(device), packed, scheme=scheme)
    assert torch.equal(memory, packed.cpu())
    poison(pool)
    copier.load(pages, memory, np.arange(12))
    kv_pages_reference.scatter(twin, torch.from_numpy(pages).to(device), packed, scheme=scheme)
    assert torch.equal(contents(pool), contents(twin))


def test_a_copier_sees_what_the_callers_stream_was_given_and_serves_again(device: torch.device) -> None:
    pool = make_pool(Shape(pages=64, head_dim=64), torch.float32, "pool", device)
    memory = slab(64, pool.slot_bytes, device)
    copier = PageCopier(pool, chunk_bytes=7 * pool.slot_bytes)
    every = np.arange(64)
    for turn in range(3):
        for region in pool.regions:
            region.fill_(float(turn))
        copier.save(every, memory, every)
        assert bool((memory.view(torch.float32) == turn).all())
        memory.view(torch.float32).fill_(turn + 0.5)
        copier.load(every, memory, every)
        assert all(bool((region == turn + 0.5).all()) for region in pool.regions)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 60)))
def test_runs_cover_the_slots_in_the_fewest_copies(chosen: set[int]) -> None:
    slots = np.array(sorted(chosen), dtype=np.int64)
    found = list(runs(slots))
    assert [slot for run in found for slot in range(run.slots.start, run.slots.stop)] == slots.tolist()
    assert [row for run in found for row in range(run.buffer.start, run.buffer.stop)] == list(range(len(slots)))
    assert all(a.slots.stop < b.slots.start for a, b in zip(found, found[1:], strict=False))


def test_nothing_is_copied_for_no_pages(device: torch.device) -> None:
    pool = make_pool(Shape(), torch.float32, "layers", device)
    before, none = contents(pool), np.zeros(0, dtype=np.int64)
    memory = slab(2, pool.slot_bytes, device)
    memory.fill_(POISON)
    copier = PageCopier(pool)
    copier.save(none, memory, none)
    copier.load(none, memory, none)
    assert torch.equal(contents(pool), before) and bool((memory == POISON).all())


def test_bad_arguments_are_named_with_what_was_expected_and_found(device: torch.device) -> None:
    pool = make_pool(Shape(), torch.bfloat16, "layers", device)
    memory = slab(4, pool.slot_bytes, device)
    before = contents(pool)
    copier = PageCopier(pool)
    ids = np.arange(3)
    wrong = [
        ("save: slab: expected contiguous uint8", copier.save, ids, memory[:, :-1], ids),
        ("load: slab: expected contiguous uint8", copier.load, ids, memory.view(torch.int8), ids),
        (r"save: pages: expected 0 \.\. 8, got 9", copier.save, ids + 7, memory, ids),
        (r"load: slots: expected 0 \.\. 3, got 4", copier.load, ids, memory, ids + 2),
        ("save: slots: expected each at most once", copier.save, ids, memory, np.array([1, 2, 1])),
        ("load: pages: expected each at most once", copier.load, np.array([1, 2, 1]), memory, ids),
        ("save: slots: expected as many as pages, 3, got 2", copier.save, ids, memory, ids[:2]),
        ("save: pages: expected numpy int64", copier.save, ids.astype(np.int32), memory, ids),
    ]
    if device.type == "cuda":
        wrong.append(("save: slab: expected pinned", copier.save, ids, torch.empty(4, pool.slot_bytes, dtype=torch.uint8), ids))
    for message, call, pages, where, slots in wrong:
        with pytest.raises(KernelError, match=message):
            call(pages, where, slots)
    assert torch.equal(contents(pool), before)
    for options in ({"chunk_bytes": 0}, {"max_blocks": 0}):
        with pytest.raises(KernelError, match="at least 1"):
            PageCopier(pool, **options)
    with pytest.raises(KernelError, match="num_slots"):
        slab(0, 4, device)
    copier.close()
    with pytest.raises(KernelError, match="closed"):
        copier.save(ids, memory, ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_slabs_are_pinned_and_exactly_as_large_as_asked_while_a_view_lives() -> None:
    memory = slab(3, 5000, torch.device("cuda", 0))
    assert memory.is_pinned() and memory.untyped_storage().nbytes() == 15000
    view = memory[1:]
    del memory
    gc.collect()
    assert view.is_pinned()
    view.fill_(7)
    assert bool((view.cuda() == 7).all())
