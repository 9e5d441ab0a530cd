"""One rank of `scaling.py`, which starts them: `scaling_rank.py FOLDER RANK`. The first writes the results.

    ranks   1:  0           2:  0 1          4:  0 1 2 3         as many as there are GPUs; the others wait for the next size

A size leaves its process groups behind before the next begins, and a layout all of its memory.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_timing import Clock, machine_ceilings, percentiles, show, synchronize
from model_flops import peak_tflops, step_flops
from result_file import Row, device_name, write_result
from served_model import QWEN3_8B, fill_at_random

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import cpu, parallel
from megatron_rl.training.trainer import Trainer
from megatron_rl.types import TrainingSequence

TP2: dict[str, Any] = {"tensor_parallel": 2}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one GPU": {}},
    2: {
        "TP=2": TP2,
        "DP=2": {"distributed_optimizer": True},
        "PP=2": {"pipeline_parallel": 2},
        "CP=2": {"context_parallel": 2},
        "TP=2, sequence parallel": TP2 | {"sequence_parallel": True},
    },
    4: {
        "DP=4": {"distributed_optimizer": True},
        "TP=2 x DP=2": TP2 | {"distributed_optimizer": True},
        "TP=2 x PP=2": TP2 | {"pipeline_parallel": 2},
        "TP=4": {"tensor_parallel": 4},
    },
    8: {
        "DP=8": {"distributed_optimizer": True},
        "TP=2 x DP=4": TP2 | {"distributed_optimizer": True},
        "TP=2 x PP=2 x DP=2": TP2 | {"pipeline_parallel": 2, "distributed_optimizer": True},
    },
}
REPEATS = 5  # of a case, fewer where they take longer than
CASE_S = 3.0
LEAST_S = 12.0  # for another layout
GROUP_SIZE = 8
MEET_S = 600.0


@dataclass
class Board:
    """What was measured so far. The first rank writes it down after every case."""

    plan: dict[str, Any]
    device: torch.device
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    alone: dict[int, float] = field(default_factory=dict)  # by amount: one GPU's trained tokens a second

    def add(self, name: str, ranks: int, found: dict[str, Any]) -> None:
        case = f"{self.plan['layers']} layers, {name}, {found['packed'] // 1024}k packed tokens"
        rates = [found["trained"] / s / ranks for s in found["seconds"]]
        if ranks == 1:
            self.alone[found["amount"]] = statistics.median(rates)
        rows = [_rate(f"{case}: trained tokens per GPU-second", "tokens/s", rates, self.alone.get(found["amount"]), 1)]
        speeds = [found["flops"] / s / ranks / 1e12 for s in found["seconds"]]
        gemm, peak = self.ceilings.get("bf16_gemm_tflops"), peak_tflops(device_name(self.device))
        if peak:
            shares = [speed / peak for speed in speeds]
            rows.append(_rate(f"{case}: MFU", f"share of {peak:g} TFLOP/s", shares, gemm and gemm / peak, 4))
        else:
            rows.append(_rate(f"{case}: model FLOPs", "TFLOP/s", speeds, gemm, 4))
        memory = round(found["memory"] / 1e9, 2)
        rows.append(Row(f"{case}: peak memory, rank 0", "GB", memory, None, None, None, None, None, {}))
        show(rows)
        self.rows += rows
        write_result(
            "scaling",
            self.rows,
            ceilings=self.ceilings,
            packages=["torch", "megatron-core"],
            device=self.device if self.device.type == "cuda" else None,
            folder=Path(self.plan["out"]),
        )


def run_rank(folder: Path, rank: int) -> int:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    sys.argv = plan["command"]  # what the result file names
    if rank == 0:
        write_model(folder / "model", plan)
    clock = Clock(float(awaited(folder / "begin", rank)) - time.time(), time.perf_counter())
    board: Board | None = None
    stores = []
    for size in [size for size in plan["sizes"] if rank < size]:
        stores.append(meet(folder, rank, size))
        parallel.initialize(config_of(folder, plan, {}))
        device = cpu.device()
        if board is None and rank == 0:
            board = Board(plan, device)
            gemm = (1 << 28, 8192) if device.type == "cuda" else (1 << 20, 64)
            board.ceilings = machine_ceilings(device, *gemm, budget_s=2)
        for name, training in LAYOUTS[size].items():
            measure_layout(name, size, config_of(folder, plan, training), plan["tokens"], clock, board)
        parallel.shutdown()
    if board:
        print(f"MISSING {', '.join(board.missing) or 'nothing'}", flush=True)
    return 1 if board and board.missing else 0


def awaited(path: Path, rank: int) -> str:
    """What the file holds once it is there; ends this process where nobody is left to write it."""
    parent, until = os.getppid(), time.monotonic() + MEET_S
    while not path.exists():
        if os.getppid() != parent or time.monotonic() > until:
            sys.exit(f"rank {rank}: {path.name} was never written")
        time.sleep(0.05)
    return path.read_text()


def meet(folder: Path, rank: int, size: int) -> Any:
    """Tells `parallel.initialize` where ranks of this size find each other: a store of the first, at a port that is free. To be
    kept as long as they need each other."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    store, path = None, folder / f"port{size}"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        path.with_suffix(".part").write_text(str(store.port))
        path.with_suffix(".part").rename(path)
    os.environ["MASTER_PORT"] = awaited(path, rank)
    return store


