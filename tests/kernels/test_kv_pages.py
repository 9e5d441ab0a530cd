"""Gather, scatter and move against their plain-torch reference, exactness, error bounds, bad arguments, torch.compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.errors import KernelError
from megatron_rl.kernels import kv_pages, kv_pages_reference
from megatron_rl.kernels.kv_pages import PagedPool, slot_bytes_of
from tests.kernels.pools import LAYOUTS, Shape, contents, make_pool, poison, randomize, values

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)
POISON = 0xA5


def random_pages(num_pages: int, num_chosen: int, seed: int, device: torch.device) -> torch.Tensor:
    chosen = np.random.default_rng(seed).permutation(num_pages)[:num_chosen].astype(np.int64)
    return torch.from_numpy(chosen).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_gather_then_scatter_is_bit_identical_and_writes_nothing_else(
    dtype: torch.dtype, layout: str, page_size: int, device: torch.device
) -> None:
    pool = make_pool(Shape(pages=11, page_size=page_size), dtype, layout, device)
    pages = random_pages(pool.num_pages, 7, page_size, device)
    before = contents(pool)
    # Rows before and after the slots show a write past them.
    guarded = torch.full((len(pages) + 2, pool.slot_bytes), POISON, dtype=torch.uint8, device=device)
    kv_pages.gather(pool, pages, guarded[1:-1])
    expected = before[:, pages.cpu()].transpose(0, 1).reshape(len(pages), pool.slot_bytes)
    assert torch.equal(guarded[1:-1].cpu(), expected)
    assert bool((guarded[[0, -1]] == POISON).all())
    assert torch.equal(contents(pool), before)

    poison(pool)
    kv_pages.scatter(pool, pages, guarded[1:-1])
    after, chosen = contents(pool), torch.zeros(pool.num_pages, dtype=torch.bool)
    chosen[pages.cpu()] = True
    assert torch.equal(after[:, chosen], before[:, chosen])
    assert bool((after[:, ~chosen] == POISON).all())
    kv_pages.raise_faults(pool)


shapes = st.builds(
    Shape,
    layers=st.integers(1, 3),
    pages=st.integers(1, 12),
    kv_heads=st.integers(1, 3),
    page_size=st.integers(1, 5),
    head_dim=st.integers(1, 40),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
    blocks=st.sampled_from([None, 1, 3]),
)
def test_copies_of_any_shape_equal_the_reference(
    device: torch.device, shape: Shape, dtype: torch.dtype, layout: str, seed: int, blocks: int | None
) -> None:
    pool, twin = (make_pool(shape, dtype, layout, device, seed) for _ in range(2))
    pages = random_pages(shape.pages, seed % (shape.pages + 1), seed, device)
    ours, theirs = (torch.empty((len(pages), pool.slot_bytes), dtype=torch.uint8, device=device) for _ in range(2))
    kv_pages.gather(pool, pages, ours, max_blocks=blocks)
    kv_pages_reference.gather(twin, pages, theirs)
    assert torch.equal(ours, theirs)
    targets = random_pages(shape.pages, len(pages), seed + 1, device)
    kv_pages.scatter(pool, targets, ours, max_blocks=blocks)
    kv_pages_reference.scatter(twin, targets, theirs)
    assert torch.equal(contents(pool), contents(twin))
    order = np.random.default_rng(seed).permutation(shape.pages).astype(np.int64)
    half = shape.pages // 2
    kv_pages.move(pool, order[:half], order[half : 2 * half])
    kv_pages_reference.move(twin, *(torch.from_numpy(part.copy()).to(device) for part in (order[:half], order[half : 2 * half])))
    assert torch.equal(contents(pool), contents(twin))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(
        Shape,
        layers=st.integers(1, 2),
        pages=st.integers(1, 5),
        kv_heads=st.integers(1, 3),
        page_size=st.integers(1, 5),
        head_dim=st.sampled_from([4, 64, 100, 128, 132, 256, 260, 512]),
    ),
    dtype=st.sampled_from(DTYPES[:3]),
    layout=st.sampled_from(LAYOUTS),
    scheme=st.sampled_from(["int8", "fp8"]),
    seed=st.integers(0, 99),
)
def test_compression_of_any_shape_equals_the_reference_to_the_bit(
    device: torch.device, shape: Shape, dtype: torch.dtype, layout: str, scheme: kv_pages.Scheme, seed: int
) -> None:
    pool, twin = (make_pool(shape, dtype, layout, device) for _ in range(2))
    for each in (pool, twin):
        randomize(each, seed, scale=10.0 ** (seed % 5 - 2))
    pages = random_pages(shape.pages, shape.pages, seed, device)
    sizes = (len(pages), slot_bytes_of(pool, scheme))
    ours, theirs = (torch.full(sizes, POISON, dtype=torch.uint8, device=device) for _ in range(2))
    kv_pages.gather(pool, pages, ours, scheme=scheme)
    kv_pages_reference.gather(twin, pages, theirs, scheme=scheme)
    assert torch.equal(ours, theirs)
    for each in (pool, twin):
        poison(each)
    kv_pages.scatter(pool, pages, ours, scheme=scheme)
    kv_pages_reference.scatter(twin, pages, theirs, scheme=scheme)
    assert torch.equal(contents(pool), contents(twin))


ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, relative


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("spread", ["normal", "outlier", "zeros"])
def test_compression_keeps_its_error_bound(
    scheme: kv_pages.Scheme, dtype: torch.dtype, spread: str, device: torch.device
) -> None:
    pool = make_pool(Shape(head_dim=128), dtype, "layers", device)
    randomize(pool, seed=1)
    for region in pool.regions:
        if spread == "outlier":
            region[..., 5] = 100.0
        elif spread == "zeros":
            region[..., 1:] = 0.0  # what a page holds past its last token, beside one number
            region[0] = 0.0
    before = values(pool)
    pages = torch.arange(pool.num_pages, device=device)
    packed = torch.empty((pool.num_pages, slot_bytes_of(pool, scheme)), dtype=torch.uint8, device=device)
    kv_pages.gather(pool, pages, packed, scheme=scheme)
    poison(pool)
    kv_pages.scatter(pool, pages, packed, scheme=scheme)
    rows, restored = before.unflatten(2, (-1, 128)), values(pool).unflatten(2, (-1, 128))
    scale = rows.abs().amax(-1, keepdim=True) / {"int8": 127.0, "fp8": 448.0}[scheme]
    # int8: half a step. e4m3 has three bits after the leading one, so half a unit in the last place is 2^-4 of the number, and
    # below its smallest normal number, 2^-6, steps are 2^-9. The last factor is for float32's own rounding of the quotient.
    bound = scale / 2 if scheme == "int8" else torch.maximum(rows.abs() * 2.0**-4, scale * 2.0**-10)
    bound = bound * (1 + 1e-5) + restored.abs() * ROUNDING[dtype] * 1.001
    assert bool(((restored - rows).abs() <= bound).all())
    assert spread != "zeros" or torch.equal(restored == 0, rows == 0)
    if spread == "normal":  # the bound is met closely somewhere, so it is no looser than it need be
        assert float(((restored - rows).abs() / bound.clamp(min=1e-30)).max()) > 0.8


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_comes_back_as_nan(scheme: kv_pages.Scheme, bad: float, device: torch.device) -> None:
    pool = make_pool(Shape(pages=2), torch.bfloat16, "layers", device)
    randomize(pool, seed=2)
    pool.regions[1][1, 2, 1, 3] = bad
    pages = torch.arange(2, device=device)
    packed = torch.empty((2, slot_bytes_of(pool, scheme)), dtype=torch.uint8, device=device)
    kv_pages.gather(pool, pages, packed, scheme=scheme)
    kv_pages.scatter(pool, pages, packed, scheme=scheme)
    lost = values(pool).isnan().unflatten(2, (-1, 8))  # [regions, pages, rows, head_dim]
    assert bool(lost[1, 1, 2 * 2 + 1].all()) and int(lost.sum()) == 8


@settings(max_examples=100, deadline=None)
@given(num_pages=st.integers(1, 60), data=st.data())
def test_compaction_moves_tail_pages_into_low_holes_only(num_pages: int, data: st.DataObject) -> None:
    used = np.array(data.draw(st.lists(st.integers(0, num_pages - 1), unique=True)), dtype=np.int64)
    sources, targets = kv_pages.plan_compaction(used, num_pages)
    assert len(sources) == len(targets) == int((used >= len(used)).sum())
    assert set(sources) <= set(used) and not set(targets) & set(used)
    assert (sources >= len(used)).all() and (targets < len(used)).all()
    assert set(used) - set(sources) | set(targets) == set(range(len(used)))


def test_compaction_keeps_every_page(device: torch.device) -> None:
    pool = make_pool(Shape(pages=20), torch.bfloat16, "pool", device)
    used = np.random.default_rng(3).permutation(20)[:8].astype(np.int64)
    before = contents(pool)
    sources, targets = kv_pages.plan_compaction(used, 20)
    assert len(sources)
    kv_pages.move(pool, sources, targets)
    where = {int(page): int(page) for page in used} | dict(zip(sources.tolist(), targets.tolist(), strict=True))
    after = contents(pool)
    for page, now in where.items():
        assert torch.equal(after[:, now], before[:, page])


def test_bad_arguments_are_named_with_what_was_expected_and_found(device: torch.device) -> None:
    pool = make_pool(Shape(), torch.bfloat16, "layers", device)
    pages = torch.arange(3, device=device)
    out = torch.empty((3, pool.slot_bytes), dtype=torch.uint8, device=device)
    wrong = [
        ("gather: pages: expected contiguous int64", pages.int(), out),
        ("gather: pages: expected contiguous int64", torch.arange(6, device=device)[::2], out),
        (r"gather: out: expected contiguous uint8 \[3, 512\]", pages, out[:2]),
        (r"gather: out: expected contiguous uint8 \[3, 512\]", pages, out.view(torch.int8)),
        (r"gather: out: .*strides", pages, torch.empty((3, 600), dtype=torch.uint8, device=device)[:, :512]),
    ]
    for message, bad_pages, bad_out in wrong:
        with pytest.raises(KernelError, match=message):
            kv_pages.gather(pool, bad_pages, bad_out)
    for sources, targets in (([0, 1], [1, 2]), ([0, 1], [2, 2]), ([0], [9]), ([-1], [2]), ([0], [1, 2])):
        with pytest.raises(KernelError, match="move: "):
            kv_pages.move(pool, np.array(sources), np.array(targets))
    with pytest.raises(KernelError, match="scheme: expected a pool of float32"):
        slot_bytes_of(make_pool(Shape(), torch.uint8, "layers", device), "int8")
    with pytest.raises(KernelError, match=r"head_dim 6; use none"):
        slot_bytes_of(make_pool(Shape(head_dim=6), torch.float32, "layers", device), "fp8")
    layer = torch.zeros(8, 2, 4, device=device)
    with pytest.raises(KernelError, match=r"values\[0\]"):
        PagedPool.from_layers([layer], [layer.double()], 1)
    with pytest.raises(KernelError, match="page_size"):
        PagedPool.from_layers([layer], [layer], 9)
    with pytest.raises(KernelError, match="pool: expected contiguous"):
        PagedPool.from_pool(torch.zeros(2, 3, 2, 2, 4, 8, device=device)[:, ::2])


@pytest.mark.parametrize("bad", [-1, 9, 1 << 40])
def test_a_page_outside_the_pool_is_refused_and_touches_nothing(bad: int, device: torch.device) -> None:
    pool = make_pool(Shape(), torch.bfloat16, "layers", device)
    before = contents(pool)
    pages = torch.tensor([1, bad, 2], device=device)
    slab = torch.full((3, pool.slot_bytes), POISON, dtype=torch.uint8, device=device)
    for call in (kv_pages.gather, kv_pages.scatter):
        with pytest.raises(KernelError, match=r"expected (a page in )?0 \.\. 8"):
            call(pool, pages, slab)
            kv_pages.raise_faults(pool)
        kv_pages.raise_faults(pool)  # told once
        if call is kv_pages.gather:
            assert bool((slab[1] == POISON).all())
            assert torch.equal(contents(pool), before)
    assert torch.equal(contents(pool)[:, [0, 3, 4, 5, 6, 7, 8]], before[:, [0, 3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_code_sees_what_gather_and_scatter_write(layout: str, device: torch.device) -> None:
    pool = make_pool(Shape(), torch.bfloat16, layout, device)
    randomize(pool, seed=4)
    before = values(pool)

    def swap_and_double(pages: torch.Tensor) -> torch.Tensor:
        slab = torch.empty((len(pages), pool.slot_bytes), dtype=torch.uint8, device=pages.device)
        kv_pages.gather(pool, pages, slab)
        kv_pages.scatter(pool, pages.flip(0), slab)
        return slab.view(torch.bfloat16) * 2

    pages = torch.tensor([5, 0, 3], device=device)
    compiled = torch.compile(swap_and_double, backend="aot_eager", fullgraph=True)
    doubled = compiled(pages)
    found = doubled.float().cpu().view(3, pool.num_regions, -1).transpose(0, 1)
    assert torch.equal(found, before[:, [5, 0, 3]] * 2)
    after = values(pool)
    assert torch.equal(after[:, [3, 0, 5]], before[:, [5, 0, 3]])
    torch._dynamo.reset()


def test_operators_declare_what_they_write_and_run_on_fake_tensors(device: torch.device) -> None:
    pool = make_pool(Shape(), torch.bfloat16, "layers", device)
    pages = torch.arange(3, device=device)
    slab = torch.empty((3, pool.slot_bytes), dtype=torch.uint8, device=device)
    for name, written, arguments in (
        ("kv_gather", {"out", "faults"}, (pool.regions, pages, slab, pool.faults, "none", 0)),
        ("kv_scatter", {"regions", "faults"}, (pool.regions, pages, slab, pool.faults, "none", 0)),
        ("kv_move", {"regions", "faults"}, (pool.regions, pages, pages + 4, pool.faults, 0)),
    ):
        operator = getattr(torch.ops.megatron_rl, name).default
        declared = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert declared == written, name
        checks = ("test_schema", "test_faketensor")  # nothing else is written; fake tensors are taken
        assert torch.library.opcheck(operator, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


def test_operators_called_without_their_face_refuse_with_a_value_error(device: torch.device) -> None:
    pool = make_pool(Shape(), torch.bfloat16, "layers", device)
    regions, pages = pool.regions, torch.arange(3, device=device)
    slab = torch.empty((3, pool.slot_bytes), dtype=torch.uint8, device=device)
    flat, shorter = [region.flatten(1) for region in regions], [*regions[:3], regions[3][:-1]]
    for message, bad_regions, bad_pages, bad_slab, scheme in (
        ("scheme: expected none, int8 or fp8, got int4", regions, pages, slab, "int4"),
        ("regions: expected 1 to 448, got 0", [], pages, slab, "none"),
        (r"regions: expected \[pages, a, b, row\].*got BFloat16 \[9, 64\], strides \[64, 1\], on", flat, pages, slab, "none"),
        (r"regions\[3\]: expected as the first, .* got BFloat16 \[8, 4, 2, 8\]", shorter, pages, slab, "none"),
        ("scheme: expected a pool of float32", [r.view(torch.uint8) for r in regions], pages, slab, "fp8"),
        ("pages: expected contiguous int64 .* got Int", regions, pages.int(), slab, "none"),
        (r"slab: expected contiguous uint8 \[3, 512\] on .* got Byte \[2, 512\]", regions, pages, slab[:2], "none"),
    ):
        for operator in (torch.ops.megatron_rl.kv_gather, torch.ops.megatron_rl.kv_scatter):
            with pytest.raises(ValueError, match="kv_pages: " + message):
                operator(bad_regions, bad_pages, bad_slab, pool.faults, scheme, 0)
    with pytest.raises(ValueError, match="targets: expected 3 pages, got 2"):
        torch.ops.megatron_rl.kv_move(regions, pages, pages[:2] + 4, pool.faults, 0)
