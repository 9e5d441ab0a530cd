"""The paper's claims against their opposites, in miniature: `python benchmarks/ablations/run.py [NAME ...] [--seeds 0 1 2]`.

NAME is one of `arms.py`'s ablations, without one all: two or more runs of each seed, compared with the first. Runs what is not
finished, one after the other (`side_by_side.py`: many at once), into runs/ablations/RUN/seedN, then writes
benchmarks/results/ablation_NAME.json and docs/ablation_NAME.svg. What was found: docs/ablations.md. One run: `measured_train.py`;
the tasks: `tasks.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent))  # a script's own folder is on the path, its parent is not

from arms import ABLATIONS, RUNS, Ablation  # noqa: E402
from picture import Panel, draw  # noqa: E402
from result_file import Row, write_result  # noqa: E402

PANELS = {"reward/correct": ("correct, share of the batch", 0.0, 1.0), "length/mean": ("tokens of a response", 0.0, None)}
SETS = {"held_out": "held-out questions", "hard": "held-out long ways"}


@dataclass(frozen=True)
class Measured:
    """One finished run."""

    rows: list[dict[str, float]]  # of metrics.jsonl
    outcome: dict[str, Any]

    @property
    def batches(self) -> list[dict[str, float]]:
        """The rows of iterations that trained."""
        return [row for row in self.rows if "reward/correct" in row]

    @property
    def num_iterations(self) -> int:
        """With those of a partial run that had no whole batch yet; an evaluation after the last has no time of its own."""
        return sum("time/train_s" in row for row in self.rows)

    def curve(self, key: str) -> list[float]:
        return [row[key] for row in self.batches]

    def watched(self, name: str) -> dict[int, float]:
        """Iterations before it -> share of an evaluation set that is right, sampled at temperature 1."""
        return {int(row["iteration"]): row[key] for row in self.rows if (key := f"eval/{name}/pass@1") in row}

    def sampled(self, name: str, what: str = "mean") -> float:
        """After training, at temperature 1."""
        return float(self.outcome["evaluation"][name][what])

    @property
    def trained_tokens(self) -> float:
        return sum(self.curve("tokens/trained"))

    @property
    def seconds(self) -> float:
        """Of training: evaluations are not part of it."""
        is_own = lambda key: key.startswith("time/") and key != "time/evaluation_s"  # noqa: E731
        return sum(value for row in self.rows for key, value in row.items() if is_own(key))


@dataclass(frozen=True)
class Quantity:
    case: str
    unit: str
    of: Callable[[Measured], float]
    less_is_better: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--finished", action="store_true", help="run nothing: leave out seeds of which a run is missing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ABLATIONS):
        parser.error(f"{', '.join(sorted(unknown))}: no such ablation; there are {', '.join(ABLATIONS)}")
    for name in arguments.names or ABLATIONS:
        runs = ABLATIONS[name].arms.values()
        seeds = [s for s in arguments.seeds if not arguments.finished or all(is_finished(run, s) for run in runs)]
        if seeds:
            write(name, seeds)
        else:
            print(f"{name}: left out, no seed has all of its runs")


def write(name: str, seeds: Sequence[int]) -> None:
    """Result and picture of one ablation."""
    ablation = ABLATIONS[name]
    arms = {arm: [measure(run, seed) for seed in seeds] for arm, run in ablation.arms.items()}
    rows = compared(ablation, arms)
    print(f"{name}, seeds {', '.join(map(str, seeds))}")
    print_rows(rows)
    curves = {
        f"{arm}, seed {seed}: {key}": [round(value, 4) for value in run.curve(key)]
        for arm, runs in arms.items()
        for seed, run in zip(seeds, runs, strict=True)
        for key in shown(ablation)
    }
    machine = where([run.outcome for runs in arms.values() for run in runs])
    write_result(f"ablation_{name}", rows, ceilings={}, packages=[], curves=curves, measured_on=machine)
    (ROOT / "docs" / f"ablation_{name}.svg").write_text(drawn(ablation, arms, seeds), encoding="utf-8")


def print_rows(rows: Iterable[Row]) -> None:
    for row in rows:
        print(f"{row.case:72} {row.ours:9.4f} {row.unit}, {row.peer_name} {row.peer:9.4f}")


def folder_of(run: str, seed: int) -> Path:
    return ROOT / "runs" / "ablations" / run / f"seed{seed}"


def is_finished(run: str, seed: int) -> bool:
    return (folder_of(run, seed) / "outcome.json").is_file()


def command(run: str, seed: int) -> list[str]:
    """Arguments of `python` that make a run of a seed; its task must be there (`make_task`)."""
    task, overrides = RUNS[run]
    own = [f"run.folder={folder_of(run, seed)}", f"run.seed={seed}"]
    return ["measured_train.py", str(HERE / f"{task}.yaml"), *own, *overrides]


def make_task(task: str) -> None:
    if not (ROOT / f".cache/ablations/{task}/task.jsonl").is_file():
        python("tasks.py", task, f".cache/ablations/{task}")


def measure(run: str, seed: int) -> Measured:
    """The run of a seed, made if there is none; an unfinished one is begun anew."""
    folder = folder_of(run, seed)
    if not is_finished(run, seed):
        shutil.rmtree(folder, ignore_errors=True)
        make_task(RUNS[run][0])
        python(*command(run, seed))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Measured([json.loads(line) for line in lines], json.loads((folder / "outcome.json").read_text(encoding="utf-8")))


def python(script: str, *arguments: str) -> None:
    """Run a script of this folder, with the repository's root on its path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})


