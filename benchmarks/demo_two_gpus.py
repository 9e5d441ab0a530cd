"""Does the demo learn on two GPUs as on one? examples/smollm2_gpu for 20 iterations, laid over trainer and SGLang in many ways.

    one GPU      trainer and server on one GPU in turns; a seed on each GPU
    TP=2         trainer and one server of two GPUs each, in turns; SmolLM2 with a fourth, empty KV head: the same function,
                 `even_heads.py`
    PP=2         a trainer of two stages, otherwise the same
    half each    the trainer on one GPU, the server on the other: no turns, every version is broadcast (colocated=false)
    DP=2         trainer of two replicas with the distributed optimizer, two servers of one GPU each, in turns
    random Qwen3 TP=2 with sequence parallelism and `kv_policy=keep`, six iterations of a random model: what it learns means
                 nothing, but its first publish is compared with the folder by checksum, its log-probs with the trainer's, and
                 the KV of unfinished trajectories has to come back on both ranks

A demo's peer is one GPU: correctness over the same batches, mean of the seeds of this run and of results/demo_gpu.json; the limit
is the lowest seed less the seeds' distance. Log-probs of engine and trainer may differ by 0.02. Most of a run is waiting for its
start, so runs go in waves, each started when all of the last one have trained a batch, or are late; what they need of the GPUs
is small, but seconds are those of runs side by side. Without CUDA graphs, which take long to capture. The file is written every
few seconds. Runs lie in runs/two_gpus. Unattended:

    python benchmarks/demo_two_gpus.py --model FOLDER [--out DIR] [--seconds 340] [--only "TP=2" "half each"]
    python benchmarks/demo_two_gpus.py --small --out DIR [--only ...]          # on a CPU, the tests' fake server; no numbers
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from even_heads import with_empty_heads
from gpu_timing import show
from launched import ROOT, Job, ending, num_gpus, torchrun
from model_flops import matrix_flops, peak_tflops
from result_file import FOLDER, Row, device_name, write_result
from unattended import Clock, command_line

from megatron_rl.model_config import ModelConfig

RECIPE = ROOT / "examples" / "smollm2_gpu" / "config.yaml"
PHASES = ("rollout", "train", "publish", "release", "onload", "offload", "resume")
CURVES = ("reward/correct", "mismatch/logp_abs_mean", "grad_norm")
MISMATCH = 0.02  # nats
LIMIT_S = 240.0  # longest run
WAVE_S = 150.0  # longest wait for the first batches of a wave
WRITE_S = 10.0  # between two results
FIRST_PORT = 21000  # below those that the kernel gives to connections
SERVER = {"grammar_backend": "none", "enable_fp32_lm_head": True, "disable_cuda_graph": True, "max_total_tokens": 150000}
# A server refuses to start where what others take meanwhile leaves it less than the share that it may not use.
ROOM = ["rollout.sglang.mem_fraction=0.8", "training.max_tokens_per_micro_batch=4096"]
# SGLang's own all-reduce may use memory that is multicast over NVLink; NCCL obeys NCCL_NVLS_ENABLE=0.
PAIR = {**SERVER, "disable_custom_all_reduce": True}
# A server of two GPUs would refuse to start where other runs leave one of them a tenth less memory than the other.
BESIDE_OTHERS = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}


@dataclass(frozen=True)
class Demo:
    overrides: Sequence[str]
    model: Callable[[Path, Path], Path] = lambda source, _: source  # (SmolLM2, a new folder) to the folder that is trained
    ranks: int = 2  # of the trainer
    gpus: str = "0,1"
    server: dict[str, Any] = field(default_factory=lambda: SERVER)
    iterations: int = 20
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


TWO = "rollout.sglang.tensor_parallel=2"  # GPUs of the server
RANDOM = [
    TWO,
    "training.tensor_parallel=2",
    "training.sequence_parallel=true",
    "rollout.kv_policy=keep",
    "data.max_prompt_tokens=512",
    # right is a response without a letter from a to m: such a model is now right, now wrong
    'rewards.terms=[{name: regex, options: {pattern: "^[^a-m]*$()"}}]',
]
BASELINE = "one GPU, seed "
DEMOS = {
    f"{BASELINE}3": Demo(["run.seed=3"], ranks=1, gpus="0"),
    f"{BASELINE}4": Demo(["run.seed=4"], ranks=1, gpus="1"),
    "TP=2": Demo(["training.tensor_parallel=2", TWO], even, server=PAIR),
    "half each": Demo(["rollout.sglang.colocated=false"], ranks=1),
    "PP=2": Demo(["training.pipeline_parallel=2", TWO], even, server=PAIR),
    "DP=2": Demo(["training.distributed_optimizer=true", "rollout.sglang.engines=2"]),
    "random Qwen3": Demo(RANDOM, random_qwen3, server=PAIR, iterations=6, learns=False),
}
WAVES = ((f"{BASELINE}3", f"{BASELINE}4", "TP=2", "half each"), ("PP=2", "DP=2", "random Qwen3"))


# --- a run -----------------------------------------------------------------------------------------------------------------


class DemoRun:
    """One of DEMOS as a process, with a folder of its own."""

    def __init__(self, name: str, folder: Path, model: Path, recipe: Path, small: bool) -> None:
        self.name, self.demo, self.folder = name, DEMOS[name], folder / name.replace(" ", "_").replace(",", "")
        self.model = ModelConfig.from_folder(model)
        self.iterations = 2 if small else self.demo.iterations
        self._until = time.monotonic() + LIMIT_S
        self.folder.mkdir(exist_ok=True)
        prompts = [path for path in (model / "prompts.jsonl", folder / "prompts.jsonl") if path.is_file()]
        port = FIRST_PORT + 10 * list(DEMOS).index(name)
        overrides = [f"run.folder={self.folder}", f"run.iterations={self.iterations}", f"model.folder={model}"]
        overrides += [f"data.path={prompts[0]}", f"rollout.sglang.port={port}", *self.demo.overrides]
        if small:
            program = [__file__, "--rank-of", recipe]
        else:
            program = ["-m", "megatron_rl", "train", recipe]
            overrides += [*ROOM, "run.checkpoint_every=1000", f"rollout.sglang.server_arguments={json.dumps(self.demo.server)}"]
        python = [sys.executable] if self.demo.ranks == 1 else torchrun(self.demo.ranks)
        environment = BESIDE_OTHERS if small else BESIDE_OTHERS | {"CUDA_VISIBLE_DEVICES": self.demo.gpus}
        self.job = Job([*python, *map(str, program), *overrides], self.folder / "ranks.log", environment)

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of all iterations so far; the last line may be half written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def trained(self) -> list[dict[str, Any]]:
        """Of the iterations that trained a batch."""
        return [row for row in self.rows() if "loss" in row]

    @property
    def is_over(self) -> bool:
        """All iterations are done, whatever it writes after them, or none will follow."""
        return len(self.rows()) >= self.iterations or self.job.code is not None or time.monotonic() > self._until

    def tell_end(self, clock: Clock) -> None:
        code, done = self.job.code, len(self.rows())
        clock.tell(f"{self.name}: {done} of {self.iterations} iterations, {len(self.trained)} trained, exit code {code}")
        if done >= self.iterations:
            return
        for log in (self.folder / "ranks.log", *sorted((self.folder / "log").glob("sglang-*.log"))):
            text = log.read_text(errors="replace") if log.is_file() else "(there is none)"
            print(f"--- end of {log.relative_to(ROOT)}\n{text[-5000:]}", flush=True)


def run_rank_on_fake(recipe: Path, overrides: Sequence[str]) -> int:
    """In a process of its own; the one that starts the runs has no time for these imports."""
    from megatron_rl import config as configuration
    from megatron_rl import loop, run
    from megatron_rl.serving_sglang import SGLangServing
    from tests.rollout.engines.fake_sglang import GlooGroup, serialize

    program = (sys.executable, str(ROOT / "tests" / "rollout" / "engines" / "fake_sglang.py"))
    served = partial(SGLangServing, program=program, serialize=lambda: serialize, join=GlooGroup)
    run.SGLangServing = served  # type: ignore[misc,assignment]
    return loop.train(configuration.load(recipe, ["rollout.engine=sglang", *overrides]))


# --- what is told ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peers:
    """What one GPU did."""

    curves: dict[str, list[float]]  # correctness of every trained batch, by seed
    seconds: dict[str, float]  # median of a phase

    @staticmethod
    def of(runs: Sequence[DemoRun]) -> Peers:
        """The earlier measurement, and the baselines among these runs; their seconds where there are any."""
        one = json.loads((FOLDER / "demo_gpu.json").read_text(encoding="utf-8"))
        curves = {case: curve for case, curve in one.get("curves", {}).items() if case.endswith("reward/correct")}
        own = {each.name: rows for each in runs if each.name.startswith(BASELINE) and (rows := each.trained)}
        curves |= {name: [row["reward/correct"] for row in rows] for name, rows in own.items()}
        seconds = {}
        for phase in PHASES:
            theirs = [row["ours"] for row in one["rows"] if row["case"].endswith(f": {phase}, median")]
            mine = [row.get(f"time/{phase}_s", 0.0) for rows in own.values() for row in rows]
            if mine or theirs:
                seconds[phase] = round(median(mine or theirs), 5)
        return Peers(curves, seconds)


def rows_of(name: str, trained: list[dict[str, Any]], peers: Peers, model: ModelConfig, device: str) -> list[Row]:
    demo = DEMOS[name]
    rows = learning(name, trained, peers) if demo.learns else kept_kv(name, trained)
    found = [row["mismatch/logp_abs_mean"] for row in trained if row["mismatch/logp_abs_mean"] > 0]
    if found:  # an iteration may train tokens of older versions only
        rows.append(_row(f"{name}: |engine - trainer| log-prob, mean", "nats", mean(found), limit=MISMATCH, samples=found))
    compares = demo.learns and not name.startswith(BASELINE)
    for phase in PHASES:
        samples = [row.get(f"time/{phase}_s", 0.0) for row in trained]
        if max(samples) > 1e-3:  # where no turns are taken, some phases are not there
            peer = peers.seconds.get(phase) if compares else None
            rows.append(_row(f"{name}: {phase}, median", "s", median(samples), peer=peer, samples=samples))
    num_gpus = len(demo.gpus.split(","))
    gpu_seconds = [num_gpus * sum(row.get(f"time/{p}_s", 0.0) for p in PHASES) for row in trained]
    rates = [row["tokens/trained"] / s for row, s in zip(trained, gpu_seconds, strict=True)]
    rows.append(_row(f"{name}: trained tokens per GPU-second of an iteration, median", "tokens/s", median(rates), samples=rates))
    if peak := peak_tflops(device):
        flops = [matrix_flops(model, row["tokens/packed"], row["tokens/trained"]) for row in trained]
        shares = [f / s / 1e12 / peak for f, s in zip(flops, gpu_seconds, strict=True)]
        case = f"{name}: MFU of an iteration, generating and all, median"
        rows.append(_row(case, f"share of {peak:g} TFLOP/s", median(shares), samples=shares))
    return rows


def learning(name: str, trained: list[dict[str, Any]], peers: Peers) -> list[Row]:
    """Correctness in the first and the last third of the batches, against the same batches of each other seed on one GPU."""
    third = max(1, len(trained) // 3)
    rows = []
    for first, last in ((0, third), (len(trained) - third, len(trained))):
        ours = [row["reward/correct"] for row in trained[first:last]]
        seeds = [mean(curve[first:last]) for case, curve in peers.curves.items() if case != name and len(curve) >= last]
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


def written(runs: Sequence[DemoRun], options: argparse.Namespace) -> list[Row]:
    """The rows of all batches so far, which are in the file now."""
    peers, device = Peers.of(runs), torch.device("cuda") if torch.cuda.is_available() else None
    trained = {each.name: (each.model, rows) for each in runs if (rows := each.trained)}
    rows = [row for name, (model, own) in trained.items() for row in rows_of(name, own, peers, model, device_name(device))]
    if rows:
        curves = {f"{n}: {key}": [round(r.get(key, 0.0), 5) for r in own] for n, (_, own) in trained.items() for key in CURVES}
        packages = ["torch", "megatron-core", "aiohttp"] + ([] if options.small else ["sglang"])
        write_result("demo_two_gpus", rows, ceilings={}, packages=packages, curves=curves, device=device, folder=options.out)
    return rows


# --- all of them -----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = command_line(__doc__, seconds=340, then="no run goes on")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="+", choices=DEMOS, default=list(DEMOS))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.rank_of:
        return run_rank_on_fake(options.rank_of, overrides)
    if options.small:  # the fake server's plugin has one rank
        options.only = [name for name in options.only if DEMOS[name].learns]
    if not options.small and (options.model is None or num_gpus() < 2):
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
    with ending([]) as jobs:
        return measure(options, clock, folder, partial(begun, jobs, folder, recipe, source, options.small))


def begun(jobs: list[Job], folder: Path, recipe: Path, source: Path, small: bool, name: str) -> DemoRun:
    model = source if small else DEMOS[name].model(source, folder / f"{name.replace(' ', '_')}_model")
    started = DemoRun(name, folder, model, recipe, small)
    jobs.append(started.job)
    return started


def measure(options: argparse.Namespace, clock: Clock, folder: Path, begin: Callable[[str], DemoRun]) -> int:
    """Wave after wave; 1 where one of them trained nothing, or a bound is not kept."""
    waves = [names for wave in WAVES if (names := [name for name in wave if name in options.only])]
    runs: list[DemoRun] = []
    running: list[DemoRun] = []
    told = begun_at = clock.left
    while clock.left > 0 and (waves or running):
        if waves and (begun_at - clock.left > WAVE_S or all(each.trained or each.is_over for each in runs)):
            clock.tell(f"start of {', '.join(waves[0])}")
            begun_at = clock.left
            running += (fresh := [begin(name) for name in waves.pop(0)])
            runs += fresh
        for each in [each for each in running if each.is_over]:
            running.remove(each)
            each.tell_end(clock)
        if told - clock.left > WRITE_S:
            told = clock.left
            written(runs, options)
        time.sleep(0.3)
    for each in running:
        each.tell_end(clock)
    rows = written(runs, options)
    show(rows)
    missing = [name for name in options.only if not any(each.name == name and each.trained for each in runs)]
    broken = [row.case for row in rows if row.ratio_to_limit is not None and row.ratio_to_limit < 1]
    clock.tell(f"verdict: missing {missing or 'nothing'}; bounds not kept: {broken or 'none'}")
    return 1 if missing or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
