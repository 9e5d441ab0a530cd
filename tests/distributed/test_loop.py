"""The whole loop on two ranks: an engine on each, rank 0 conducting; equal to one rank. And SIGTERM at any moment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.rollout.buffer import ReplayBuffer
from tests.resume.recipe import write_recipe

ITERATIONS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("loop"), iterations=ITERATIONS)


def command(config: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [*(launch if ranks > 1 else [sys.executable, "-m"]), "megatron_rl", "train", str(config), *overrides]


def trained(folder: Path) -> tuple[dict[int, Any], list[float]]:
    """Tokens and weight versions of every trained trajectory, and the losses."""
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    found = {
        t.id: (t.token_ids.tolist(), t.weight_versions.tolist())
        for i in range(ITERATIONS)
        for g in buffer.batch(i) or []
        for t in g.trajectories
    }
    engines = {s.engine for t in buffer.trajectories(sorted(found)) for s in t.segments}
    buffer.check()
    buffer.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    restored = [row.get("kv/restored_tokens", 0) for row in rows]
    return {"trajectories": found, "engines": engines, "restored": restored}, [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_that_keep_kv_generate_and_train_what_one_does(config: Path) -> None:
    results = {}
    for ranks in (1, 2):
        folder = config.parent / f"ranks{ranks}"
        overrides = (f"run.folder={folder}", "rollout.kv_policy=keep", "rollout.max_kv_age=2")
        done = subprocess.run(command(config, *overrides, ranks=ranks), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        results[ranks] = trained(folder)
    (one, one_losses), (two, two_losses) = results[1], results[2]
    assert one["engines"] == {"embedded-0"} and two["engines"] == {"embedded-0", "embedded-1"}
    assert one["trajectories"] == two["trajectories"]
    assert one["restored"] == two["restored"] and sum(one["restored"]) > 0, "from descriptors over the wire"
    assert one_losses == pytest.approx(two_losses, rel=1e-4)


def test_sigterm_saves_and_the_same_command_continues(config: Path) -> None:
    folder = config.parent / "sigterm"
    arguments = command(config, f"run.folder={folder}", "run.iterations=100000", "run.checkpoint_every=100000")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    seen = ""
    for line in process.stderr:
        seen += line
        if "iteration 3/" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, seen + rest
    assert f"megatron-rl train {folder / 'config.yaml'}" in rest
    saved = sorted((folder / "checkpoints").iterdir())
    assert len(saved) == 1, saved
    stopped_at = int(saved[0].name.removeprefix("iteration_"))
    assert stopped_at >= 3
    again = command(folder / "config.yaml", f"run.iterations={stopped_at + 1}")
    done = subprocess.run(again, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(stopped_at + 1))
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["iterations"] == stopped_at + 1
