"""Trained tokens per GPU-second and MFU of the training step on one GPU and on two.

Eight layers of Qwen3-8B's shape with random weights; one optimizer step on the same groups of 8 responses for every layout (32k
packed tokens, then 64k), micro-batches of at most 8k, from a distributed batch to the weights' update: gradients are reduced,
Adam's moments made and thrown away as in a run. No activations are recomputed. MFU counts the model's own products, three times
the forward pass: matrices of every packed row, attention over the positions that a row sees, the output layer of loss-bearing
tokens; against the vendor's peak. A row's limit is one GPU's rate, or for MFU the matrix product of this machine in this run.
Unattended:

    python benchmarks/scaling.py [--out DIR] [--seconds 75]          # one or two GPUs of 80 GB, no model folder needed
    python benchmarks/scaling.py --small --out DIR                   # a tiny model, on a CPU; no numbers worth reading
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_timing import Clock, command_line, machine_ceilings, percentiles, show, synchronize
from launched import ended_ranks
from result_file import Row, device_name, write_result
from served_model import QWEN3_8B, fill_at_random

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import cpu, parallel
from megatron_rl.training.trainer import Trainer
from megatron_rl.types import TrainingSequence
from tests.training.material import make_config

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one GPU": {}},
    2: {
        "DP=2": {"distributed_optimizer": True},
        "TP=2": {"tensor_parallel": 2},
        "TP=2, sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    },
}
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}  # dense bfloat16, SXM, by NVIDIA's datasheets
REPEATS = 7  # of a case, fewer where they take longer than
CASE_S = 5.0
GROUP_SIZE = 8


# --- in each rank ----------------------------------------------------------------------------------------------------------


def run_rank(folder: Path) -> None:
    """Every layout of this number of ranks. Two ranks begin when one is done: it has GPU 0 to itself."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    launch = parallel.Launch.from_environment()
    while launch.world_size > 1 and not (folder / "ranks1.done").exists():
        time.sleep(0.05)
    clock = Clock(plan["until"] - time.time(), time.perf_counter())
    parallel.initialize(config_of(folder, plan, {}))
    found: dict[str, Any] = {}
    if launch.world_size == 1:
        device = cpu.device()
        size = (1 << 28, 8192) if device.type == "cuda" else (1 << 20, 64)
        found["ceilings"] = machine_ceilings(device, *size, budget_s=2)
    for name, training in LAYOUTS[launch.world_size].items():
        config = config_of(folder, plan, training)
        parallel.place_ranks(config)
        found[name] = measure(config, plan["tokens"], clock)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if launch.rank == 0:
            path = folder / f"ranks{launch.world_size}.json"
            path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
            path.with_suffix(".part").rename(path)
    parallel.shutdown()


def config_of(folder: Path, plan: dict[str, Any], training: dict[str, Any]) -> Config:
    settings = {"max_tokens_per_micro_batch": plan["micro_batch"], "optimizer": {"lr": 1e-6}}
    return make_config(folder / "model", dtype="bfloat16", training=settings | training)


def measure(config: Config, amounts: list[int], clock: Clock) -> list[dict[str, Any]]:
    """Seconds of each step, for each amount of packed tokens as far as there is time; collective."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = ModelConfig.from_folder(config.model.folder)
    trainer = Trainer(config, model)
    fill_at_random(trainer.chunks, seed=1)
    trainer.optimizer.reload()
    found = []
    for amount in amounts:
        sequences = sequences_of(amount, model.vocab_size)
        batch = trainer.distribute([sequences] if trainer.is_master else None)
        seconds = [step_seconds(trainer, batch)]  # the first makes kernels ready and does not count
        enough = trainer.messages.share(clock.left > 4 * seconds[0])
        while enough and len(seconds) <= REPEATS:
            seconds.append(step_seconds(trainer, batch))
            enough = trainer.messages.share(clock.left > 2 * seconds[-1] and (len(seconds) < 4 or sum(seconds[1:]) < CASE_S))
        flops = model_flops(sequences, model)
        found.append({"amount": amount, "seconds": seconds[1:], "flops": flops, "trained": batch.num_trained_tokens})
        found[-1] |= {"packed": batch.num_packed_tokens, "micro_batches": batch.num_micro_batches, "memory": peak_memory()}
        if trainer.is_master:
            times = [round(s, 3) for s in seconds]
            print(f"{amount} tokens: {times} s, {batch.num_micro_batches} micro-batches, {found[-1]['memory']} bytes", flush=True)
    return [each for each in found if each["seconds"]]


def step_seconds(trainer: Trainer, batch: Any) -> float:
    """Of the slowest rank."""
    synchronize(cpu.device())
    dist.barrier()
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


def model_flops(sequences: list[TrainingSequence], model: ModelConfig) -> float:
    """Of one step, forward and backward; a group's prompt once."""
    prompts = {s.group_id: len(s.prompt_ids) for s in sequences}
    own = [(len(s.prompt_ids), len(s.response_ids)) for s in sequences]
    rows = sum(prompts.values()) + sum(n - 1 for _, n in own)
    pairs = sum(p * p / 2 for p in prompts.values()) + sum(n * (p + n / 2) for p, n in own)  # (row, position it sees)
    heads = model.num_heads * model.head_dim
    layer = model.hidden_size * (2 * heads + 2 * model.num_kv_heads * model.head_dim + 3 * model.ffn_size)
    loss_tokens = sum(n for _, n in own)
    forward = 2 * model.num_layers * (layer * rows + 2 * heads * pairs) + 2 * loss_tokens * model.vocab_size * model.hidden_size
    return 3.0 * forward


