"""Seconds of a weight publish from Megatron to an SGLang server, on the same GPU or another, against SGLang's per-tensor path.

A random model of Qwen3-8B's shape (16.4 GB in bfloat16): Megatron's chunks here, a server with its own random weights there.
Ours is `SGLangEngine.load_weights` from call to return: gather, flush and version label included. The peers, with the same gather
and flush: /update_weights_from_tensor with every tensor by its own handle, all in one call (what `sglang.Engine` does), or one
call a tensor; by broadcast, /update_weights_from_distributed with every tensor broadcast alone, in one call. All in one call
needs every tensor there at once: on one rank only copies of the fused QKV matrices are new memory, on several the whole model is.
The first publish is checked by checksums around noise; every side must leave the server with the same checksums. The limit of a
row is its target, 0.5 s for 16 GB, scaled by size; for memory, two buckets. Where seconds go: `publish_profile.py`. Unattended:

    python benchmarks/weight_publish.py [--out DIR] [--layers 36] [--seconds 120]     # one GPU, 45 GB of its memory
    python benchmarks/weight_publish.py --transport distributed [...]                 # two GPUs; writes weight_broadcast.json
    python benchmarks/weight_publish.py --transport checkpoint-engine --seconds 240 [...]   # two: publish_side_by_side.py
    python benchmarks/weight_publish.py --small --out DIR                              # no numbers worth reading: on a CPU
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_timing import Clock, command_line, machine_ceilings, seconds_row, show
from publish_profile import Publish, profile
from publish_side_by_side import NAME, side_by_side
from result_file import Row, write_result
from served_model import (
    GPUMemory,
    Setup,
    Side,
    attempt,
    fill_at_random,
    megatron_of_one,
    open_server,
    prepare,
    seconds,
    target_seconds,
    weight_bytes,
)

from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import NCCLGroup
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.rollout.engines.sglang_transport import Group
from megatron_rl.training.model import PolicyModel, build_model
from megatron_rl.weights import hf
from megatron_rl.weights.transport import Tensors

BUCKETS = (128 << 20, 256 << 20, 512 << 20, 2 << 30)  # besides the default


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
    def name(self) -> str:
        return "weight_publish" if self.setup.config.rollout.sglang.colocated else "weight_broadcast"

    @property
    def bucket_bytes(self) -> int:
        return self.engine._config.bucket_bytes

    def buckets(self) -> Iterable[Tensors]:
        return hf.export_buckets(self.chunks, min(self.setup.config.weights.bucket_bytes, self.bucket_bytes // 4))

    async def ours(self) -> None:
        self.version += 1
        await self.engine.load_weights(self.buckets(), self.version)

    @property
    def peers(self) -> dict[str, Side]:
        if not self.setup.config.rollout.sglang.colocated:
            return {"per tensor, one call": self.broadcast_in_one_call}
        return {"per tensor, one call": self.one_call, "per tensor, a call each": self.call_a_tensor}

    async def one_call(self) -> None:
        """Every tensor's own handle, in one call."""
        await self._plainly([list(hf.export(self.chunks))])

    async def call_a_tensor(self) -> None:
        await self._plainly([named] for named in hf.export(self.chunks))

    async def broadcast_in_one_call(self) -> None:
        await self.client.post("/flush_cache?timeout=30", None)
        of = self.setup.transport._of  # the group that ours made
        tensors = [(name, tensor.contiguous()) for name, tensor in hf.export(self.chunks)]
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": of.name,
            "load_format": None,
            "flush_cache": False,
        }
        path = "/update_weights_from_distributed"
        calling = asyncio.create_task(asyncio.to_thread(self.client.post_blocking, path, body))
        await asyncio.to_thread(broadcast_each, of.group, [tensor for _, tensor in tensors])
        await calling

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
            self.name,
            self.rows,
            ceilings=self.ceilings,
            packages=["torch", "aiohttp"] if self.setup.small else ["torch", "sglang", "aiohttp", "megatron-core"],
            device=self.setup.device,
            folder=self.out,
        )


