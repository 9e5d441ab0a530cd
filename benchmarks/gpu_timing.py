"""What the GPU benchmarks share: interleaved samples, the machine's ceilings, rows as rates, and peers that may fail.

A peer's failure is printed and becomes a row without a peer; it never ends the run. The same code runs on a CPU at toy size,
which is how it is tried without a GPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from result_file import Row, device_name
from unattended import Clock, command_line

T = TypeVar("T")
CALLS = 5  # of a short kernel a sample, so that what a launch costs the host does not count
Sides = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Command:
    result: str  # the result file's name
    out: Path
    clock: Clock
    is_small: bool
    device: torch.device

    @staticmethod
    def parse(description: str | None, name: str) -> Command:
        """Of a benchmark whose cases are left out when the time is over. Ends the program where it needs a GPU and has none, and
        where another device's result would be lost."""
        parser = command_line(description, seconds=150, then="no case is started", small="toy sizes, on a CPU too")
        parser.add_argument("--tag", help=f"of this machine: the result is {name}_TAG.json, beside those of others")
        arguments = parser.parse_args()
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cpu" and not arguments.small:
            parser.error("no GPU here; --small tries the code on a CPU")
        result = f"{name}_{arguments.tag}" if arguments.tag else name
        path = arguments.out / f"{result}.json"
        measured_on = json.loads(path.read_text(encoding="utf-8"))["device"] if path.exists() else device_name(device)
        if measured_on != device_name(device):
            parser.error(f"{path} is of {measured_on}, this is {device_name(device)}; --tag or --out keeps both")
        return Command(result, arguments.out, Clock.of(arguments.seconds), arguments.small, device)


def attempt(what: str, function: Callable[[], T], failures: dict[str, str]) -> T | None:
    """The function's value, or None with the reason printed and kept."""
    try:
        return function()
    except Exception as e:  # noqa: BLE001  a peer may fail in any way; its row then says so
        note_missing(what, e, failures)
        return None


def note_missing(what: str, error: Exception, failures: dict[str, str]) -> None:
    """Print why `what` has no number, and keep the reason."""
    failures[what] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    print(f"MISSING {what}: {failures[what]}", flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    sides: Sides, device: torch.device, *, budget_s: float, repeats: int = 30, least: int = 3, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds by side, sampled in turn. Each side has an equal share of the budget, and at least `least` samples."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warmups):
        for call in sides.values():
            seconds_of(call, device)
    share = budget_s / len(sides)
    waiting = dict(sides)
    while waiting:
        for name, call in list(waiting.items()):
            taken[name].append(seconds_of(call, device))
            if len(taken[name]) >= repeats or (len(taken[name]) >= least and sum(taken[name]) > share):
                del waiting[name]
    return taken


def percentiles(samples: list[float]) -> tuple[float, float]:
    """p10 and p90; the ends of fewer than ten samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def rate_row(
    case: str, unit: str, amount: float, taken: Mapping[str, list[float]], *, peer: str | None, limit: str | None, digits: int = 2
) -> Row:
    """Amount a second of the sides `ours`, `peer` and `limit` of `taken`."""

    def rate(side: str | None) -> float | None:
        return amount / statistics.median(taken[side]) if side in taken else None

    ours, theirs, most = rate("ours"), rate(peer), rate(limit)
    assert ours is not None
    spread = {"ours": taken["ours"], **({"peer": taken[peer]} if peer in taken else {})}
    return Row(
        case=case,
        unit=unit,
        ours=round(ours, digits),
        peer=None if theirs is None else round(theirs, digits),
        peer_name=peer,
        limit=None if most is None else round(most, digits),
        ratio_to_peer=None if theirs is None else round(ours / theirs, 3),
        ratio_to_limit=None if most is None else round(ours / most, 3),
        spread={
            side: tuple(round(amount / s, digits) for s in reversed(percentiles(samples))) for side, samples in spread.items()
        },
    )


def seconds_row(case: str, ours: list[float], theirs: list[float] | None, *, peer: str | None, limit: float) -> Row:
    """Medians of seconds; less is better. peer: what `theirs` are, or why there are none."""
    own, other = statistics.median(ours), statistics.median(theirs) if theirs else None
    spread = {"ours": ours, **({"peer": theirs} if theirs else {})}
    return Row(
        case=case,
        unit="s",
        ours=round(own, 4),
        peer=None if other is None else round(other, 4),
        peer_name=peer,
        limit=round(limit, 4),
        ratio_to_peer=None if other is None else round(other / own, 3),
        ratio_to_limit=round(limit / own, 3),
        spread={side: tuple(round(s, 4) for s in percentiles(samples)) for side, samples in spread.items()},
    )


def show(rows: list[Row]) -> None:
    for row in rows:
        limit = "" if row.ratio_to_limit is None else f", {row.ratio_to_limit} of limit {row.limit}"
        peer = "" if row.peer_name is None else f", {row.ratio_to_peer} x {row.peer_name} ({row.peer})"
        print(f"{row.case}: {row.ours} {row.unit}{limit}{peer}", flush=True)


def machine_ceilings(device: torch.device, num_bytes: int, gemm_size: int, budget_s: float) -> dict[str, float]:
    """Of this machine in this run: a bf16 matrix product, a device copy (read + written), one contiguous pinned copy each way."""
    a, b = (torch.randn(gemm_size, gemm_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = source.cpu().pin_memory() if device.type == "cuda" else source.clone()
    calls = {
        "gemm": lambda: torch.mm(a, b, out=product),
        "device copy": lambda: target.copy_(source),
        "device to host": lambda: host.copy_(source, non_blocking=True),
        "host to device": lambda: target.copy_(host, non_blocking=True),
    }
    repeated = {name: (lambda call=call: [call() for _ in range(CALLS)]) for name, call in calls.items()}
    samples = interleave(repeated, device, budget_s=budget_s)
    taken = {name: statistics.median(each) / CALLS for name, each in samples.items()}
    found = {
        "bf16_gemm_tflops": 2e-12 * gemm_size**3 / taken["gemm"],
        "device_copy_gb_per_s": 2e-9 * num_bytes / taken["device copy"],
        "device_to_host_gb_per_s": 1e-9 * num_bytes / taken["device to host"],
        "host_to_device_gb_per_s": 1e-9 * num_bytes / taken["host to device"],
    }
    print("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    return {name: float(f"{value:.4g}") for name, value in found.items()}