def where(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Device and versions of these runs; several devices are all named."""
    machines = [outcome["machine"] for outcome in outcomes]
    return {**machines[0], "device": "; ".join(sorted({machine["device"] for machine in machines}))}


def shown(ablation: Ablation) -> list[str]:
    return list(PANELS) if ablation.with_length else ["reward/correct"]


def compared(ablation: Ablation, arms: Mapping[str, Sequence[Measured]]) -> list[Row]:
    """Each quantity of the first arm beside that of every other: means over seeds, with the lowest and highest seed."""
    (ours, our_runs), *others = arms.items()
    num_batches = common_length([run.batches for runs in arms.values() for run in runs])
    if ablation.comparable_batches:
        quantities = of_batches(ablation, num_batches)
    else:
        quantities = [quantity for name in SETS if our_runs[0].watched(name) for quantity in of_set(name)]
    return [
        beside(
            f"{ours}: {q.case}",
            q.unit,
            [q.of(r) for r in our_runs],
            [q.of(r) for r in runs],
            peer,
            less_is_better=q.less_is_better,
        )
        for peer, runs in others
        for q in quantities
    ]


def of_batches(ablation: Ablation, num_batches: int) -> list[Quantity]:
    quarters = [round(num_batches * i / 4) for i in range(5)]
    spans = (
        list(zip(quarters, quarters[1:], strict=False)) if ablation.with_cost else [(0, num_batches), (quarters[3], num_batches)]
    )

    def part(key: str, start: int, end: int) -> Callable[[Measured], float]:
        return lambda run: fmean(run.curve(key)[start:end])

    found = [Quantity(f"correct, batches {a + 1} to {b}", "share", part("reward/correct", a, b)) for a, b in spans]
    found.append(Quantity("held-out questions after training, sampled", "share", lambda run: run.sampled("held_out")))
    if ablation.with_length:
        last = part("length/mean", quarters[3], num_batches)
        found.append(Quantity(f"tokens, batches {quarters[3] + 1} to {num_batches}", "tokens", last, less_is_better=True))
        after = lambda run: run.sampled("held_out", "mean_tokens")  # noqa: E731
        found.append(Quantity("tokens of held-out questions after training, sampled", "tokens", after, less_is_better=True))
    if ablation.with_cost:
        found += [
            Quantity("trained tokens a second (wall clock)", "tokens/s", lambda run: run.trained_tokens / run.seconds),
            per_thousand("engine steps", "steps"),
            per_thousand("rows decoded, padding too", "rows"),
            per_thousand("context tokens computed", "prefill_tokens"),
        ]
    return found


def per_thousand(name: str, count: str) -> Quantity:
    unit = count.removeprefix("prefill_")
    amount = lambda run: 1000 * run.outcome[count] / run.trained_tokens  # noqa: E731
    return Quantity(f"{name}, for 1000 trained tokens (counted)", unit, amount, less_is_better=True)


def of_set(name: str) -> list[Quantity]:
    """What compares arms whose batches say nothing of each other: fixed questions, all sampled at temperature 1."""
    return [
        Quantity(f"{SETS[name]}, mean of all evaluations", "share", lambda run: fmean(run.watched(name).values())),
        Quantity(f"{SETS[name]} after training", "share", lambda run: run.sampled(name)),
    ]


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
    names = f"Seeds {', '.join(map(str, seeds))} (faint), their mean; "
    first = next(iter(arms.values()))[0]
    if not ablation.comparable_batches:
        panels = [
            Panel(
                heading,
                {arm: [list(r.watched(key).values()) for r in runs] for arm, runs in arms.items()},
                0.0,
                1.0,
                xs=list(points),
            )
            for key, heading in SETS.items()
            if (points := first.watched(key))
        ]
        return draw(ablation.title, panels, f"{names}{max(first.watched('held_out'))} iterations, nothing cut.")
    length = common_length([run.batches for runs in arms.values() for run in runs])
    panels = [
        Panel(heading, {arm: [run.curve(key)[:length] for run in runs] for arm, runs in arms.items()}, floor, ceiling)
        for key, (heading, floor, ceiling) in PANELS.items()
        if key in shown(ablation)
    ]
    return draw(ablation.title, panels, f"{names}{cut([run for runs in arms.values() for run in runs], length)}; means of 5.")


def cut(runs: Sequence[Measured], num_batches: int) -> str:
    """How long the runs were, and what of them is not shown."""
    iterations = sorted({run.num_iterations for run in runs})
    said = " to ".join(str(n) for n in dict.fromkeys((iterations[0], iterations[-1])))
    is_whole = all(len(run.batches) == num_batches for run in runs)
    return f"{said} iterations, {'nothing cut' if is_whole else f'cut at batch {num_batches}'}"


if __name__ == "__main__":
    main()
