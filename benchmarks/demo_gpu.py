"""Does the demo learn on one GPU, SGLang and Megatron-Core taking turns? Three seeds of examples/smollm2_gpu, 32 iterations.

`python benchmarks/demo_gpu.py --model FOLDER [--seeds 0 1 2] [section.key=value ...]` runs what is not finished yet, one seed
after the other, into runs/smollm2_gpu<N>, and writes results/demo_gpu.json: correctness and the distance between the engines'
and the trainer's log-probs, last quarter of the trained iterations against the first, and the seconds of every phase.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from demo_learning import gain
from result_file import FOLDER, Row, write_result

ROOT = Path(__file__).parent.parent
PHASES = ("rollout", "train", "publish", "release", "onload", "offload", "resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER)
    options, overrides = parser.parse_known_args()
    runs = {seed: trained_rows(seed, options.model, overrides) for seed in options.seeds}
    curves = {f"seed {s}: {key}": [round(row[key], 4) for row in rows] for s, rows in runs.items() for key in CURVES}
    rows = [row for seed, trained in runs.items() for row in rows_of(seed, trained)]
    for row in rows:
        print(f"{row.case:70} {row.ours:8.4f} {row.unit}, {row.peer_name or '-'} {row.peer}")
    packages = ["torch", "sglang", "megatron-core", "aiohttp"]
    device = torch.device("cuda") if torch.cuda.is_available() else None
    write_result("demo_gpu", rows, ceilings={}, packages=packages, curves=curves, device=device, folder=options.out)


CURVES = ("reward/correct", "mismatch/logp_abs_mean", "staleness/mixed_versions")


def trained_rows(seed: int, model: Path | None, overrides: list[str]) -> list[dict[str, Any]]:
    """Metrics of the iterations that trained a batch."""
    folder = ROOT / f"runs/smollm2_gpu{seed}"
    if not (folder / "hf").is_dir():
        command = ["examples/smollm2_gpu/run.sh", f"run.folder={folder}", f"run.seed={seed}", "run.iterations=32", *overrides]
        chosen = [f"model.folder={model}"] if model else []
        subprocess.run(["bash", *command, *chosen], check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "reward/correct" in row]


def rows_of(seed: int, trained: list[dict[str, Any]]) -> list[Row]:
    quarter = len(trained) // 4
    first, last = trained[:quarter], trained[-quarter:]

    def change(what: str, key: str, unit: str) -> Row:
        values = [[row[key] for row in part] for part in (last, first)]
        spread = {"ours": (min(values[0]), max(values[0])), "peer": (min(values[1]), max(values[1]))}
        return Row(
            f"seed {seed}: {what}, last quarter of {len(trained)} batches",
            unit,
            round(mean(values[0]), 4),
            round(mean(values[1]), 4),
            "first quarter",
            None,
            None,
            None,
            spread,
        )

    mismatch = mean(row["mismatch/logp_abs_mean"] for row in trained)
    mixed = mean(row["staleness/mixed_versions"] for row in trained)
    return [
        change("correctness while training", "reward/correct", "share"),
        change("|engine - trainer| log-prob", "mismatch/logp_abs_mean", "nats"),
        gain(f"seed {seed}: |engine - trainer| log-prob, mean of all batches", mismatch, 0.02, "allowed at most", unit="nats"),
        gain(f"seed {seed}: trajectories of two or more weight versions", mixed, 0.10, "wanted at least"),
        *(
            Row(
                f"seed {seed}: {p}, median",
                "s",
                round(median(r[f"time/{p}_s"] for r in trained), 3),
                None,
                None,
                None,
                None,
                None,
                {},
            )
            for p in PHASES
        ),
    ]


if __name__ == "__main__":
    main()
