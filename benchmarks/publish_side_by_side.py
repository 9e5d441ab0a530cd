"""One trainer of two ranks on two GPUs, and three ways of its weights to SGLang, in one run.

    CUDA IPC             TP=2 -> a server of TP=2 on the same two GPUs                                      `IPC`
    checkpoint-engine    the same trainer and server: gathered, to pinned host memory, broadcast            `CheckpointEngine`
    broadcast            the same trainer -> a server on the second GPU alone, started when that is over    `Broadcast`

A number is `load_weights` on rank 0 from call to return, as in `weight_publish.py`, which starts this with
`--transport checkpoint-engine`. The first two take turns; checkpoint-engine's pinned memory is there after a first publish that
does not count, and it must leave the server with the checksums that ours left, over noise. Its own published numbers leave out
the way to host memory, so its `update` alone is a row too. Rank 0 shows and writes rows as they come; what fails is MISSING.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, machine_ceilings, note_missing, seconds_row, show
from launched import Job, torchrun
from result_file import Row, write_result
from served_model import SILENCE_S, Setup, attempt, fill_at_random, open_server, prepare, seconds, target_seconds, weight_bytes

from megatron_rl.errors import MegatronRLError
from megatron_rl.rollout.engines import sglang_checkpoint_engine
from megatron_rl.rollout.engines.sglang import SGLangEngine, load_weights
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.rollout.engines.sglang_transport import IPC, Transport
from megatron_rl.training import parallel
from megatron_rl.training.model import PolicyModel, build_model
from megatron_rl.weights import hf

NAME = "weight_side_by_side"
SHARED, ALONE, BESIDE = (
    "publish, TP=2 to TP=2 on the same two GPUs",
    "publish, TP=2 to TP=2, against its update alone",
    "publish by broadcast, TP=2 to a server on the second GPU",
)
PACKAGE = f"checkpoint-engine {sglang_checkpoint_engine.VERSION}"
LEAST, ROUNDS = 3, 7  # publishes by IPC alone, then turns of it and checkpoint-engine
SERVER = {"disable_cuda_graph": True, "disable_custom_all_reduce": True}  # NCCL_NVLS_ENABLE=0 is obeyed by NCCL only
START_S = 45.0  # of a second server, whose kernels are compiled


class Timed:
    """A rank's parameter server, and the seconds of each call by name."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.seconds: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            start = time.perf_counter()
            getattr(self._server, name)(*arguments, **options)
            self.seconds.setdefault(name, []).append(time.perf_counter() - start)

        return call


