"""Snapshot and restore of KV pages against the link's own speed and against what else carries pages, on one GPU.

Qwen3-8B's cache (36 layers, 8 KV heads of 128, bfloat16) in SGLang's layout, random bits, random pages of 1, 4, 16 and 64 tokens.
Ours is `PageCopier` from call to return. The limit of each row is one contiguous copy of as many bytes into the same pinned
memory, sampled in turn with ours and the peers; for device gather and scatter, a device copy. Every side that copies
is checked to the bit before it is timed. Then: a bf16 matrix product beside snapshots, 128k tokens, compressed snapshots. Results
are written after every case, so a run that is cut short keeps what it had.

    python benchmarks/kv_snapshot.py [--tag h200] [--out DIR] [--seconds 240]  # one GPU, 60 GB of its memory, 25 GB of the host's
    python benchmarks/kv_snapshot.py --small --out DIR                         # no numbers worth reading: tries the code on a CPU
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpu_timing import Clock, Command, attempt, interleave, machine_ceilings, rate_row, seconds_of, show
from kv_peers import Peer, index_select, memcpy_batch, sglang_transfer
from result_file import Row, write_result

from megatron_rl.kernels import kv_pages, kv_pages_reference
from megatron_rl.kernels.kv_pages import PagedPool, Scheme, slot_bytes_of
from megatron_rl.kernels.snapshot import PageCopier, slab

QUOTAS = (4, 8, 16)  # of sgl_kernel's kernel, besides its default of 2
CONTIGUOUS = "one contiguous copy"
LAUNCHES = {"ours": 20, "device copy": 20}  # a sample, so that what a launch costs the host does not count; of a peer: 5


@dataclass(frozen=True)
class Sizes:
    layers: int
    kv_heads: int
    head_dim: int
    short: int  # tokens of the full comparison
    long: int  # tokens of the long case
    pool: int  # tokens of the pool
    gemm: int
    page_sizes: tuple[int, ...]


FULL = Sizes(36, 8, 128, 32768, 131072, 160000, 8192, (1, 4, 16, 64))
SMALL = Sizes(2, 2, 16, 128, 256, 320, 64, (1, 4, 16))


@dataclass
class Bench:
    """Everything that stays for the whole run."""

    sizes: Sizes
    device: torch.device
    clock: Clock
    keys: list[torch.Tensor]  # each bf16 [pool tokens, kv_heads, head_dim], random bits
    values: list[torch.Tensor]
    host: torch.Tensor  # uint8 [long tokens * token bytes], pinned
    staging: torch.Tensor  # as large, on the device
    result: str
    out: Path
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    best_quotas: dict[tuple[int, str], int] = field(default_factory=dict)  # of sgl_kernel, by page size and direction

    @staticmethod
    def make(sizes: Sizes, command: Command) -> Bench:
        device, clock = command.device, command.clock
        elements = (sizes.pool, sizes.kv_heads, sizes.head_dim)
        torch.manual_seed(0)
        layers = [random_bits(elements, device) for _ in range(2 * sizes.layers)]
        token_bytes = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * 2
        print(f"[{clock.seconds - clock.left:5.1f} s] pinning {sizes.long * token_bytes / 1e9:.1f} GB", flush=True)
        host = slab(sizes.long, token_bytes, device).view(-1)
        staging = torch.empty(sizes.long * token_bytes, dtype=torch.uint8, device=device)
        return Bench(sizes, device, clock, layers[0::2], layers[1::2], host, staging, command.result, command.out)

    def pool(self, page_size: int) -> PagedPool:
        return PagedPool.from_layers(self.keys, self.values, page_size)

    def add(self, rows: list[Row]) -> None:
        show(rows)
        self.rows += rows
        packages = ["torch", "numpy"]
        write_result(self.result, self.rows, ceilings=self.ceilings, packages=packages, device=self.device, folder=self.out)


def random_bits(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=device).view(torch.bfloat16)


def random_pages(pool: PagedPool, num_tokens: int) -> np.ndarray:
    return np.random.default_rng(num_tokens).permutation(pool.num_pages)[: num_tokens // pool.page_size].astype(np.int64)


class Case:
    """One number of tokens in random pages of one size: ours, checked, and what it needs to check the peers."""

    def __init__(self, bench: Bench, num_tokens: int, page_size: int, scheme: Scheme = "none") -> None:
        self.bench, self.num_tokens, self.page_size = bench, num_tokens, page_size
        self.pool = bench.pool(page_size)
        self.pages = random_pages(self.pool, num_tokens)
        self.on_device = torch.from_numpy(self.pages).to(bench.device)
        self.num_bytes = len(self.pages) * self.pool.slot_bytes
        self.copier = PageCopier(self.pool, scheme=scheme)
        self.host = bench.host[: len(self.pages) * self.copier.slot_bytes]
        self.staging = bench.staging[: len(self.host)]
        self.slots = np.arange(len(self.pages))

    def save(self) -> None:
        self.copier.save(self.pages, self.host.view(len(self.pages), -1), self.slots)

    def load(self) -> None:
        self.copier.load(self.pages, self.host.view(len(self.pages), -1), self.slots)

    def contiguous(self, direction: str) -> Callable[[], object]:
        if direction == "snapshot":
            return lambda: self.host.copy_(self.staging, non_blocking=True)
        return lambda: self.staging.copy_(self.host, non_blocking=True)

    def check(self, peer: Peer) -> None:
        """Both directions to the bit: what it saves, by a few regions; what it loads, after the pages were overwritten."""
        regions = [0, self.pool.num_regions // 2, self.pool.num_regions - 1]
        before = [self.pool.regions[r].view(torch.uint8).flatten(1).index_select(0, self.on_device) for r in regions]
        self.host[::4096] = 0x5A
        peer.save()
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize()
        by_slot = self.host.view(len(self.pages), self.pool.num_regions, -1)
        by_region = self.host.view(self.pool.num_regions, len(self.pages), -1)
        for r, expected in zip(regions, before, strict=True):
            found = by_slot[:, r] if peer.is_slot_major else by_region[r]
            assert torch.equal(found.contiguous().to(self.bench.device), expected), f"region {r} was not saved to the bit"
            self.pool.regions[r].view(torch.uint8)[self.on_device] = 0xA5
        peer.load()
        for r, expected in zip(regions, before, strict=True):
            found = self.pool.regions[r].view(torch.uint8).flatten(1).index_select(0, self.on_device)
            assert torch.equal(found, expected), f"region {r} was not restored to the bit"

    @property
    def name(self) -> str:
        return f"{self.num_tokens // 1024}k tokens" if self.num_tokens >= 1024 else f"{self.num_tokens} tokens"


def find_peers(case: Case, names: tuple[str, ...]) -> dict[str, Peer]:
    """Those of `names` that work here and pass the check. `sgl best` is the fastest of QUOTAS out of the pool and back."""
    bench = case.bench
    makers: dict[str, Callable[[], Peer]] = {
        "cudaMemcpyBatchAsync a page": lambda: memcpy_batch(case.pool, case.pages, case.host),
        "torch.index_select a layer and one copy": lambda: index_select(case.pool, case.on_device, case.host, case.staging),
        "sgl_kernel at its default": lambda: sglang_transfer(case.pool, case.pages, case.host, 2),
        "sgl_kernel at its best": lambda: sglang_best(case),
    }

    def checked(name: str) -> Peer:
        peer = makers[name]()
        case.check(peer)
        return peer

    found = {name: attempt(name, lambda name=name: checked(name), bench.failures) for name in names}
    return {name: peer for name, peer in found.items() if peer is not None}


def sglang_best(case: Case) -> Peer:
    """The fastest quota by direction, found once a page size: the longer case takes the shorter one's."""
    found = case.bench.best_quotas
    for direction in ("save", "load"):
        if (case.page_size, direction) not in found:
            calls = {quota: getattr(sglang_transfer(case.pool, case.pages, case.host, quota), direction) for quota in QUOTAS}
            spent = {quota: min(seconds_of(call, case.bench.device) for _ in range(2)) for quota, call in calls.items()}
            found[case.page_size, direction] = min(spent, key=lambda quota: spent[quota])
            print(f"sgl_kernel {direction}, pages of {case.page_size}: best quota {found[case.page_size, direction]}", flush=True)
    save, load = (sglang_transfer(case.pool, case.pages, case.host, found[case.page_size, d]) for d in ("save", "load"))
    return Peer(save.save, load.load, is_slot_major=False)