# --- what is told ----------------------------------------------------------------------------------------------------------


def rows_of(found: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Rows, and the layouts that are missing."""
    peak = next((peak for word, peak in PEAK_TFLOPS.items() if word in found["device"]), None)
    gemm = found["ceilings"].get("bf16_gemm_tflops")
    rows, missing, alone = [], [], {}
    for ranks, layouts in LAYOUTS.items():
        for name in layouts:
            measured = found.get(name) or []
            missing += [] if measured else [name]
            for each in measured:
                case = f"{name}, {each['packed'] // 1024}k packed tokens"
                rates = [each["trained"] / s / ranks for s in each["seconds"]]
                if ranks == 1:
                    alone[each["amount"]] = statistics.median(rates)
                rows.append(_rate(f"{case}: trained tokens per GPU-second", "tokens/s", rates, alone.get(each["amount"]), 1))
                speeds = [each["flops"] / s / ranks / 1e12 for s in each["seconds"]]
                if peak:
                    shares = [speed / peak for speed in speeds]
                    rows.append(_rate(f"{case}: MFU", f"share of {peak:g} TFLOP/s", shares, gemm and gemm / peak, 4))
                else:
                    rows.append(_rate(f"{case}: model FLOPs", "TFLOP/s", speeds, gemm, 4))
                memory = round(each["memory"] / 1e9, 2)
                rows.append(Row(f"{case}: peak memory, rank 0", "GB", memory, None, None, None, None, None, {}))
    return rows, missing


def _rate(case: str, unit: str, samples: list[float], limit: float | None, digits: int) -> Row:
    middle = statistics.median(samples)
    low, high = percentiles(samples)
    ratio = round(middle / limit, 3) if limit else None
    spread = {"ours": (round(low, digits), round(high, digits))}
    return Row(case, unit, round(middle, digits), None, None, round(limit, digits) if limit else None, None, ratio, spread)


def main() -> int:
    parser = command_line(__doc__, seconds=75, then="the ranks are ended", small="a tiny model, on a CPU if there is no GPU")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of)
        return 0
    if not torch.cuda.is_available() and not options.small:
        parser.error("no GPU here; --small tries the code on a CPU")
    clock = Clock.of(options.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        tiny = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
        tiny |= {"intermediate_size": 128, "num_hidden_layers": 2}
        shape = QWEN3_8B | (tiny if options.small else {"num_hidden_layers": options.layers})
        (folder / "model" / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        plan = {"tokens": [512, 1024] if options.small else [1 << 15, 1 << 16], "micro_batch": 256 if options.small else 1 << 13}
        plan["until"] = time.time() + clock.left - 4
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        return collect(folder, clock, options)


def collect(folder: Path, clock: Clock, options: argparse.Namespace) -> int:
    """1 where a layout is missing."""
    counts = [n for n in LAYOUTS if options.small or n <= torch.cuda.device_count()]
    found: dict[str, Any] = {"ceilings": {}}
    for ranks in ended_ranks(__file__, folder, counts, clock, telling="tokens: ["):
        (folder / f"ranks{ranks}.done").touch()
        path = folder / f"ranks{ranks}.json"
        found |= json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    device = torch.device("cuda") if torch.cuda.is_available() else None
    rows, missing = rows_of(found | {"device": device_name(device)})
    rows = [replace(row, case=f"{options.layers} layers, {row.case}") for row in rows]
    show(rows)
    print(f"MISSING {', '.join(missing) or 'nothing'}")
    if rows:
        packages = ["torch", "megatron-core"]
        write_result("scaling", rows, ceilings=found["ceilings"], packages=packages, device=device, folder=options.out)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