def broadcast_each(group: Group, tensors: list[torch.Tensor]) -> None:
    if not isinstance(group, NCCLGroup):
        for tensor in tensors:
            group.broadcast(tensor.view(-1).view(torch.uint8))
        return
    with torch.cuda.device(tensors[0].device):
        works = [dist.broadcast(tensor, group=group._group, group_src=0, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        torch.cuda.current_stream().synchronize()


def plain_serializer() -> Callable[[Any], str]:
    from sglang.srt.utils import MultiprocessingSerializer

    return lambda named: MultiprocessingSerializer.serialize(named, output_str=True)


def plain_fake_serialize(named: list[tuple[str, torch.Tensor]]) -> str:
    file = io.BytesIO()
    torch.save({"named_tensors": [(name, tensor.clone()) for name, tensor in named]}, file)
    return base64.b64encode(file.getvalue()).decode()


async def compare(bench: Bench) -> None:
    """Ours and the peers in turn; a peer counts only if it leaves the weights ours left. The slow one has three turns."""
    reference = await bench.checksums()
    peers = bench.peers
    for name, side in list(peers.items()):
        await bench.client.post("/weights_checker", {"action": "reset_tensors"})
        await attempt(name, side(), bench.failures)
        if name not in bench.failures and await bench.checksums() != reference:
            bench.failures[name] = "leaves other weights than ours"
            print(f"MISSING {name}: {bench.failures[name]}", flush=True)
        if name in bench.failures:
            del peers[name]
    sides: dict[str, Side] = {"ours": bench.ours, **peers}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    until = bench.clock.left - min(12.0, bench.clock.left / 3)
    while len(taken["ours"]) < 3 or (len(taken["ours"]) < 15 and bench.clock.left > until):
        for name, side in list(sides.items()):
            found = await attempt(name, seconds(side, bench.setup.device), bench.failures)
            if found is not None:
                taken[name].append(found)
            if found is None or (found > 1.0 and len(taken[name]) == 3):
                del sides[name]
    await bench.ours()
    assert await bench.checksums() == reference, "ours left other weights than at first"
    gigabytes = weight_bytes(bench.chunks) / 1e9
    for name in bench.peers:
        bench.add(publish_row(bench, f"publish, {gigabytes:.1f} GB in buckets of {bench.bucket_bytes >> 20} MiB", taken, name))


def publish_row(bench: Bench, case: str, taken: dict[str, list[float]], peer: str | None) -> Row:
    theirs = taken.get(peer) if peer else None
    name = peer if theirs or peer is None else f"{peer}: failed, {bench.failures.get(peer, 'not tried')}"
    return seconds_row(case, taken["ours"], theirs, peer=name, limit=target_seconds(weight_bytes(bench.chunks)))


async def bucket_sizes(bench: Bench) -> None:
    default = bench.engine._config
    for size in BUCKETS if not bench.setup.small else (1 << 12,):
        if bench.clock.has_time_for(f"buckets of {size >> 20} MiB", 4):
            bench.engine._config = default.model_copy(update={"bucket_bytes": size})
            await bench.ours()  # its buffers are not there yet
            samples = [await seconds(bench.ours, bench.setup.device) for _ in range(4)]
            bench.add(publish_row(bench, f"publish, in buckets of {size >> 20} MiB", {"ours": samples}, None))
    bench.engine._config = default


async def peak_of(bench: Bench, side: Side) -> tuple[int, int]:
    """Bytes beside the weights: the most that this process allocated, and by how much the GPU's free memory fell, as sampled."""
    gpu = GPUMemory(bench.setup.device)
    gpu.reset_peak()
    before, free, lowest, watching = gpu.allocated, gpu.free, gpu.free, True

    def watch() -> None:  # what the server needs shows in the GPU's free memory only
        nonlocal lowest
        while watching:
            lowest = min(lowest, gpu.free)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        await side()
    finally:
        watching = False
        watcher.join()
    return gpu.peak - before, free - lowest


async def memory(bench: Bench) -> None:
    """Against two buckets, and against the peer that has every tensor there at once."""
    peak, fallen = await peak_of(bench, bench.ours)
    name, side = next(iter(bench.peers.items()))
    found = await attempt(f"memory, {name}", peak_of(bench, side), bench.failures)
    limit = 2 * bench.bucket_bytes
    for what, ours, theirs in (
        ("peak memory of the trainer beside the weights", peak, found and found[0]),
        ("fall of its GPU's free memory, both processes", fallen, found and found[1]),
    ):
        peer = round(theirs / 1e9, 3) if theirs else None
        ratios = round(theirs / ours, 3) if theirs and ours else None, round(limit / ours, 3) if ours else None
        bench.add(Row(what, "GB", round(ours / 1e9, 3), peer, peer and name, round(limit / 1e9, 3), *ratios, {}))


async def breakdown(bench: Bench) -> None:
    publish = Publish(bench.setup, bench.engine, bench.client, bench.buckets, bench.bucket_bytes, bench.version)
    bench.add(*await profile(publish, 1 if bench.setup.small else 3))


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
            for what, needed, case in (("memory", 2, memory), ("step by step", 3, breakdown), ("buckets", 4, bucket_sizes)):
                if clock.has_time_for(what, needed):
                    await attempt(what, case(bench), bench.failures)
            return bench.failures


def main() -> int:
    """1 where something that was tried has no number."""
    parser = command_line(__doc__, seconds=120, then="no case is started")
    parser.add_argument("--layers", type=int, default=36)
    ways = ("ipc", "distributed", "checkpoint-engine")
    parser.add_argument(
        "--transport", choices=ways, default="ipc", help="same GPU, the next one, or both ways of two GPUs beside it"
    )
    arguments = parser.parse_args()
    shares = arguments.transport == "ipc"
    if torch.cuda.device_count() < 2 - shares and not arguments.small:
        parser.error(f"{2 - shares} GPUs needed; --small tries the code on a CPU")
    clock = Clock.of(arguments.seconds)
    if arguments.transport == "checkpoint-engine":
        name, failures = NAME, side_by_side(arguments, clock)
    else:
        name, failures = "weight_publish" if shares else "weight_broadcast", of_one_rank(arguments, clock)
    for what, reason in failures.items():
        print(f"MISSING {what}: {reason}")
    print(f"{clock.seconds - clock.left:.0f} s; {arguments.out}/{name}.json")
    return 1 if failures else 0


def of_one_rank(arguments: argparse.Namespace, clock: Clock) -> dict[str, str]:
    shares = arguments.transport == "ipc"
    overrides = ["rollout.sglang.mem_fraction=0.35", f"rollout.sglang.colocated={str(shares).lower()}"]
    overrides += ["weights.bucket_bytes=65536", "rollout.sglang.bucket_bytes=262144"] if arguments.small else []
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(
            Path(folder), small=arguments.small, layers=arguments.layers, overrides=overrides, disable_cuda_graph=True
        )
        ceilings = machine_ceilings(setup.device, 1 << (20 if setup.small else 30), 64 if setup.small else 8192, budget_s=3)
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        return asyncio.run(measure(setup, clock, arguments.out, ceilings))


if __name__ == "__main__":
    raise SystemExit(main())