def link(bench: Bench, num_tokens: int, page_size: int, names: tuple[str, ...], budget_s: float) -> None:
    """Snapshot and restore of one case: a row for each peer in each direction."""
    case = Case(bench, num_tokens, page_size)
    case.check(Peer(case.save, case.load, is_slot_major=True))
    peers = find_peers(case, names)
    for direction in ("snapshot", "restore"):
        sides = {"ours": case.save if direction == "snapshot" else case.load, CONTIGUOUS: case.contiguous(direction)}
        sides |= {name: peer.save if direction == "snapshot" else peer.load for name, peer in peers.items()}
        taken = interleave(sides, bench.device, budget_s=budget_s / 2, warmups=0)  # the check has run them
        label = f"{direction}, {case.name}, pages of {page_size}"
        missing = {name: f"{name}: failed, {bench.failures[name]}" for name in names if name not in peers}
        bench.add(
            [
                rate_row(label, "GB/s", case.num_bytes / 1e9, taken, peer=missing.get(name, name), limit=CONTIGUOUS)
                for name in names
            ]
        )
    case.copier.close()


def on_device(bench: Bench, page_size: int) -> None:
    """Gather and scatter inside the device against a device copy and against torch, a launch a region. Bytes read and written."""
    case = Case(bench, bench.sizes.short, page_size)
    half = case.num_bytes
    if 2 * half > len(bench.staging):
        raise ValueError("the long case must have room for two copies of the short one")
    packed, other = bench.staging[:half], bench.staging[half : 2 * half]
    slots, reference = packed.view(len(case.pages), -1), other.view(len(case.pages), -1)
    kv_pages.gather(case.pool, case.on_device, slots)
    kv_pages_reference.gather(case.pool, case.on_device, reference)
    assert torch.equal(packed, other), "the gather equals its reference to the bit"
    per_region = other.view(case.pool.num_regions, len(case.pages), -1)
    regions = [region.view(torch.uint8).flatten(1) for region in case.pool.regions]

    def select() -> None:
        for region, part in zip(regions, per_region, strict=True):
            torch.index_select(region, 0, case.on_device, out=part)

    def put_back() -> None:
        for region, part in zip(regions, per_region, strict=True):
            region.index_copy_(0, case.on_device, part)

    calls = {
        "gather": (lambda: kv_pages.gather(case.pool, case.on_device, slots), select, "torch.index_select a layer"),
        "scatter": (lambda: kv_pages.scatter(case.pool, case.on_device, slots), put_back, "torch.index_copy_ a layer"),
    }
    for name, (ours, theirs, peer) in calls.items():
        sides = {"ours": ours, "device copy": lambda: other.copy_(packed), peer: theirs}
        launches = {side: LAUNCHES.get(side, 5) for side in sides}
        repeated = {side: (lambda call=call, n=launches[side]: [call() for _ in range(n)]) for side, call in sides.items()}
        samples = interleave(repeated, bench.device, budget_s=2, warmups=2)
        taken = {side: [seconds / launches[side] for seconds in each] for side, each in samples.items()}
        label = f"device {name}, {case.name}, pages of {page_size}, one launch"
        bench.add([rate_row(label, "GB/s", 2 * half / 1e9, taken, peer=peer, limit="device copy")])
    kv_pages.raise_faults(case.pool)


