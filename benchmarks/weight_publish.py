"""Seconds of a weight publish from Megatron to an SGLang server on the same GPU, against SGLang's plain per-tensor path.

A random model of Qwen3-8B's shape (16.4 GB in bfloat16): Megatron's chunks here, a server with its own random weights there.
Ours is `SGLangEngine.load_weights` from call to return: gather, flush and version label included. Peers are
/update_weights_from_tensor with every tensor by its own handle, all of them in one call (what `sglang.Engine` does) and one call
a tensor, with the same gather and flush. The first publish is checked by checksums around noise; every side must leave the server
with the same checksums. The limit of a row is its target, 0.5 s for 16 GB, scaled by size; for memory, two buckets. Unattended:

    python benchmarks/weight_publish.py [--out DIR] [--layers 36] [--seconds 150]     # one GPU, 45 GB of its memory
    python benchmarks/weight_publish.py --small --out DIR                              # no numbers worth reading: on a CPU
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, machine_ceilings, percentiles, show, synchronize
from result_file import FOLDER, Row, write_result
from served_model import GPUMemory, Lap, Setup, attempt, fill_at_random, megatron_of_one, open_server, prepare, weight_bytes

from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.training.model import PolicyModel, build_model
from megatron_rl.weights import hf
from megatron_rl.weights.transport import Flattener

TARGET_S_PER_BYTE = 0.5 / 16e9
BUCKETS = (64 << 20, 128 << 20, 512 << 20, 1 << 30)  # besides the default
Side = Callable[[], Awaitable[None]]


@dataclass
class Bench:
    setup: Setup
    chunks: list[PolicyModel]
    engine: SGLangEngine
    client: SGLangClient
    clock: Clock
    out: Path
    ceilings: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    version: int = 0

    @property
    def bucket_bytes(self) -> int:
        return self.setup.config.weights.bucket_bytes

    async def ours(self, bucket_bytes: int | None = None) -> None:
        self.version += 1
        await self.engine.load_weights(hf.export_buckets(self.chunks, bucket_bytes or self.bucket_bytes), self.version)

    async def one_call(self) -> None:
        """Every tensor's own handle, in one call."""
        await self._plainly([list(hf.export(self.chunks))])

    async def call_a_tensor(self) -> None:
        await self._plainly([named] for named in hf.export(self.chunks))

    async def _plainly(self, calls: Iterable[list[tuple[str, torch.Tensor]]]) -> None:
        await self.client.post("/flush_cache?timeout=30", None)
        serialize = plain_fake_serialize if self.setup.small else plain_serializer()
        for named in calls:
            if self.setup.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the server's process knows nothing of this stream
            body = {"serialized_named_tensors": [serialize(named)], "load_format": None, "flush_cache": False}
            await asyncio.to_thread(self.client.post_blocking, "/update_weights_from_tensor", body)

    async def checksums(self) -> Any:
        answer = await self.client.post("/weights_checker", {"action": "checksum"})
        return [rank["checksums"] for rank in answer["ranks"]]

    def add(self, *rows: Row) -> None:
        show(list(rows))
        self.rows += rows
        write_result(
            "weight_publish",
            self.rows,
            ceilings=self.ceilings,
            packages=["torch", "aiohttp"] if self.setup.small else ["torch", "sglang", "aiohttp", "megatron-core"],
            device=self.setup.device,
            folder=self.out,
        )


def plain_serializer() -> Callable[[Any], str]:
    from sglang.srt.utils import MultiprocessingSerializer

    return lambda named: MultiprocessingSerializer.serialize(named, output_str=True)


def plain_fake_serialize(named: list[tuple[str, torch.Tensor]]) -> str:
    file = io.BytesIO()
    torch.save({"named_tensors": [(name, tensor.clone()) for name, tensor in named]}, file)
    return base64.b64encode(file.getvalue()).decode()


