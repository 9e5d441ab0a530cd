"""Resuming a cut trajectory: restoring its KV pages from pinned host memory against prefilling the same tokens again, on one GPU.

A model of Qwen3-8B's shape with random weights (36 layers, hidden 4096, 32 query and 8 KV heads of 128, MLP 12288), bfloat16, no
gradients; one sequence, TransformerEngine's causal attention (thd), rotary embedding, every layer's keys and values written into
the pool as a real prefill would. No embedding, no logits: the peer does less than an engine has to. Restore is `PageCopier.load`
of the same tokens in random pages of 16, checked to the bit against what the prefill had written. `tflops` among the curves says
how well the prefill runs; `crossover_picture.py` draws the two curves.

    python benchmarks/kv_resume.py [--tag h200] [--out DIR] [--seconds 150]  # one GPU, 65 GB of its memory, 20 GB of the host's
    python benchmarks/kv_resume.py --small --out DIR                         # no numbers worth reading: tries the code on a CPU
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpu_timing import Command, attempt, interleave, machine_ceilings, percentiles, show
from result_file import Row, write_result
from torch.nn import functional

from megatron_rl.kernels import kv_pages
from megatron_rl.kernels.kv_pages import PagedPool
from megatron_rl.kernels.snapshot import PageCopier, slab

PAGE_SIZE = 16
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gemm: int
    tokens: tuple[int, ...]  # lengths measured; those of the issue are rows, all are in the curves
    reported: tuple[int, ...]

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def flops(self, num_tokens: int) -> float:
        """Multiplications and additions of one causal forward pass: 2 a weight and token, 4 a visible pair and head element."""
        weights = self.hidden * (self.qkv + self.heads * self.head_dim + 3 * self.ffn)
        return self.layers * (2.0 * weights * num_tokens + 2.0 * self.heads * self.head_dim * num_tokens**2)


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
FULL = Shape(36, 4096, 32, 8, 128, 12288, 8192, LENGTHS, (8192, 32768, 131072))
SMALL = Shape(2, 64, 4, 2, 16, 96, 64, (32, 64, 128), (64, 128))


def transformer_engine(shape: Shape, device: torch.device) -> Attention:
    """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim], causal."""
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        shape.heads,
        shape.head_dim,
        num_gqa_groups=shape.kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    ).to(device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([0, len(query)], dtype=torch.int32, device=device)
        bounds = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": len(query), "max_seqlen_kv": len(query)}
        return module(query, key, value, **bounds).view(len(query), -1)

    probe = [
        torch.randn(64, n, shape.head_dim, device=device, dtype=torch.bfloat16) for n in (shape.heads, *[shape.kv_heads] * 2)
    ]
    found, expected = attend(*probe).float(), torch_attention(*probe).float()
    assert float((found - expected).norm() / expected.norm()) < 1e-2, "TransformerEngine's attention differs from torch's"
    return attend


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
    return functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding. x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]"""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


