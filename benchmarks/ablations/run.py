"""The paper's claims against their opposites, in miniature: `python benchmarks/ablations/run.py NAME [--seeds 0 1 2]`.

NAME is one of `ABLATIONS`: two runs of each seed, compared. A run is a config of this folder with overrides, and may serve
several ablations. Runs what is not finished, one after the other, into runs/ablations/RUN/seedN, then writes
benchmarks/results/ablation_NAME.json and docs/ablation_NAME.svg. What was found: docs/ablations.md. One run:
`measured_train.py`; the tasks: `tasks.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent))  # a script's own folder is on the path, its parent is not

from picture import Panel, draw  # noqa: E402
from result_file import Row, write_result  # noqa: E402

PACKAGES = ["torch", "megatron-core", "transformers"]
PANELS = {"reward/correct": ("correct, share of the batch", 0.0, 1.0), "length/mean": ("tokens of a response", 0.0, None)}

PARTIAL = ("rollout.partial=true", "rollout.token_budget=16", "run.iterations=80")  # the first ones wait for a whole batch
SLOWER = ("training.optimizer.lr=2.0e-4",)  # the configs have 5e-4

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> config and task, overrides
    "chain_full": ("chain", ()),
    "chain_full_slower": ("chain", SLOWER),
    "chain_rest": ("chain", ("algorithm.name=rest",)),
    "chain_partial": ("chain", PARTIAL),
    "chain_partial_slower": ("chain", (*PARTIAL, *SLOWER)),
    "chain_partial_last": ("chain", (*PARTIAL, "algorithm.loss_segments=last")),
    "sum": ("sum", ()),
    "sum_rest": ("sum", ("algorithm.name=rest",)),
    "sum_length": ("sum", ("rewards.length.schedule=constant", "rewards.length.start_iteration=15")),
}


@dataclass(frozen=True)
class Ablation:
    title: str
    arms: Mapping[str, str]  # what it is called -> its run; the paper's method first
    with_length: bool = False
    with_cost: bool = False


ABLATIONS = {
    "rest_chain": Ablation("Mirror descent against ReST, chains", {"mirror descent": "chain_full", "ReST": "chain_rest"}),
    "rest_sum": Ablation("Mirror descent against ReST, sums", {"mirror descent": "sum", "ReST": "sum_rest"}),
    "partial": Ablation(
        "Partial against full rollouts, chains",
        {"partial rollouts": "chain_partial", "full rollouts": "chain_full"},
        with_length=True,
        with_cost=True,
    ),
    "partial_slower": Ablation(
        "Partial against full rollouts, chains, learning rate 2e-4",
        {"partial rollouts": "chain_partial_slower", "full rollouts": "chain_full_slower"},
        with_length=True,
        with_cost=True,
    ),
    "loss_segments": Ablation(
        "Which segments carry loss in partial rollouts, chains",
        {"the last one": "chain_partial_last", "all": "chain_partial"},
        with_length=True,
    ),
    "length": Ablation(
        "Length reward on and off, sums",
        {"length reward from iteration 15": "sum_length", "no length reward": "sum"},
        with_length=True,
    ),
}


@dataclass(frozen=True)
class Measured:
    """One finished run."""

    rows: list[dict[str, float]]  # of metrics.jsonl
    outcome: dict[str, Any]

    @property
    def batches(self) -> list[dict[str, float]]:
        """The rows of iterations that trained."""
        return [row for row in self.rows if "reward/correct" in row]

    def curve(self, key: str) -> list[float]:
        return [row[key] for row in self.batches]

    @property
    def trained_tokens(self) -> float:
        return sum(self.curve("tokens/trained"))

    @property
    def seconds(self) -> float:
        return sum(value for row in self.rows for key, value in row.items() if key.startswith("time/"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    ablation = ABLATIONS[arguments.name]
    arms = {arm: [measure(run, seed) for seed in arguments.seeds] for arm, run in ablation.arms.items()}
    rows = compared(ablation, arms)
    for row in rows:
        print(f"{row.case:64} {row.ours:9.4f} {row.unit}, {row.peer_name} {row.peer:9.4f}")
    curves = {
        f"{arm}, seed {seed}: {key}": [round(value, 4) for value in run.curve(key)]
        for arm, runs in arms.items()
        for seed, run in zip(arguments.seeds, runs, strict=True)
        for key in shown(ablation)
    }
    write_result(f"ablation_{arguments.name}", rows, ceilings={}, packages=PACKAGES, curves=curves)
    picture = ROOT / "docs" / f"ablation_{arguments.name}.svg"
    picture.write_text(drawn(ablation, arms, arguments.seeds), encoding="utf-8")


def measure(run: str, seed: int) -> Measured:
    """The run of a seed, made if there is none; an unfinished one is begun anew."""
    name, overrides = RUNS[run]
    task, folder = f".cache/ablations/{name}", f"runs/ablations/{run}/seed{seed}"
    if not (ROOT / task / "task.jsonl").is_file():
        python("tasks.py", name, task)
    if not (ROOT / folder / "outcome.json").is_file():
        shutil.rmtree(ROOT / folder, ignore_errors=True)
        python("measured_train.py", str(HERE / f"{name}.yaml"), f"run.folder={folder}", f"run.seed={seed}", *overrides)
    lines = (ROOT / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    outcome = json.loads((ROOT / folder / "outcome.json").read_text(encoding="utf-8"))
    return Measured([json.loads(line) for line in lines], outcome)


def python(script: str, *arguments: str) -> None:
    """Run a script of this folder, with the repository's root on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True, cwd=ROOT, env=environment)