def compressed(bench: Bench, scheme: Scheme) -> None:
    """Rates in bytes of the pool's own dtype, to compare with plain snapshots; the limit is the plain contiguous copy."""
    for values in (*bench.keys, *bench.values):
        values.normal_()
    case = Case(bench, bench.sizes.short, 16, scheme)
    for direction, call in (("snapshot", case.save), ("restore", case.load)):
        plain = bench.host[: case.num_bytes], bench.staging[: case.num_bytes]
        to, source = plain if direction == "snapshot" else plain[::-1]
        sides = {"ours": call, CONTIGUOUS: lambda to=to, source=source: to.copy_(source, non_blocking=True)}
        taken = interleave(sides, bench.device, budget_s=1.5)
        share = slot_bytes_of(case.pool, scheme) / case.pool.slot_bytes
        label = f"{direction} as {scheme} ({share:.3f} of the bytes), {case.name}, pages of 16, bytes of bfloat16"
        bench.add([rate_row(label, "GB/s", case.num_bytes / 1e9, taken, peer=None, limit=CONTIGUOUS)])
    case.copier.close()


def beside_gemm(bench: Bench, num_products: int = 150, rounds: int = 4) -> None:
    """A queue of matrix products on another stream, alone and while snapshots follow one another."""
    case = Case(bench, bench.sizes.short, 16)
    size, device = bench.sizes.gemm, bench.device
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    stream = torch.cuda.Stream(device)
    peers = find_peers(case, ("sgl_kernel at its best",))
    sides: dict[str, Callable[[], object] | None] = {"alone": None, "ours": case.save}
    sides |= {f"{name} beside it": peer.save for name, peer in peers.items()}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    saved: list[float] = []

    def products_beside(call: Callable[[], object] | None) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            begin.record()
            for _ in range(num_products):
                torch.mm(a, b, out=product)
            end.record()
        own = torch.cuda.current_stream(device)
        while call is not None and not end.query():
            start = time.perf_counter()
            call()
            own.synchronize()
            if call == case.save and not end.query():  # the products ran all the while
                saved.append(time.perf_counter() - start)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    products_beside(None)
    for _ in range(rounds):
        for name, call in sides.items():
            taken[name].append(products_beside(call))
    amount = num_products * 2e-12 * size**3
    peer = next((name for name in sides if name.startswith("sgl")), None)
    rows = [rate_row(f"bf16 GEMM {size}^3 beside snapshots", "TFLOP/s", amount, taken, peer=peer, limit="alone")]
    if saved:
        alone = interleave({CONTIGUOUS: case.contiguous("snapshot")}, device, budget_s=0.5)
        rows.append(
            rate_row(
                f"snapshot beside that GEMM, {case.name}, pages of 16",
                "GB/s",
                case.num_bytes / 1e9,
                {"ours": saved, **alone},
                peer=None,
                limit=CONTIGUOUS,
            )
        )
    bench.add(rows)