class Prefill:
    """The forward pass of one sequence from position 0."""

    def __init__(self, shape: Shape, pool: PagedPool, attention: Attention, turn: Callable, gate: Callable) -> None:
        self.shape, self.pool, self.attention, self.turn, self.gate = shape, pool, attention, turn, gate
        device = pool.device

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(std=columns**-0.5)

        s, width = shape, shape.heads * shape.head_dim
        self.layers = [
            (weight(s.qkv, s.hidden), weight(s.hidden, width), weight(2 * s.ffn, s.hidden), weight(s.hidden, s.ffn))
            for _ in range(s.layers)
        ]
        self.norm = torch.ones(s.hidden, dtype=torch.bfloat16, device=device)
        frequencies = 1e6 ** -(torch.arange(0, s.head_dim, 2, device=device) / s.head_dim)
        angles = torch.arange(max(s.tokens), device=device)[:, None, None] * frequencies
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.inputs = torch.randn(max(s.tokens), s.hidden, dtype=torch.bfloat16, device=device)

    @torch.no_grad()
    def __call__(self, rows: torch.Tensor) -> None:
        """rows: int64 [tokens], where each token's keys and values go in the pool."""
        s, num_tokens = self.shape, len(rows)
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        hidden = self.inputs[:num_tokens]
        for i, (qkv, out, up, down) in enumerate(self.layers):
            mixed = functional.linear(functional.rms_norm(hidden, (s.hidden,), self.norm), qkv).view(num_tokens, -1, s.head_dim)
            query, key, value = mixed.split([s.heads, s.kv_heads, s.kv_heads], 1)
            query, key, value = self.turn(query, cos, sin), self.turn(key, cos, sin), value.contiguous()
            for region, new in ((self.pool.regions[2 * i], key), (self.pool.regions[2 * i + 1], value)):
                region.view(-1, s.kv_heads, s.head_dim).index_copy_(0, rows, new)
            hidden = hidden + functional.linear(self.attention(query, key, value), out)
            inner = functional.linear(functional.rms_norm(hidden, (s.hidden,), self.norm), up)
            hidden = hidden + functional.linear(self.gate(inner), down)


