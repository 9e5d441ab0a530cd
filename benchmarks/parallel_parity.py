"""Do several GPUs train what one does? Loss, gradient norm and the weights' change of three optimizer steps, by layout.

The RL objective on SmolLM2 (with a fourth, empty KV head: `even_heads.py`), the same groups of unequal lengths with masks for
all; TP, TP with sequence parallelism, PP, CP and DP with the distributed optimizer on two ranks over NCCL, against one GPU.
Moments are kept from step to step, and the log-ratio to the first step's weights acts from the second on. In float32 the bounds
are tight. In bfloat16 the order of sums decides what is rounded away: the row's peer is how far one GPU's bfloat16 is from its
own float32, and a layout may differ from one GPU twice as much, or FLOOR where that is more. A row's limit is its bound; a ratio
to it of 1 or more means that it is kept. Unattended:

    python benchmarks/parallel_parity.py --model FOLDER [--out DIR] [--seconds 85]      # two GPUs; imports take 10 s of it
    python benchmarks/parallel_parity.py --small --out DIR                             # a tiny random model, on a CPU over gloo
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from even_heads import with_empty_heads
from gpu_timing import Clock, command_line
from launched import ended_ranks
from result_file import Row, write_result

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import parallel
from megatron_rl.training.trainer import Trainer
from megatron_rl.types import TrainingSequence
from tests.training.material import exported_as_weights, flat, make_config, make_groups, make_model

DTYPES = ("float32", "bfloat16")
STEPS = 3
TAU = 0.1
STRIDE = 17  # every 17th element of each tensor is compared: coprime to its dimensions, so all rows and columns have their turn
ONE = "one rank"
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {ONE: {}},
    2: {
        "TP=2": {"tensor_parallel": 2},
        "TP=2, sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
        "PP=2": {"pipeline_parallel": 2},
        "CP=2": {"context_parallel": 2},
        "DP=2, distributed optimizer": {"distributed_optimizer": True},
    },
}
FLOAT32 = {"loss": 1e-4, "gradient norm": 1e-4, "change of the weights": 1e-2}
FLOOR = {"loss": 5e-2, "gradient norm": 5e-2, "change of the weights": 2e-2}
PEER = "one GPU's bfloat16 from its float32"


@dataclass(frozen=True)
class Trained:
    """What three steps left behind."""

    losses: list[float]
    norms: list[float]
    log_ratio: float  # mean |log-ratio| of a response in the last step [nats]
    change: torch.Tensor  # float32 [elements]: of the main weights, a sample


# --- in each rank ----------------------------------------------------------------------------------------------------------


def run_rank(folder: Path) -> None:
    """Every layout of this number of ranks, one after the other in the same processes."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    launch = parallel.initialize(config_of(folder, plan, "float32", {}))
    for name, training in LAYOUTS[launch.world_size].items():
        for dtype in DTYPES:
            start = time.perf_counter()
            config = config_of(folder, plan, dtype, training)
            parallel.place_ranks(config)
            found = train(config, minibatches(plan))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if launch.rank == 0:
                path = folder / f"{dtype}, {name}.pt"
                torch.save(vars(found), path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
                print(f"{path.stem}: {time.perf_counter() - start:.1f} s, log-ratio {found.log_ratio:.3f}", flush=True)
    parallel.shutdown()


def config_of(folder: Path, plan: dict[str, Any], dtype: str, training: dict[str, Any]) -> Config:
    adam = {"lr": plan["lr"], "reset": False, "clip_grad": 1.0}
    settings = {"max_tokens_per_micro_batch": plan["micro_batch"], "log_prob_chunk": 256, "optimizer": adam} | training
    return make_config(folder / "model", dtype=dtype, training=settings)


def minibatches(plan: dict[str, Any]) -> list[list[TrainingSequence]]:
    shape = {"num_groups": 6, "group_size": 4, "longest": plan["longest"], "longest_prompt": 40, "vocabulary": plan["vocabulary"]}
    return [flat(make_groups(**shape, seed=seed)) for seed in range(STEPS)]


def train(config: Config, steps: list[list[TrainingSequence]]) -> Trained:
    """Collective."""
    trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
    trainer.load_hf(config.model.folder)
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    before = [trainer.optimizer.main_weight(p).clone() for p in parameters]
    batches = [trainer.distribute([sequences] if trainer.is_master else None) for sequences in steps]
    references = [trainer.log_probs(batch) for batch in batches]
    objective = MirrorDescent(TAU)
    metrics = [trainer.step(b, objective, r) for b, r in zip(batches, references, strict=True)]
    after = [trainer.optimizer.main_weight(p) for p in parameters]
    changes = exported_as_weights(trainer, [b - a for a, b in zip(before, after, strict=True)])
    sample = torch.cat([changes[name].reshape(-1)[::STRIDE].float().cpu() for name in sorted(changes)])
    losses, norms = ([m[key] for m in metrics] for key in ("loss", "grad_norm"))
    return Trained(losses, norms, metrics[-1]["log_ratio/abs_mean"], sample)


# --- what is compared ------------------------------------------------------------------------------------------------------


def difference(found: Trained, wanted: Trained) -> dict[str, float]:
    """Relative: of loss and norm the worst step; of the change its L2 distance."""
    scalars = {"loss": (found.losses, wanted.losses), "gradient norm": (found.norms, wanted.norms)}
    worst = {name: max(abs(a - b) / abs(b) for a, b in zip(*pair, strict=True)) for name, pair in scalars.items()}
    distance = (found.change - wanted.change).double().norm() / wanted.change.double().norm()
    return worst | {"change of the weights": float(distance)}


def rows_of(trained: dict[str, Trained]) -> tuple[list[Row], list[str]]:
    """Rows, and the cases that are missing."""
    rows, missing = [], []
    exact, rounded = (trained.get(f"{dtype}, {ONE}") for dtype in DTYPES)
    for dtype, one in zip(DTYPES, (exact, rounded), strict=True):
        peer = difference(rounded, exact) if exact and rounded and dtype == "bfloat16" else None
        for name in LAYOUTS[2]:
            found = trained.get(f"{dtype}, {name}")
            if found is None or one is None or (dtype == "bfloat16" and peer is None):
                missing.append(f"{dtype}, {name}")
                continue
            for what, value in difference(found, one).items():
                rows.append(_row(f"{dtype}, {name}: {what}", value, peer and peer[what]))
    return rows, missing


def _row(case: str, value: float, peer: float | None) -> Row:
    what = case.rpartition(": ")[2]
    bound = FLOAT32[what] if peer is None else max(FLOOR[what], 2 * peer)
    least = max(value, 1e-12)
    return Row(
        case=case,
        unit="relative difference",
        ours=_short(value),
        peer=None if peer is None else _short(peer),
        peer_name=None if peer is None else PEER,
        limit=_short(bound),
        ratio_to_peer=None if peer is None else _short(peer / least),
        ratio_to_limit=_short(bound / least),
        spread={},
    )


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def report(folder: Path, out: Path) -> int:
    """The table, the result file and the verdict; 1 where a bound is not kept or a layout is missing."""
    names = [f"{dtype}, {name}" for dtype in DTYPES for layouts in LAYOUTS.values() for name in layouts]
    files = {name: folder / f"{name}.pt" for name in names}
    trained = {n: Trained(**torch.load(f, weights_only=True)) for n, f in files.items() if f.is_file()}
    rows, missing = rows_of(trained)
    print(f"{'':60} {'difference':>14} {'bound':>10}   {PEER}")
    for row in rows:
        assert row.ratio_to_limit is not None
        kept = "" if row.ratio_to_limit >= 1 else "   NOT KEPT"
        peer = "" if row.peer is None else f"   {row.peer:.2e}"
        print(f"{row.case:64} {row.ours:10.2e} {row.limit:10.2e}{peer}{kept}")
    for name in missing:
        print(f"MISSING {name}")
    broken = [row.case for row in rows if (row.ratio_to_limit or 0) < 1]
    print(f"verdict: {len(rows) - len(broken)} of {len(rows)} bounds kept, {len(missing)} of 10 layouts missing")
    if rows:
        curves = {f"{name}: {what}": getattr(t, what) for name, t in trained.items() for what in ("losses", "norms")}
        device = torch.device("cuda") if torch.cuda.is_available() else None
        packages = ["torch", "megatron-core"]
        write_result("parallel_parity", rows, ceilings={}, packages=packages, curves=curves, device=device, folder=out)
    return 1 if broken or missing else 0


def prepare(folder: Path, model: Path | None, small: bool) -> None:
    """Model and plan, for the ranks to read."""
    target = folder / "model"
    if small:
        make_model(target, "llama", num_attention_heads=4, num_key_value_heads=2)
    else:
        assert model is not None, "checked by main"
        source = ModelConfig.from_folder(model)
        with_empty_heads(model, target, source.num_kv_heads + source.num_kv_heads % 2)
    vocabulary = ModelConfig.from_folder(target).vocab_size
    plan = {"lr": 1e-3 if small else 3e-6, "longest": 20 if small else 160, "vocabulary": vocabulary}
    plan["micro_batch"] = 64 if small else 1024  # a step's groups are split over several
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def main() -> int:
    parser = command_line(
        __doc__, seconds=85, then="the ranks are ended", small="a tiny random model, on a CPU if there is no GPU"
    )
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of)
        return 0
    if not options.small and (options.model is None or torch.cuda.device_count() < 2):
        parser.error("needs --model and two GPUs; --small tries the code on a CPU")
    clock = Clock.of(options.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.model, options.small)
        for _ in ended_ranks(__file__, folder, LAYOUTS, clock, telling=" s, log-ratio "):
            pass
        return report(folder, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