def write_model(folder: Path, plan: dict[str, Any]) -> None:
    shape = QWEN3_8B | {"num_hidden_layers": plan["layers"]} | plan["shape"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    model = ModelConfig.from_folder(folder)
    print(f"{model}\noptimizer steps on {plan['tokens']} packed tokens, micro-batches of {plan['micro_batch']}", flush=True)


def config_of(folder: Path, plan: dict[str, Any], training: dict[str, Any]) -> Config:
    """Of the trainer; the rest is not used."""
    amounts = {"groups_per_iteration": 1, "token_budget": 1, "max_response_tokens": 1}
    return Config.model_validate(
        {
            "run": {"folder": folder / "run", "iterations": 1, "threads": 1},
            "model": {"folder": folder / "model", "dtype": "bfloat16"},
            "data": {"source": "jsonl", "path": folder / "none"},
            "rollout": amounts,
            "training": {"max_tokens_per_micro_batch": plan["micro_batch"], "optimizer": {"lr": 1e-6}} | training,
        }
    )


def measure_layout(name: str, size: int, config: Config, amounts: list[int], clock: Clock, board: Board | None) -> None:
    """Collective. Left out, aloud, where too little time is left."""
    messages = parallel.Messages(config.training.collective_timeout_s)
    if not messages.share(clock.left > LEAST_S or torch.device("cpu") == cpu.device()):
        if board:
            board.missing.append(name)
        return
    parallel.place_ranks(config)
    measure(name, size, config, amounts, clock, board)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(name: str, size: int, config: Config, amounts: list[int], clock: Clock, board: Board | None) -> None:
    """Seconds of each step, for each amount of packed tokens as far as there is time; collective."""
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = ModelConfig.from_folder(config.model.folder)
    trainer = Trainer(config, model)
    fill_at_random(trainer.chunks, seed=1)
    trainer.optimizer.reload()
    if board:
        clock.tell(f"{name}: model built in {time.perf_counter() - start:.1f} s")
    for amount in amounts:
        sequences = sequences_of(amount, model.vocab_size)
        batch = trainer.distribute([sequences] if trainer.is_master else None)
        seconds = [step_seconds(trainer, batch)]  # the first makes kernels ready and does not count
        enough = trainer.messages.share(clock.left > 2 * seconds[0])
        while enough and len(seconds) <= REPEATS:
            seconds.append(step_seconds(trainer, batch))
            enough = trainer.messages.share(clock.left > 2 * seconds[-1] and (len(seconds) < 4 or sum(seconds[1:]) < CASE_S))
        if board and seconds[1:]:
            clock.tell(f"{name}, {amount} tokens: {[round(s, 3) for s in seconds]} s, {batch.num_micro_batches} micro-batches")
            found = {"amount": amount, "seconds": seconds[1:], "flops": step_flops(sequences, model), "memory": peak_memory()}
            board.add(name, size, found | {"trained": batch.num_trained_tokens, "packed": batch.num_packed_tokens})
        elif board:
            board.missing.append(f"{name}, {amount} tokens")


def step_seconds(trainer: Trainer, batch: Any) -> float:
    """Of the slowest rank."""
    synchronize(cpu.device())
    trainer.messages.gather_all(None)
    start = time.perf_counter()
    trainer.step(batch, MirrorDescent(0.1), None)
    synchronize(cpu.device())
    return max(trainer.messages.gather_all(time.perf_counter() - start))


def peak_memory() -> int:
    """Bytes of this rank's tensors at most, in this layout."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def sequences_of(amount: int, vocabulary: int) -> list[TrainingSequence]:
    """Groups of about 8k packed tokens: a prompt of an eighth of a response's mean length, lengths within a factor 2."""
    groups = max(1, amount // 8192)
    mean = amount // groups * 8 // (8 * GROUP_SIZE + 1)
    rng = np.random.default_rng(0)
    found = []
    for group in range(groups):
        prompt = rng.integers(0, vocabulary, max(1, mean // 8)).astype(np.int32)
        for member in range(GROUP_SIZE):
            n = int(mean * (0.65 + 0.7 * member / (GROUP_SIZE - 1)))
            found.append(
                TrainingSequence(
                    group_id=group,
                    trajectory_id=group * GROUP_SIZE + member,
                    prompt_ids=prompt,
                    response_ids=rng.integers(0, vocabulary, n).astype(np.int32),
                    loss_mask=np.ones(n, bool),
                    behaviour_log_probs=np.full(n, -10, np.float32),
                    weight_versions=np.zeros(n, np.int32),
                    advantage=float(rng.normal()),
                    weight=1 / (groups * GROUP_SIZE),
                )
            )
    return found


def _rate(case: str, unit: str, samples: list[float], limit: float | None, digits: int) -> Row:
    middle = statistics.median(samples)
    low, high = percentiles(samples)
    ratio = round(middle / limit, 3) if limit else None
    spread = {"ours": (round(low, digits), round(high, digits))}
    return Row(case, unit, round(middle, digits), None, None, round(limit, digits) if limit else None, None, ratio, spread)


if __name__ == "__main__":
    sys.exit(run_rank(Path(sys.argv[1]), int(sys.argv[2])))