def compiled(shape: Shape, device: torch.device) -> tuple[Callable, Callable]:
    """Rotary embedding and gated unit as one kernel each, so that the peer loses no time on them; tried before they are used."""
    turn, gate = (torch.compile(function, dynamic=True) for function in (turned, gated))
    for num_tokens in (48, 80):
        x = torch.randn(num_tokens, shape.heads, shape.head_dim, device=device, dtype=torch.bfloat16)
        angles = torch.randn(num_tokens, 1, shape.head_dim // 2, device=device, dtype=torch.bfloat16)
        torch.testing.assert_close(turn(x, angles, angles), turned(x, angles, angles), rtol=0.05, atol=0.05)
        wide = torch.randn(num_tokens, 2 * shape.ffn, device=device, dtype=torch.bfloat16)
        torch.testing.assert_close(gate(wide), gated(wide), rtol=0.05, atol=0.05)
    return turn, gate


@dataclass
class Bench:
    shape: Shape
    device: torch.device
    prefill: Prefill
    peer_name: str
    host: torch.Tensor  # uint8 [pages, slot_bytes], pinned

    def measure(self, num_tokens: int, budget_s: float) -> dict[str, list[float]]:
        """Seconds of `restore`, `prefill` and `copy` (contiguous copies of the same bytes, 2.4 GB each)."""
        pool = self.prefill.pool
        pages = np.random.default_rng(num_tokens).permutation(pool.num_pages)[: num_tokens // PAGE_SIZE].astype(np.int64)
        on_device = torch.from_numpy(pages).to(self.device)
        rows = (on_device[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=self.device)).view(-1)
        copier, slots = PageCopier(pool), np.arange(len(pages))

        def packed(num_slots: int) -> torch.Tensor:
            slots_out = torch.empty((num_slots, pool.slot_bytes), dtype=torch.uint8, device=self.device)
            kv_pages.gather(pool, on_device[:num_slots], slots_out)
            return slots_out

        self.prefill(rows)
        copier.save(pages, self.host, slots)
        checked = min(len(pages), 256)
        before = packed(checked)
        for region in pool.regions:
            region.view(torch.uint8).fill_(0xA5)
        copier.load(pages, self.host, slots)
        assert torch.equal(packed(checked), before), "what was restored is what the prefill had written"
        part = min(len(pages), 1024)  # large enough a copy to be the link's own speed, small enough to have room
        target = torch.empty(part, pool.slot_bytes, dtype=torch.uint8, device=self.device)

        def copy() -> None:
            for source in self.host[: len(pages)].split(part):
                target[: len(source)].copy_(source, non_blocking=True)

        sides = {
            "restore": lambda: copier.load(pages, self.host, slots),
            "prefill": lambda: self.prefill(rows),
            "copy": copy,
        }
        taken = interleave(sides, self.device, budget_s=budget_s, least=2, warmups=0)
        copier.close()
        return taken


def row_of(num_tokens: int, taken: dict[str, list[float]], peer_name: str) -> Row:
    restore, prefill, copy = (statistics.median(taken[side]) for side in ("restore", "prefill", "copy"))
    return Row(
        case=f"{num_tokens // 1024}k tokens of one trajectory back in the pool" if num_tokens >= 1024 else f"{num_tokens} tokens",
        unit="s",
        ours=round(restore, 5),
        peer=round(prefill, 5),
        peer_name=peer_name,
        limit=round(copy, 5),
        ratio_to_peer=round(prefill / restore, 2),
        ratio_to_limit=round(copy / restore, 3),
        spread={
            side: tuple(round(s, 5) for s in percentiles(taken[key])) for side, key in (("ours", "restore"), ("peer", "prefill"))
        },
    )


def make(shape: Shape, device: torch.device, failures: dict[str, str]) -> Bench:
    torch.manual_seed(0)
    size = (max(shape.tokens), shape.kv_heads, shape.head_dim)
    layers = [torch.zeros(size, dtype=torch.bfloat16, device=device) for _ in range(2 * shape.layers)]
    pool = PagedPool.from_layers(layers[0::2], layers[1::2], PAGE_SIZE)
    attention = attempt("TransformerEngine", lambda: transformer_engine(shape, device), failures)
    elementwise = attempt("torch.compile of the elementwise parts", lambda: compiled(shape, device), failures)
    peer_name = "prefill, " + ("TransformerEngine attention" if attention else "torch attention: TransformerEngine failed")
    prefill = Prefill(shape, pool, attention or torch_attention, *(elementwise or (turned, gated)))
    return Bench(shape, device, prefill, peer_name, slab(pool.num_pages, pool.slot_bytes, device))


def report(bench: Bench, command: Command, ceilings: dict[str, float], failures: dict[str, str]) -> None:
    """Measures every length for which there is time, the reported ones first, and writes the result after each."""
    shape, rows = bench.shape, dict[int, Row]()
    points: dict[int, dict[str, float]] = {}
    rate = 0.6e12 * ceilings["bf16_gemm_tflops"]  # a guess at the prefill's, to see whether there is time for it
    for num_tokens in (*shape.reported, *(n for n in shape.tokens if n not in shape.reported)):
        name = f"{num_tokens} tokens"
        if not command.clock.has_time_for(name, 3.2 * shape.flops(num_tokens) / rate):
            continue
        taken = attempt(name, lambda n=num_tokens: bench.measure(n, budget_s=3.0), failures)
        if taken is None:
            continue
        restore, prefill, copy = (statistics.median(taken[side]) for side in ("restore", "prefill", "copy"))
        points[num_tokens] = {
            "tokens": float(num_tokens),
            "restore_s": restore,
            "prefill_s": prefill,
            "copy_s": copy,
            "tflops": shape.flops(num_tokens) / prefill / 1e12,
        }
        row = row_of(num_tokens, taken, bench.peer_name)
        show([row])
        print(f"    prefill {points[num_tokens]['tflops']:.1f} TFLOP/s", flush=True)
        if num_tokens in shape.reported:
            rows[num_tokens] = row
        curves = {curve: [points[n][curve] for n in sorted(points)] for curve in points[num_tokens]}
        packages = ["torch", "numpy"]
        ordered = list(rows.values())
        write_result(
            command.result,
            ordered,
            ceilings=ceilings,
            packages=packages,
            curves=curves,
            device=bench.device,
            folder=command.out,
        )


def main() -> None:
    command, failures = Command.parse(__doc__, "kv_resume"), dict[str, str]()
    shape = SMALL if command.is_small else FULL
    ceilings = machine_ceilings(command.device, 1 << (20 if command.is_small else 30), shape.gemm, budget_s=3)
    bench = make(shape, command.device, failures)
    report(bench, command, ceilings, failures)
    for what, reason in failures.items():
        print(f"MISSING {what}: {reason}")


if __name__ == "__main__":
    main()
