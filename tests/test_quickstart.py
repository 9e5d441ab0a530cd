"""The quickstart as its README tells it, from nothing to a better model, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from transformers import AutoModelForCausalLM

from megatron_rl.rollout.buffer import ReplayBuffer

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_leaves_a_better_model_a_report_and_a_whole_buffer(tmp_path: Path) -> None:
    run("examples/quickstart/make_model.py", tmp_path)
    settings = [
        f"model.folder={tmp_path / 'model'}",
        f"data.path={tmp_path / 'task.jsonl'}",
        f"run.folder={tmp_path / 'run'}",
        "run.iterations=45",
        "run.threads=1",
    ]
    run("-m", "megatron_rl", "train", "examples/quickstart/config.yaml", *settings)

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    correct = [row["reward/correct"] for row in rows if "reward/correct" in row]
    quarter = len(correct) // 4
    assert mean(correct[-quarter:]) > mean(correct[:quarter]) + 0.1, correct

    buffer = ReplayBuffer(tmp_path / "run" / "buffer.sqlite", read_only=True)
    buffer.check()
    share = buffer.mixed_version_share()
    buffer.close()
    assert share and share > 0.05, "partial rollouts: some trained trajectories hold several weight versions"
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert "conservation" in run("-m", "megatron_rl", "inspect", tmp_path / "run").lower()