@dataclass
class Trainer:
    """One rank of it. Rank 0 says what is published by which way; the others follow until it says None."""

    rank: int
    setup: Setup
    gather_all: Callable[[Any], list[Any]]
    chunks: list[PolicyModel]
    transports: dict[str, Transport]
    engine: SGLangEngine | None = None
    version: int = 0

    async def publish(self, way: str) -> float:
        """Its seconds."""
        self.gather_all(way)
        return await seconds(lambda: self._publish(way), self.setup.device)

    async def follow(self) -> None:
        while (way := self.gather_all(None)[0]) is not None:
            await self._publish(way)

    async def _publish(self, way: str) -> None:
        self.version += 1
        size = self.setup.config.rollout.sglang.bucket_bytes
        buckets = hf.export_buckets(self.chunks, min(self.setup.config.weights.bucket_bytes, size // 4))
        engines = [self.engine] if self.engine else []
        failed = await load_weights(engines, buckets, self.version, self.transports[way], bucket_bytes=size)
        for error in failed.values():
            raise error


@dataclass
class Told:
    """What rank 0 has found so far."""

    folder: Path
    out: Path
    device: torch.device
    small: bool
    ceilings: dict[str, float]
    num_bytes: int = 0
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, ours: list[float], theirs: list[float], peer: str) -> None:
        reason = self.failures.get("checkpoint-engine", "not tried")
        name = peer if theirs else f"{peer}: failed, {reason}"
        case = f"{case}, {self.num_bytes / 1e9:.1f} GB"
        row = seconds_row(case, ours, theirs or None, peer=name, limit=target_seconds(self.num_bytes))
        show([row])
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        (self.folder / "failed.json").write_text(json.dumps(self.failures), encoding="utf-8")
        packages = ["torch", "aiohttp"] if self.small else ["torch", "sglang", "megatron-core"]
        packages += ["checkpoint-engine"] if find_spec("checkpoint_engine") else []
        where = {"ceilings": self.ceilings, "device": self.device, "folder": self.out}
        if self.rows:
            write_result(NAME, self.rows, packages=packages, curves=self.curves, **where)


# --- in each rank ----------------------------------------------------------------------------------------------------------


def setup_of(folder: Path, plan: dict[str, Any], rank: int, *overrides: str) -> Setup:
    overrides = (*overrides, "training.tensor_parallel=2", "rollout.sglang.mem_fraction=0.35")
    if plan["small"]:
        overrides += ("weights.bucket_bytes=65536", "rollout.sglang.bucket_bytes=262144")
    found = prepare(folder / f"rank{rank}", small=plan["small"], layers=plan["layers"], overrides=overrides, **SERVER)
    return found if plan["small"] else replace(found, device=torch.device("cuda", rank))


def transports(setup: Setup, launch: parallel.Launch, gather_all: Callable[[Any], list[Any]], failures: dict[str, str]) -> Any:
    """By name; collective. Without checkpoint-engine where it is not installed."""
    made: dict[str, Transport] = {"IPC": IPC(setup.serializer, gather_all, rank=launch.rank)}
    connect = sglang_checkpoint_engine.connect
    if setup.small:
        from tests.rollout.engines.fake_parameter_server import connect
    try:
        transport = connect(launch.rank, launch.world_size, launch.master_host, gather_all, SILENCE_S / 2)
        transport._server = Timed(transport._server)
        made["checkpoint-engine"] = transport
    except MegatronRLError as e:
        note_missing("checkpoint-engine", e, failures)
    return made


async def run_rank(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    clock = Clock(plan["seconds"], time.perf_counter() - (time.time() - plan["started"]))
    rank = parallel.Launch.from_environment().rank
    limit = f"rollout.sglang.ready_timeout_s={max(clock.left - 30, 10)}"
    setup = setup_of(folder, plan, rank, limit, "rollout.sglang.tensor_parallel=2")
    second = setup_of(folder / "second", plan, rank, "rollout.sglang.colocated=false")
    launch = parallel.initialize(setup.config)
    gather_all = parallel.Messages(plan["seconds"]).gather_all
    failures: dict[str, str] = {}
    made = transports(setup, launch, gather_all, failures)
    if rank != 0:
        gather_all("the server is up")
        trainer = Trainer(rank, setup, gather_all, built(setup), made)
        await trainer.follow()
        trainer.transports["broadcast"] = second.transport
        await trainer.follow()
    else:
        size = (1 << 20, 64) if setup.small else (1 << 30, 8192)
        told = Told(folder, Path(plan["out"]), setup.device, setup.small, machine_ceilings(setup.device, *size, budget_s=2))
        told.failures = failures
        await lead(setup, gather_all, made, told, clock, second)
    parallel.shutdown()


def built(setup: Setup) -> list[PolicyModel]:
    chunks = build_model(setup.config, setup.model)
    fill_at_random(chunks, seed=1)
    return chunks


async def lead(setup: Setup, gather_all: Any, made: Any, told: Told, clock: Clock, second: Setup) -> None:
    clock.tell("starting the server of two GPUs")
    async with open_server(setup) as (engine, client):
        gather_all("the server is up")
        clock.tell("building Megatron's model, TP=2")
        trainer = Trainer(0, setup, gather_all, built(setup), made, engine)
        told.num_bytes = 2 * weight_bytes(trainer.chunks)
        shared = await on_shared_gpus(trainer, client, told, clock)
        gather_all(None)  # the others go on to the second server
    if setup.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    trainer.transports["broadcast"] = second.transport
    if clock.has_time_for("a server on the second GPU", START_S):
        found = await attempt("broadcast", by_broadcast(trainer, second), told.failures)
        if found:
            told.add(BESIDE, found, shared["checkpoint-engine"], f"{PACKAGE}, TP=2 to TP=2")
    else:
        told.failures["broadcast"] = "no time was left"
    told.write()
    gather_all(None)


async def on_shared_gpus(trainer: Trainer, client: SGLangClient, told: Told, clock: Clock) -> dict[str, list[float]]:
    """Seconds by way, in turns."""

    async def checksums() -> Any:
        answer = await client.post("/weights_checker", {"action": "checksum"})
        return [rank["checksums"] for rank in answer["ranks"]]

    taken: dict[str, list[float]] = {"IPC": [], "checkpoint-engine": []}
    clock.tell("first publish, checked")
    await trainer.publish("IPC")
    reference = await checksums()
    taken["IPC"] += [await trainer.publish("IPC") for _ in range(LEAST)]
    if "checkpoint-engine" in trainer.transports:
        await client.post("/weights_checker", {"action": "reset_tensors"})
        first = await attempt("checkpoint-engine", trainer.publish("checkpoint-engine"), told.failures)
        if first is not None and await checksums() != reference:
            note_missing("checkpoint-engine", ValueError("leaves other weights than ours"), told.failures)
        if first is not None:
            clock.tell(f"checkpoint-engine's first publish, with its pinned memory: {first:.2f} s")
    until = clock.left - min(30.0, clock.left / 3)
    while "checkpoint-engine" not in told.failures and len(taken["IPC"]) < LEAST + ROUNDS and clock.left > until:
        found = await attempt("checkpoint-engine", trainer.publish("checkpoint-engine"), told.failures)
        if found is not None:  # or the ranks may not be in step any more
            taken["checkpoint-engine"].append(found)
            taken["IPC"].append(await trainer.publish("IPC"))
    steps = calls_of(trainer, len(taken["checkpoint-engine"]))
    told.curves = {f"{n}, s": [round(s, 5) for s in samples] for n, samples in (*taken.items(), *steps.items())}
    for name, samples in steps.items():
        clock.tell(f"{PACKAGE}, rank 0's {name}: {statistics.median(samples):.3f} s of its publish, median")
    told.add(SHARED, taken["IPC"], taken["checkpoint-engine"], f"{PACKAGE}, from Megatron's weights")
    told.add(ALONE, taken["IPC"], steps.get("update", []), f"{PACKAGE}, update from pinned host memory alone")
    return taken


def calls_of(trainer: Trainer, count: int) -> dict[str, list[float]]:
    """Seconds of the parameter server's calls in the newest publishes."""
    transport = trainer.transports.get("checkpoint-engine")
    return {} if transport is None or not count else {n: s[-count:] for n, s in transport._server.seconds.items()}


async def by_broadcast(trainer: Trainer, second: Setup) -> list[float]:
    async with open_server(second) as (engine, _):
        trainer.engine = engine
        await trainer.publish("broadcast")
        found = [await trainer.publish("broadcast") for _ in range(LEAST + ROUNDS)]
        await second.transport.close()
        return found


# --- the command -----------------------------------------------------------------------------------------------------------


def side_by_side(arguments: argparse.Namespace, clock: Clock) -> dict[str, str]:
    """Two ranks, which print what they find; why what is missing is missing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = {"small": arguments.small, "layers": arguments.layers, "out": str(arguments.out.absolute())}
        plan = {**told, "seconds": clock.left, "started": time.time()}
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        code = Job(torchrun(2, __file__, folder), None).wait(clock.left)
        found = folder / "failed.json"
        failures: dict[str, str] = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    if code != 0:
        failures["what has no row above"] = "ended at the deadline" if code is None else f"the ranks ended with exit code {code}"
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One rank; weight_publish.py --transport checkpoint-engine starts both.")
    parser.add_argument("folder", type=Path)
    asyncio.run(run_rank(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
