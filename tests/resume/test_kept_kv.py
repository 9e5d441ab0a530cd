"""Whole runs with `rollout.kv_policy=keep`: they train, and KV comes back after a stop, or after a kill is computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.rollout.buffer import ReplayBuffer
from tests.resume.recipe import write_recipe
from tests.resume.runs import Zygote

ITERATIONS = 4
KEEP = ("rollout.kv_policy=keep", "rollout.max_kv_age=2", "rollout.embedded.page_size=4")
SMALL = "rollout.kv_store.host_bytes=30000"  # fourteen pages: a trajectory or two


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("keep"), iterations=ITERATIONS)


def outcome(folder: Path) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Tokens, versions and KV versions of every trajectory drawn, and the rows of metrics."""
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    found = {
        t.id: (
            t.token_ids.tolist(),
            t.weight_versions.tolist(),
            np.concatenate([s.kv_versions for s in t.segments]).tolist() if t.segments else [],
        )
        for t in buffer.trajectories(range(3 * buffer.num_drawn))
    }
    buffer.check()
    buffer.close()
    return found, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kv_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "kv").glob("embedded-0/*"))


def run(zygote: Zygote, config: Path, name: str, *overrides: str, kill: str | None = None) -> Path:
    folder = config.parent / name
    code = zygote.run(config, folder, 3, *KEEP, *overrides, kill=kill)
    is_killed = kill is not None and "stop" not in kill
    assert code == (-9 if is_killed else 0), folder.with_suffix(".log").read_text()
    return folder


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, config: Path) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    folder = run(zygote, config, "undisturbed", "rollout.kv_store.drift_samples=2")
    assert kv_files(folder) == [], "a finished run leaves no KV"
    assert "KV over the training phase" in (folder / "report.html").read_text()
    return outcome(folder)


def test_a_run_that_keeps_kv_trains_and_says_how_old_the_kv_of_every_token_was(undisturbed: Any) -> None:
    trajectories, rows = undisturbed
    assert len(rows) == ITERATIONS and sum("loss" in row for row in rows) >= 2
    old = [t for t, versions, kv_versions in trajectories.values() if (np.array(kv_versions) < np.array(versions)).any()]
    assert len(old) >= 5, "trajectories went on with the KV of older weights"
    for _, versions, kv_versions in trajectories.values():
        age = np.array(versions) - np.array(kv_versions)
        assert ((age >= 0) & (age <= 2)).all()
    later = rows[1:]
    assert all(row["kv/hit_rate"] > 0.9 and row["kv/restore_failures"] == row["kv/spilled_bytes"] == 0 for row in later)
    assert rows[0]["kv/restored_tokens"] == rows[0]["kv/recomputed_tokens"] == 0
    assert all(row["kv/restored_tokens"] > 0 and row["kv/snapshot_bytes"] > 0 and row["kv/snapshot_s"] > 0 for row in later[:2])
    assert any(row.get("kv/drift_logp_abs_mean", 0) > 0 for row in later), "the weights have moved, and log-probs with them"


@pytest.mark.parametrize("moment", ["told to stop while generating", "told to stop while training"])
def test_a_run_told_to_stop_finds_its_kv_again_and_ends_like_an_undisturbed_one(
    moment: str, zygote: Zygote, config: Path, undisturbed: Any
) -> None:
    folder = run(zygote, config, moment, kill=moment)
    assert kv_files(folder), "written out with the checkpoint"
    num_done = len(outcome(folder)[1])
    run(zygote, config, moment)
    trajectories, rows = outcome(folder)
    assert trajectories == undisturbed[0]
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in undisturbed[1]]
    assert rows[num_done]["kv/restored_tokens"] > 0 and rows[num_done]["kv/restore_failures"] == 0
    assert kv_files(folder) == []


@pytest.mark.parametrize("spilled", [False, True])
def test_a_killed_run_finds_only_spilled_kv_and_counts_what_it_computes_again(
    spilled: bool, zygote: Zygote, config: Path, undisturbed: Any
) -> None:
    options = [SMALL] if spilled else []
    folder = run(zygote, config, f"killed_{spilled}", *options, kill="generating")
    assert bool(kv_files(folder)) == spilled
    num_done = len(outcome(folder)[1])
    run(zygote, config, f"killed_{spilled}", *options)
    trajectories, rows = outcome(folder)
    assert len(rows) == ITERATIONS and sum("loss" in row for row in rows) >= 2
    assert trajectories.keys() == undisturbed[0].keys()
    assert rows[num_done]["kv/recomputed_tokens"] > 0
    assert (rows[num_done]["kv/restored_tokens"] > 0) == spilled


def test_kv_files_that_were_spoiled_between_two_starts_are_computed_again(zygote: Zygote, config: Path) -> None:
    folder = run(zygote, config, "spoiled", kill="told to stop while generating")
    for name in kv_files(folder):
        path = folder / "kv" / "embedded-0" / name
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    num_spoiled, num_done = len(kv_files(folder)), len(outcome(folder)[1])
    run(zygote, config, "spoiled")
    _, rows = outcome(folder)
    assert len(rows) == ITERATIONS
    assert rows[num_done]["kv/restore_failures"] == num_spoiled and rows[num_done]["kv/restored_tokens"] == 0
    assert rows[num_done]["kv/recomputed_tokens"] > 0