def run(bench: Bench) -> None:
    """The cases in order of worth; each is left out, aloud, where the time would not do, and reported where it fails."""
    sizes, clock = bench.sizes, bench.clock
    every = (
        "sgl_kernel at its best",
        "sgl_kernel at its default",
        "cudaMemcpyBatchAsync a page",
        "torch.index_select a layer and one copy",
    )
    small = [page_size for page_size in sizes.page_sizes if page_size != 4]
    cases: list[tuple[str, float, Callable[[], None]]] = []
    cases += [(f"on the device, pages of {p}", 6, lambda p=p: on_device(bench, p)) for p in small]
    cases.append(("beside a GEMM", 6, lambda: beside_gemm(bench)))
    for page_size in sizes.page_sizes:
        names = every if page_size != 4 else every[2:3]
        cases.append((f"link, short, pages of {page_size}", 16, lambda p=page_size, n=names: link(bench, sizes.short, p, n, 12)))
    cases += [(f"link, long, pages of {p}", 17, lambda p=p: link(bench, sizes.long, p, every[:1], 14)) for p in small]
    cases += [(f"compressed, {scheme}", 2, lambda s=scheme: compressed(bench, s)) for scheme in ("int8", "fp8")]
    for what, seconds, call in cases:
        if clock.has_time_for(what, seconds):
            attempt(what, call, bench.failures)
    for what, reason in bench.failures.items():
        print(f"MISSING {what}: {reason}")


def main() -> None:
    command = Command.parse(__doc__, "kv_snapshot")
    clock = command.clock
    bench = Bench.make(SMALL if command.is_small else FULL, command)
    bench.ceilings = machine_ceilings(command.device, 1 << (20 if command.is_small else 30), bench.sizes.gemm, budget_s=4)
    run(bench)
    taken = clock.seconds - clock.left
    print(f"{len(bench.rows)} rows, {len(bench.failures)} missing, {taken:.0f} s; {command.out}/{command.result}.json")


if __name__ == "__main__":
    main()
