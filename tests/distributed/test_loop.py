"""The whole loop on two ranks under torchrun: an engine on each, rank 0 conducting; equal to one rank. And SIGTERM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.rollout.buffer import ReplayBuffer
from tests.distributed.command import train
from tests.resume.recipe import write_recipe
from tests.zygote import Zygote

ITERATIONS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("loop"), iterations=ITERATIONS)


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


def test_two_ranks_that_keep_kv_generate_and_train_what_one_does(config: Path, zygote: Zygote) -> None:
    results = {}
    for ranks in (1, 2):
        folder = config.parent / f"ranks{ranks}"
        arguments = [str(config), f"run.folder={folder}", "rollout.kv_policy=keep", "rollout.max_kv_age=2"]
        if ranks == 1:
            log = config.parent / "ranks1.log"
            assert zygote.run(train, arguments, log=log) == 0, log.read_text()
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_rl"]
            done = subprocess.run([*launch, "train", *arguments], capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
        results[ranks] = trained(folder)
    (one, one_losses), (two, two_losses) = results[1], results[2]
    assert one["engines"] == {"embedded-0"} and two["engines"] == {"embedded-0", "embedded-1"}
    assert one["trajectories"] == two["trajectories"]
    assert one["restored"] == two["restored"] and sum(one["restored"]) > 0, "from descriptors over the wire"
    assert one_losses == pytest.approx(two_losses, rel=1e-4)


def test_sigterm_saves_and_the_same_command_continues(config: Path, zygote: Zygote) -> None:
    folder, log = config.parent / "sigterm", config.parent / "sigterm.log"
    endless = ["run.iterations=100000", "run.checkpoint_every=100000"]
    assert zygote.run(train, [str(config), f"run.folder={folder}", *endless], 2, log=log) == 0, log.read_text()
    assert f"megatron-rl train {folder / 'config.yaml'}" in log.read_text()
    saved = sorted((folder / "checkpoints").iterdir())
    assert len(saved) == 1, saved
    stopped_at = int(saved[0].name.removeprefix("iteration_"))
    assert stopped_at >= 3
    again = [str(folder / "config.yaml"), f"run.iterations={stopped_at + 1}"]
    assert zygote.run(train, again, log=log) == 0, log.read_text()
    rows = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(stopped_at + 1))
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["iterations"] == stopped_at + 1
