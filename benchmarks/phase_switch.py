"""Seconds and memory of the turns that an SGLang server and Megatron take on one GPU, as in a run (`serving_sglang.py`).

A random model with layers of Qwen3-8B's shape on both sides: the trainer holds parameters in bfloat16, main weights and gradients
in float32 (10 bytes a parameter), the server half the GPU. Nothing is trained in between. Train to rollout: gradients freed, main
weights to pinned memory, the server's weights resumed, published while the parameters are copied to pinned memory, KV cache
resumed. Rollout to train: server released, everything back. The targets are 2 s and 1 s at 36 layers, scaled by size for fewer;
of a copy the limit is one contiguous copy of as many bytes into pinned memory. At the end the trainer's state is checked to the
bit. The default of 28 layers (66 GB of state) fits a GPU of 80 GB; one of 141 GB takes --layers 36. Unattended:

    python benchmarks/phase_switch.py [--out DIR] [--layers 28] [--rounds 6]          # one GPU, 45 GB of the host's memory
    python benchmarks/phase_switch.py --small --out DIR                               # no numbers worth reading: on a CPU
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from gpu_timing import Clock, command_line, machine_ceilings, show
from result_file import Row, write_result
from served_model import Setup, fill_at_random, megatron_of_one, prepare, weight_bytes

from megatron_rl.serving_sglang import SGLangServing
from megatron_rl.training.model import PolicyModel, build_model
from megatron_rl.training.optimizer import PolicyOptimizer
from megatron_rl.training.parallel import Launch
from megatron_rl.training.phase_memory import PARTS, PhaseMemory
from megatron_rl.weights import hf

TARGETS = {"train to rollout": 2.0, "rollout to train": 1.0}  # at
TARGET_BYTES = 16.4e9  # of parameters


@dataclass
class Bench:
    setup: Setup
    chunks: list[PolicyModel]
    memory: PhaseMemory
    ceilings: dict[str, float]
    taken: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    levels: dict[str, int] = field(default_factory=dict)  # bytes, of the last round

    def round(self, serving: SGLangServing, version: int, *, counts: bool) -> None:
        """To the trainer, and back to the server."""
        start = time.perf_counter()
        serving.release()
        to_train = time.perf_counter() - start
        start = time.perf_counter()
        serving.load_weights(partial(hf.export_buckets, self.chunks, self.setup.config.weights.bucket_bytes), version)
        to_rollout = time.perf_counter() - start
        steps = dict(serving.phase_seconds)
        steps["publish"] = to_rollout - steps["offload"] - steps["resume"]
        print(f"  round {version}: " + ", ".join(f"{name} {s:.3f}" for name, s in steps.items()), flush=True)
        if counts:
            for name, seconds in (steps | {"train to rollout": to_rollout, "rollout to train": to_train}).items():
                self.taken[name].append(seconds)
        self.levels = serving.phase_memory

    def write(self, out: Path) -> None:
        packages = ["torch", "aiohttp"] if self.setup.small else ["torch", "sglang", "aiohttp", "megatron-core"]
        device = self.setup.device
        write_result("phase_switch", self.rows(), ceilings=self.ceilings, packages=packages, device=device, folder=out)

    def rows(self) -> list[Row]:
        scale = weight_bytes(self.chunks) / TARGET_BYTES
        rows = [self._row(name, name, target * scale) for name, target in TARGETS.items()]
        kept = self.memory.num_bytes("parameters") + self.memory.num_bytes("main_weights")
        for name, link, what in (
            ("onload", "host_to_device_gb_per_s", f"onload, {kept / 1e9:.1f} GB"),
            ("offload", "device_to_host_gb_per_s", f"offload, {kept / 1e9:.1f} GB, of it parameters while publishing"),
        ):
            rows.append(self._row(name, what, kept / 1e9 / self.ceilings[link]))
        rows += [self._row(name, name, None) for name in ("release", "resume", "publish")]
        for level, value in self.levels.items():
            words = level.removeprefix("memory/gpu_").removesuffix("_bytes").split("_")
            case = f"memory {words[0]}, {words[1]}"
            rows.append(Row(case, "GB", round(value / 1e9, 2), None, None, None, None, None, {}))
        return rows

    def _row(self, name: str, case: str, limit: float | None) -> Row:
        samples = self.taken[name]
        seconds = statistics.median(samples)
        ratio = None if limit is None else round(limit / max(seconds, 1e-9), 3)
        spread = {"ours": (round(min(samples), 4), round(max(samples), 4))}
        rounded = None if limit is None else round(limit, 4)
        return Row(case, "s", round(seconds, 4), None, None, rounded, None, ratio, spread)


def fingerprint(optimizer: PolicyOptimizer, chunks: list[PolicyModel]) -> list[int]:
    """Of every parameter's and main weight's bits."""
    tensors = [p.detach() for chunk in chunks for p in chunk.parameters()] + [w.detach() for w in optimizer.main_weights]
    words = {2: torch.int16, 4: torch.int32}
    return [int(t.view(words[t.element_size()]).sum(dtype=torch.int64)) for t in tensors]


def measure(setup: Setup, runner: asyncio.Runner, clock: Clock, out: Path, rounds: int) -> None:
    ceilings = machine_ceilings(setup.device, 1 << (20 if setup.small else 30), 64 if setup.small else 8192, budget_s=3)
    clock.tell("building the trainer's state")
    chunks = build_model(setup.config, setup.model)
    fill_at_random(chunks, seed=1)
    optimizer = PolicyOptimizer(setup.config, chunks)
    memory = PhaseMemory(chunks, optimizer)
    gb = {part: memory.num_bytes(part) / 1e9 for part in PARTS}
    clock.tell("state: " + ", ".join(f"{part} {size:.2f} GB" for part, size in gb.items()))
    before = fingerprint(optimizer, chunks)
    clock.tell("pinning, offload, and a server")
    place = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, master_host="127.0.0.1")
    serving = SGLangServing(
        setup.config,
        setup.model,
        place,
        runner,
        export=None,
        memory=memory,
        program=setup.program,
        serialize=setup.serializer,
    )
    bench = Bench(setup, chunks, memory, ceilings)
    try:
        clock.tell("first publish")
        serving.load_weights(partial(hf.export_buckets, chunks, setup.config.weights.bucket_bytes), 0)
        for version in range(1, rounds + 2):
            if version > 2 and not clock.has_time_for(f"round {version}", 6):
                break
            bench.round(serving, version, counts=version > 1)
            if version > 1:
                bench.write(out)
        with serving.readable_weights():
            assert fingerprint(optimizer, chunks) == before, "the trainer's state came back changed"
    finally:
        serving.close()
    show(bench.rows())


def main() -> None:
    parser = command_line(__doc__, seconds=165, then="no round is started")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=6, help="that count; the one before them does not")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        parser.error("no GPU here; --small tries the code on a CPU")
    clock = Clock.of(arguments.seconds)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        overrides = ["rollout.sglang.mem_fraction=0.5", "rollout.sglang.verify_weights=false"]
        setup = prepare(
            Path(folder), small=arguments.small, layers=arguments.layers, overrides=overrides, disable_cuda_graph=True
        )
        with megatron_of_one(setup.config):
            measure(setup, runner, clock, arguments.out, arguments.rounds)
    clock.tell(f"{arguments.out}/phase_switch.json")


if __name__ == "__main__":
    main()