def shown(ablation: Ablation) -> list[str]:
    return list(PANELS) if ablation.with_length else ["reward/correct"]


def compared(ablation: Ablation, arms: Mapping[str, Sequence[Measured]]) -> list[Row]:
    """Each number of the first arm beside the second's: means over seeds, with the lowest and highest seed."""
    (ours, our_runs), (peer, peer_runs) = arms.items()
    num_batches = common_length([run.batches for run in [*our_runs, *peer_runs]])

    def row(case: str, unit: str, of: Callable[[Measured], float], *, less_is_better: bool = False) -> Row:
        values, peer_values = [of(run) for run in our_runs], [of(run) for run in peer_runs]
        return beside(f"{ours}: {case}", unit, values, peer_values, peer, less_is_better=less_is_better)

    def part(key: str, start: int, end: int) -> Callable[[Measured], float]:
        return lambda run: fmean(run.curve(key)[start:end])

    quarters = [round(num_batches * i / 4) for i in range(5)]
    rows = [
        row(f"correct, batches {start + 1} to {end}", "share", part("reward/correct", start, end))
        for start, end in zip(quarters, quarters[1:], strict=False)
    ]
    rows.append(row("all prompts after training, sampled", "share", lambda run: run.outcome["evaluation"]["mean"]))
    if ablation.with_length:
        last = part("length/mean", quarters[3], quarters[4])
        rows.append(row(f"tokens, batches {quarters[3] + 1} to {quarters[4]}", "tokens", last, less_is_better=True))
        after = lambda run: run.outcome["evaluation"]["mean_tokens"]  # noqa: E731
        rows.append(row("tokens after training, sampled", "tokens", after, less_is_better=True))
    if ablation.with_cost:
        rows += [
            row("trained tokens a second (wall clock)", "tokens/s", lambda run: run.trained_tokens / run.seconds),
            row("engine steps for 1000 trained tokens (counted)", "steps", per_thousand("steps"), less_is_better=True),
            row("rows decoded for 1000 trained tokens, padding too (counted)", "rows", per_thousand("rows"), less_is_better=True),
        ]
    return rows


def per_thousand(count: str) -> Callable[[Measured], float]:
    return lambda run: 1000 * run.outcome[count] / run.trained_tokens


def beside(
    case: str, unit: str, ours: Sequence[float], peers: Sequence[float], peer_name: str, *, less_is_better: bool = False
) -> Row:
    """Means with their lowest and highest; the ratio is above 1 where ours is better."""
    our_mean, peer_mean = fmean(ours), fmean(peers)
    better, worse = (peer_mean, our_mean) if less_is_better else (our_mean, peer_mean)
    spread = {"ours": spread_of(ours), "peer": spread_of(peers)}
    ratio = round(better / worse, 3) if worse else None
    return Row(case, unit, round(our_mean, 4), round(peer_mean, 4), peer_name, None, ratio, None, spread)


def spread_of(values: Sequence[float]) -> tuple[float, float]:
    return round(min(values), 4), round(max(values), 4)


def common_length(curves: Sequence[Sequence[Any]]) -> int:
    """As much as all have: equal batches are equal samples."""
    return min(map(len, curves))


def drawn(ablation: Ablation, arms: Mapping[str, Sequence[Measured]], seeds: Sequence[int]) -> str:
    length = common_length([run.batches for runs in arms.values() for run in runs])
    panels = [
        Panel(heading, {arm: [run.curve(key)[:length] for run in runs] for arm, runs in arms.items()}, floor, ceiling)
        for key, (heading, floor, ceiling) in PANELS.items()
        if key in shown(ablation)
    ]
    names = ", ".join(map(str, seeds))
    said = f"Seeds {names} (faint) and their mean; the first {length} batches of 16 groups of 8, each point over the last 5."
    return draw(ablation.title, panels, said)


if __name__ == "__main__":
    main()
