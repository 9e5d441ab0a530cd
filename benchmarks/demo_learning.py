"""Does the demo learn? Three seeds of examples/smollm2: correctness over the run, and on questions it never draws.

`python benchmarks/demo_learning.py [section.key=value ...] [--seeds 0 1 2]` runs what is not finished yet (six to ten
minutes a seed on two cores) into runs/demo_seed<N>, reads metrics, evaluation and replay buffer of each, and writes
results/demo_learning.json. Ratios are gains: last quarter over first, trained over unaided model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from result_file import Row, write_result

from megatron_rl.rollout.buffer import ReplayBuffer

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, overrides = parser.parse_known_args()
    runs = {seed: measure(seed, overrides) for seed in arguments.seeds}
    rows = [row for seed, run in runs.items() for row in rows_of(f"seed {seed}", run)] + mean_rows(list(runs.values()))
    for row in rows:
        print(f"{row.case:60} {row.ours:8.3f} {row.unit}, {row.peer_name} {row.peer:.3f}")
    write_result(
        "demo_learning",
        rows,
        ceilings={},
        packages=["torch", "megatron-core", "transformers", "reasoning-gym"],
        curves={f"seed {seed}: correctness": run["curve"] for seed, run in runs.items()},
    )


def measure(seed: int, overrides: list[str]) -> dict[str, Any]:
    """Finish the run of a seed and read what it left."""
    name = f"runs/demo_seed{seed}"
    folder = ROOT / name
    clock = folder / "whole_seconds.json"  # of a run in one go, with both evaluations and every start
    if not (folder / "hf").is_dir():
        fresh, start = not folder.exists(), time.perf_counter()
        subprocess.run(["examples/smollm2/run.sh", "--run", name, f"run.seed={seed}", *overrides], check=True, cwd=ROOT)
        if fresh:
            clock.write_text(json.dumps(time.perf_counter() - start), encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if "reward/correct" in row]
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    buffer.check()
    mixed = buffer.mixed_version_share()
    buffer.close()
    threads = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]["threads"]
    curve = [row["reward/correct"] for row in trained]
    quarter = len(curve) // 4
    return {
        "curve": curve,
        "first": mean(curve[:quarter]),
        "last": mean(curve[-quarter:]),
        "mixed": mixed,
        "threads": f" (run.threads={threads}, beside another run)" if threads else "",
        "peak_bytes": max(row.get("memory/peak_bytes", 0) for row in rows),
        "seconds": sum(value for row in rows for key, value in row.items() if key.startswith("time/")),
        "whole_seconds": json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else None,
        "evaluation": json.loads((folder / "evaluation.json").read_text(encoding="utf-8")),
    }


def rows_of(name: str, run: dict[str, Any]) -> list[Row]:
    before, after = run["evaluation"]["before"], run["evaluation"]["after"]
    intervals = {"ours": (after["low"], after["high"]), "peer": (before["low"], before["high"])}
    return [
        gain(f"{name}: correctness while training, last quarter", run["last"], run["first"], "first quarter"),
        gain(f"{name}: held-out, greedy, {after['n']} questions", after["mean"], before["mean"], "unaided model", intervals),
        gain(f"{name}: trained trajectories of two or more weight versions", run["mixed"], 0.10, "wanted at least"),
        gain(f"{name}: seconds in iterations{run['threads']}", run["seconds"], 600.0, "allowed at most", unit="s"),
        *(
            [gain(f"{name}: seconds in all{run['threads']}", run["whole_seconds"], 600.0, "allowed at most", unit="s")]
            if run["whole_seconds"]
            else []
        ),
        *(
            [gain(f"{name}: peak memory", run["peak_bytes"] / 1e9, 4.0, "allowed at most", unit="GB")]
            if run["peak_bytes"]
            else []
        ),
    ]


def mean_rows(runs: list[dict[str, Any]]) -> list[Row]:
    last, first = [run["last"] for run in runs], [run["first"] for run in runs]
    after = [run["evaluation"]["after"]["mean"] for run in runs]
    before = [run["evaluation"]["before"]["mean"] for run in runs]
    return [
        gain(
            f"mean of {len(runs)} seeds: correctness while training, last quarter",
            mean(last),
            mean(first),
            "first quarter",
            {"ours": _range(last), "peer": _range(first)},
        ),
        gain(
            f"mean of {len(runs)} seeds: held-out, greedy",
            mean(after),
            mean(before),
            "unaided model",
            {"ours": _range(after), "peer": _range(before)},
        ),
    ]


def _range(values: list[float]) -> tuple[float, float]:
    return round(min(values), 4), round(max(values), 4)


def gain(
    case: str, ours: float, peer: float, peer_name: str, spread: dict[str, tuple[float, float]] | None = None, unit: str = "share"
) -> Row:
    ours, peer = round(ours, 4), round(peer, 4)
    return Row(case, unit, ours, peer, peer_name, None, round(ours / peer, 3), None, spread or {})


if __name__ == "__main__":
    main()
