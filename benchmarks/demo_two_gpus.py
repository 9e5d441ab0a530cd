"""Does the demo learn on two GPUs as on one? examples/smollm2_gpu with trainer and SGLang on the same two GPUs, in turns.

    DP=2         trainer of two replicas with the distributed optimizer, two servers of one GPU each
    TP=2         trainer and one server of two GPUs each; SmolLM2 with a fourth, empty KV head: the same function, `even_heads.py`
    random Qwen3 the same with sequence parallelism and `kv_policy=keep`, six iterations of a random model: what it learns means
                 nothing, but its first publish is compared with the folder by checksum, its log-probs with the trainer's, and
                 the KV of unfinished trajectories has to come back on both ranks

A demo's peer is the one GPU of results/demo_gpu.json: correctness over the same batches, mean of its seeds; the limit is the
lowest seed less the seeds' distance. Log-probs of engine and trainer may differ by 0.02. Runs lie in runs/two_gpus. Unattended:

    python benchmarks/demo_two_gpus.py --model FOLDER [--out DIR] [--seconds 300] [--only DP=2 TP=2]
    python benchmarks/demo_two_gpus.py --small --out DIR                       # on a CPU, the tests' fake server; no numbers
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from even_heads import with_empty_heads
from gpu_timing import Clock, command_line, show
from launched import ROOT, Job, torchrun
from result_file import FOLDER, Row, write_result

from megatron_rl import config as configuration
from megatron_rl import loop, run
from megatron_rl.model_config import ModelConfig
from megatron_rl.serving_sglang import SGLangServing

RECIPE = ROOT / "examples" / "smollm2_gpu" / "config.yaml"
PHASES = ("rollout", "train", "publish", "release", "onload", "offload", "resume")
MISMATCH = 0.02  # nats
LIMIT_S = 150.0  # longest run
FREE_S = 20.0  # longest wait for the memory of a run that was ended
SERVER = {"grammar_backend": "none", "enable_fp32_lm_head": True}
# SGLang's own all-reduce may use memory that is multicast over NVLink; NCCL obeys NCCL_NVLS_ENABLE=0.
PAIR = {**SERVER, "disable_custom_all_reduce": True}
TENSOR = ["training.tensor_parallel=2", "rollout.sglang.tensor_parallel=2"]


@dataclass(frozen=True)
class Demo:
    model: Callable[[Path, Path], Path]  # (SmolLM2, a new folder) to the folder that is trained
    overrides: Sequence[str]
    server: dict[str, Any]
    iterations: int
    learns: bool = True


def even(source: Path, target: Path) -> Path:
    return with_empty_heads(source, target, ModelConfig.from_folder(source).num_kv_heads + 1)


def random_qwen3(source: Path, target: Path) -> Path:
    """A quarter of Qwen3-0.6B's layers, a byte tokenizer, and prompts beside it; logits that spread as a trained model's do."""
    from examples.quickstart.make_model import make_model

    shape = {"hidden": 1024, "layers": 7, "heads": 16, "kv_heads": 8, "head_dim": 128, "ffn": 3072, "max_positions": 2048}
    make_model(target, "qwen3", tied=False, initializer_range=0.05, vocab_size=512, **shape)
    lines = [json.dumps({"prompt": f"{a} + {b}", "answer": ""}) for a in range(40) for b in range(25)]
    (target / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


RANDOM = [
    *TENSOR,
    "training.sequence_parallel=true",
    "rollout.kv_policy=keep",
    "data.max_prompt_tokens=512",
    # right is a response without a letter from a to m: such a model is now right, now wrong
    'rewards.terms=[{name: regex, options: {pattern: "^[^a-m]*$()"}}]',
]
DEMOS = {
    "DP=2": Demo(lambda source, _: source, ["training.distributed_optimizer=true", "rollout.sglang.engines=2"], SERVER, 20),
    "TP=2": Demo(even, TENSOR, PAIR, 20),
    "random Qwen3": Demo(random_qwen3, RANDOM, PAIR, 6, learns=False),
}


# --- a run -----------------------------------------------------------------------------------------------------------------


def trained_rows(name: str, folder: Path, job: Job, clock: Clock) -> list[dict[str, Any]]:
    """Metrics of the iterations that trained a batch, of a run that may have been ended early."""
    code = job.wait(min(clock.left, LIMIT_S))
    clock.tell(f"{name}: {'ended at the deadline' if code is None else f'exit code {code}'}")
    if code != 0:
        for log in (job.log, *sorted((folder / "log").glob("sglang-*.log"))):
            print(f"--- end of {log}\n{log.read_text(errors='replace')[-5000:]}", flush=True)
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def started(name: str, folder: Path, source: Path, recipe: Path, small: bool) -> Job:
    """The run on two ranks, through the command line; `small`: with the fake server."""
    demo = DEMOS[name]
    model = source if small else demo.model(source, folder / "model")
    prompts = [f"data.path={path}"] if (path := (model if not demo.learns else folder.parent) / "prompts.jsonl").is_file() else []
    overrides = [f"run.folder={folder}", f"model.folder={model}", *prompts, *demo.overrides]
    if small:
        overrides = [o for o in overrides if "kv_policy" not in o and "regex" not in o]  # the fake's plugin has one rank
        return Job(torchrun(2, __file__, "--rank-of", recipe, "run.iterations=2", *overrides), folder / "ranks.log")
    overrides += [f"run.iterations={demo.iterations}", "run.checkpoint_every=1000"]
    overrides += [f"rollout.sglang.server_arguments={json.dumps(demo.server)}"]
    return Job(torchrun(2, "-m", "megatron_rl", "train", recipe, *overrides), folder / "ranks.log")


def run_rank_on_fake(recipe: Path, overrides: Sequence[str]) -> int:
    from tests.rollout.engines.fake_sglang import serialize

    program = (sys.executable, str(ROOT / "tests" / "rollout" / "engines" / "fake_sglang.py"))
    run.SGLangServing = partial(SGLangServing, program=program, serialize=lambda: serialize)  # type: ignore[misc,assignment]
    return loop.train(configuration.load(recipe, ["rollout.engine=sglang", *overrides]))


def wait_for_free_gpus() -> None:
    """Until nobody holds more than 2 GB of any: a server takes its share of what it finds."""
    if not torch.cuda.is_available():
        return
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    until = time.monotonic() + FREE_S
    while time.monotonic() < until:
        used = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30).stdout.split()
        if all(int(mib) < 2048 for mib in used):
            return
        time.sleep(0.5)


# --- what is told ----------------------------------------------------------------------------------------------------------


def rows_of(name: str, trained: list[dict[str, Any]], one: dict[str, Any]) -> list[Row]:
    rows = learning(name, trained, one) if DEMOS[name].learns else kept_kv(name, trained)
    for row in trained:  # an iteration may train tokens of older versions only
        row.setdefault("mismatch/logp_abs_mean", 0.0)
    found = [row["mismatch/logp_abs_mean"] for row in trained if row["mismatch/logp_abs_mean"] > 0]
    if found:
        rows.append(_row(f"{name}: |engine - trainer| log-prob, mean", "nats", mean(found), limit=MISMATCH, samples=found))
    for phase in PHASES:
        samples = [row[f"time/{phase}_s"] for row in trained]
        theirs = [row["ours"] for row in one["rows"] if row["case"].endswith(f": {phase}, median")]
        peer = median(theirs) if theirs and DEMOS[name].learns else None
        rows.append(_row(f"{name}: {phase}, median", "s", median(samples), peer=peer, samples=samples))
    rates = [row["tokens/trained"] / sum(row[f"time/{p}_s"] for p in PHASES) / 2 for row in trained]
    rows.append(_row(f"{name}: trained tokens per GPU-second of an iteration, median", "tokens/s", median(rates), samples=rates))
    return rows


def learning(name: str, trained: list[dict[str, Any]], one: dict[str, Any]) -> list[Row]:
    """Correctness in the first and the last third of the batches, against the same batches of each seed on one GPU."""
    curves = [curve for case, curve in one.get("curves", {}).items() if case.endswith("reward/correct")]
    third = max(1, len(trained) // 3)
    rows = []
    for first, last in ((0, third), (len(trained) - third, len(trained))):
        ours = [row["reward/correct"] for row in trained[first:last]]
        seeds = [mean(curve[first:last]) for curve in curves if len(curve) >= last]
        if not ours or not seeds:
            continue
        least = min(seeds) - (max(seeds) - min(seeds))
        rows.append(
            Row(
                f"{name}: correctness, batches {first + 1} to {last}",
                "share",
                round(mean(ours), 4),
                round(mean(seeds), 4),
                f"one GPU, {len(seeds)} seeds",
                round(least, 4),
                round(mean(ours) / mean(seeds), 3),
                round(mean(ours) / least, 3) if least > 0 else None,
                {"ours": (min(ours), max(ours)), "peer": (round(min(seeds), 4), round(max(seeds), 4))},
            )
        )
    return rows


def kept_kv(name: str, trained: list[dict[str, Any]]) -> list[Row]:
    totals = {key: sum(row.get(f"kv/{key}", 0) for row in trained) for key in ("restored_tokens", "restore_failures")}
    hits = [row["kv/hit_rate"] for row in trained if "kv/hit_rate" in row]
    rows = [_row(f"{name}: KV put back, {key.replace('_', ' ')}", "count", total) for key, total in totals.items()]
    return rows + ([_row(f"{name}: share of kept KV that was found", "share", mean(hits), samples=hits)] if hits else [])


def _row(
    case: str, unit: str, ours: float, *, peer: float | None = None, limit: float | None = None, samples: Sequence[float] = ()
) -> Row:
    """Less is better where there is a peer or a limit."""
    least = max(ours, 1e-9)
    return Row(
        case,
        unit,
        round(ours, 5),
        peer,
        None if peer is None else "one GPU, median of its seeds",
        limit,
        None if peer is None else round(peer / least, 3),
        None if limit is None else round(limit / least, 3),
        {"ours": (round(min(samples), 5), round(max(samples), 5))} if samples else {},
    )


def main() -> int:
    parser = command_line(__doc__, seconds=300, then="no run goes on")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="+", choices=DEMOS, default=list(DEMOS))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.rank_of:
        return run_rank_on_fake(options.rank_of, overrides)
    if not options.small and (options.model is None or torch.cuda.device_count() < 2):
        parser.error("needs --model and two GPUs; --small tries the code on a CPU")
    clock = Clock.of(options.seconds)
    folder = ROOT / "runs" / "two_gpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe, source = RECIPE, options.model
    if options.small:
        from tests.resume.recipe import write_recipe

        recipe, source = write_recipe(folder, iterations=2), folder / "model"
    else:
        subprocess.run([sys.executable, ROOT / "examples/smollm2_gpu/make_prompts.py", folder / "prompts.jsonl"], check=True)
    return measure(options, clock, folder, recipe, source)


def measure(options: argparse.Namespace, clock: Clock, folder: Path, recipe: Path, source: Path) -> int:
    """Run after run; the result file is written after each. 1 where one of them trained nothing."""
    one = json.loads((FOLDER / "demo_gpu.json").read_text(encoding="utf-8"))
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    missing = []
    for name in options.only:
        own = folder / name.replace(" ", "_")
        own.mkdir()
        trained: list[dict[str, Any]] = []
        if clock.has_time_for(name, 50):
            wait_for_free_gpus()
            trained = trained_rows(name, own, started(name, own, source, recipe, options.small), clock)
        if not trained:
            missing.append(name)
            print(f"MISSING {name}: no batch was trained", flush=True)
            continue
        found = rows_of(name, trained, one)
        show(found)
        rows += found
        keys = ("reward/correct", "mismatch/logp_abs_mean", "grad_norm")
        curves |= {f"{name}: {key}": [round(row.get(key, 0.0), 5) for row in trained] for key in keys}
        packages = ["torch", "megatron-core", "aiohttp"] + ([] if options.small else ["sglang"])
        device = torch.device("cuda") if torch.cuda.is_available() else None
        write_result("demo_two_gpus", rows, ceilings={}, packages=packages, curves=curves, device=device, folder=options.out)
    broken = [row.case for row in rows if row.ratio_to_limit is not None and row.ratio_to_limit < 1]
    clock.tell(f"verdict: {len(missing)} runs missing; bounds not kept: {broken or 'none'}")
    return 1 if missing or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