async def seconds(side: Side, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    await side()
    synchronize(device)
    return time.perf_counter() - start


async def compare(bench: Bench) -> None:
    """Ours and the peers in turn; a peer counts only if it leaves the weights ours left."""
    reference = await bench.checksums()
    peers: dict[str, Side] = {"per tensor, one call": bench.one_call, "per tensor, a call each": bench.call_a_tensor}
    for name, side in list(peers.items()):
        await bench.client.post("/weights_checker", {"action": "reset_tensors"})
        await attempt(name, side(), bench.failures)
        if name in bench.failures:
            del peers[name]
        elif await bench.checksums() != reference:
            bench.failures[name] = "leaves other weights than ours"
            print(f"MISSING {name}: {bench.failures.pop(name)}", flush=True)
            del peers[name]
    sides: dict[str, Side] = {"ours": bench.ours, **peers}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    share = min(40.0, bench.clock.left / 2)
    until = bench.clock.left - share
    while len(taken["ours"]) < 3 or (len(taken["ours"]) < 15 and bench.clock.left > until):
        for name, side in list(sides.items()):
            found = await attempt(name, seconds(side, bench.setup.device), bench.failures)
            if found is None:
                del sides[name]
            else:
                taken[name].append(found)
    await bench.ours()
    assert await bench.checksums() == reference, "ours left other weights than at first"
    gigabytes = weight_bytes(bench.chunks) / 1e9
    for name in [*peers, *(name for name in bench.failures if name.startswith("per tensor"))] or ["per tensor"]:
        bench.add(publish_row(bench, f"publish, {gigabytes:.1f} GB in buckets of {bench.bucket_bytes >> 20} MiB", taken, name))


def publish_row(bench: Bench, case: str, taken: dict[str, list[float]], peer: str | None) -> Row:
    ours = statistics.median(taken["ours"])
    theirs = statistics.median(taken[peer]) if peer and taken.get(peer) else None
    target = TARGET_S_PER_BYTE * weight_bytes(bench.chunks)
    spread = {"ours": taken["ours"], **({"peer": taken[peer]} if peer and theirs else {})}
    return Row(
        case=case,
        unit="s",
        ours=round(ours, 4),
        peer=None if theirs is None else round(theirs, 4),
        peer_name=peer if theirs or peer is None else f"{peer}: failed, {bench.failures.get(peer, 'not tried')}",
        limit=round(target, 4),
        ratio_to_peer=None if theirs is None else round(theirs / ours, 3),
        ratio_to_limit=round(target / ours, 3),
        spread={side: tuple(round(s, 4) for s in percentiles(samples)) for side, samples in spread.items()},
    )


async def bucket_sizes(bench: Bench) -> None:
    for size in BUCKETS if not bench.setup.small else (1 << 12,):
        if bench.clock.has_time_for(f"buckets of {size >> 20} MiB", 5):
            await bench.ours(size)  # its buffers are not there yet
            samples = [await seconds(lambda: bench.ours(size), bench.setup.device) for _ in range(4)]  # noqa: B023  awaited here
            bench.add(publish_row(bench, f"publish, in buckets of {size >> 20} MiB", {"ours": samples}, None))


async def memory(bench: Bench) -> None:
    """Peak of what this process allocated beside the weights, against two buckets."""
    gpu = GPUMemory(bench.setup.device)
    gpu.reset_peak()
    before, free, lowest, watching = gpu.allocated, gpu.free, gpu.free, True

    async def watch() -> None:  # what the server needs shows in the GPU's free memory only
        nonlocal lowest
        while watching:
            lowest = min(lowest, gpu.free)
            await asyncio.sleep(0.002)

    watcher = asyncio.create_task(watch())
    await bench.ours()
    watching = False
    await watcher
    peak = gpu.peak - before
    print(f"least free memory fell by {(free - lowest) / 1e9:.2f} GB, both processes, as sampled", flush=True)
    largest = max(tensor.numel() * tensor.element_size() for _, tensor in hf.export(bench.chunks)) / 1e9
    gb = bench.bucket_bytes / 1e9
    case = f"peak memory beside the weights; a bucket is {gb:.2f} GB, the largest tensor {largest:.2f} GB"
    ratio = round(2e9 * gb / peak, 3) if peak else None
    bench.add(Row(case, "GB", round(peak / 1e9, 3), None, None, round(2 * gb, 3), None, ratio, {}))


async def steps(bench: Bench) -> dict[str, float]:
    """One publish step after step: what `load_weights` overlaps, one after the other."""
    device, serialize = bench.setup.device, bench.setup.serializer()
    lap = Lap(device)
    await bench.client.post("/flush_cache?timeout=30", None)
    lap.mark("flush")
    flattener, buckets = Flattener(), iter(hf.export_buckets(bench.chunks, bench.bucket_bytes))
    lap.mark("flush")
    for tensors in buckets:
        lap.mark("gather")
        bucket = flattener.flatten(tensors)
        lap.mark("flatten")
        body = {"serialized_named_tensors": [serialize(bucket)], "load_format": "flattened_bucket", "flush_cache": False}
        lap.mark("serialize")
        bench.client.post_blocking("/update_weights_from_tensor", body)
        lap.mark("HTTP and load")
    del flattener, bucket
    if device.type == "cuda":
        torch.cuda.ipc_collect()
    lap.mark("collect handles")
    name, tensor = next(t for t in hf.export(bench.chunks) if t[1].dim() == 1)
    num_buckets = sum(1 for _ in hf.export_buckets(bench.chunks, bench.bucket_bytes))
    found, lap = lap.seconds, Lap(device)
    for _ in range(num_buckets):  # as many calls with next to nothing in them
        body["serialized_named_tensors"] = [serialize(Flattener().flatten([(name, tensor)]))]
        bench.client.post_blocking("/update_weights_from_tensor", body)
    lap.mark("of that, HTTP")
    return found | lap.seconds


async def breakdown(bench: Bench) -> None:
    found = [await steps(bench) for _ in range(1 if bench.setup.small else 4)][-3:]
    for step in found[0]:
        samples = [each[step] for each in found]
        spread = {"ours": (round(min(samples), 4), round(max(samples), 4))}
        row = Row(f"step by step: {step}", "s", round(statistics.median(samples), 4), None, None, None, None, None, spread)
        bench.add(row)


async def measure(setup: Setup, clock: Clock, out: Path, ceilings: dict[str, float]) -> dict[str, str]:
    """Every case for which there is time, the claim first; the result is written after each."""
    clock.tell("starting the server")
    async with open_server(setup) as (engine, client):
        clock.tell("building Megatron's model")
        with megatron_of_one(setup.config):
            chunks = build_model(setup.config, setup.model)
            fill_at_random(chunks, seed=1)
            bench = Bench(setup, chunks, engine, client, clock, out, ceilings)
            print(
                f"[{clock.seconds - clock.left:5.1f} s] first publish, checked; {weight_bytes(chunks) / 1e9:.2f} GB", flush=True
            )
            await bench.ours()
            await compare(bench)
            for what, needed, case in (("memory", 3, memory), ("step by step", 8, breakdown), ("buckets", 5, bucket_sizes)):
                if clock.has_time_for(what, needed):
                    await attempt(what, case(bench), bench.failures)
            return bench.failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=150, help="after which no case is started")
    parser.add_argument("--small", action="store_true", help="a tiny model and a fake server, on a CPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        parser.error("no GPU here; --small tries the code on a CPU")
    clock = Clock.of(arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["rollout.sglang.mem_fraction=0.35"]
        setup = prepare(
            Path(folder), small=arguments.small, layers=arguments.layers, overrides=overrides, disable_cuda_graph=True
        )
        ceilings = machine_ceilings(setup.device, 1 << (20 if setup.small else 30), 64 if setup.small else 8192, budget_s=3)
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        failures = asyncio.run(measure(setup, clock, arguments.out, ceilings))
    for what, reason in failures.items():
        print(f"MISSING {what}: {reason}")
    print(f"{clock.seconds - clock.left:.0f} s; {arguments.out}/weight_publish.json")


if __name__ == "__main__":
    main()
