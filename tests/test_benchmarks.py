"""The GPU benchmarks' own machinery, at toy size on the CPU: rows, missing peers, the picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from tests.training.conftest import make_trainer  # noqa: F401  a fixture
from tests.training.material import exported, flat, make_config, make_groups, make_model

ROOT = Path(__file__).parents[1]
KEYS = {"name", "device", "versions", "date", "commit", "command", "ceilings", "rows"}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_snapshots_are_measured_checked_and_written_with_missing_peers_named(tmp_path: Path) -> None:
    told = run("kv_snapshot.py", "--small", "--out", str(tmp_path))
    result = json.loads((tmp_path / "kv_snapshot.json").read_text(encoding="utf-8"))
    assert result.keys() >= KEYS and {"bf16_gemm_tflops", "host_to_device_gb_per_s"} <= result["ceilings"].keys()
    cases = [row["case"] for row in result["rows"]]
    for wanted in ("snapshot, 128 tokens, pages of 1", "restore, 256 tokens, pages of 16"):
        assert wanted in cases
    assert any(case.startswith("device scatter") for case in cases)
    for row in result["rows"]:
        assert row["ours"] > 0 and row["limit"] > 0
        if row["peer"] is None and row["peer_name"] is not None:
            assert "failed, " in row["peer_name"] and row["ratio_to_peer"] is None
    assert "AssertionError" not in told


def test_partial_rollouts_and_their_peer_train_the_same_lengths_on_a_fake_server(tmp_path: Path) -> None:
    told = run("partial_rollouts.py", "--small", "--out", str(tmp_path))
    result = json.loads((tmp_path / "partial_rollouts.json").read_text(encoding="utf-8"))
    assert result.keys() >= KEYS and len(result["rows"]) == 4 and "MISSING" not in told, told
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in result["rows"])
    assert all(tokens > 0 for side in ("partial", "waiting", "kept") for tokens in result["curves"][f"{side}_tokens"])


def test_empty_heads_change_no_weight_of_the_others_and_stay_empty(tmp_path: Path, make_trainer) -> None:  # noqa: F811
    """Five heads for each of three KV heads become twenty over four: two ranks can share them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from even_heads import with_empty_heads

    for family in ("llama", "qwen2"):
        shape = {"num_attention_heads": 15, "num_key_value_heads": 3, "hidden_size": 120}
        narrow = make_model(tmp_path / family, family, **shape)
        wide = with_empty_heads(narrow, tmp_path / f"{family}-wide", 4)
        weights = []
        for folder in (narrow, wide):
            trainer = make_trainer(make_config(folder))
            trainer.step(trainer.distribute([flat(make_groups())]), MirrorDescent(0.3), None)
            weights.append(exported(trainer))
        for name, value in weights[0].items():
            found = weights[1][name]
            kept = found[tuple(slice(0, n) for n in value.shape)]
            torch.testing.assert_close(kept, value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert found.count_nonzero() == kept.count_nonzero(), name


def test_a_killed_server_is_reported_with_what_became_of_every_trajectory(tmp_path: Path) -> None:
    told = run("sglang_kills.py", "--small", "--out", str(tmp_path), "--phases", "in delivery")
    result = json.loads((tmp_path / "sglang_kills.json").read_text(encoding="utf-8"))
    found = {row["case"].partition(":")[0] + row["unit"]: row["ours"] for row in result["rows"]}
    assert found["killed in deliverytrajectories"] == 0 and found["killed in deliverys"] > 0, told
    assert found["run killed in deliveryiterations"] == 12 and "in delivery, iteration 2: went on after" in told


def test_the_crossover_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    curves = {"tokens": [512.0, 2048.0], "restore_s": [0.03, 0.04], "prefill_s": [0.02, 0.4], "copy_s": [0.03, 0.039]}
    (tmp_path / "r.json").write_text(json.dumps({"device": "a GPU <1>", "curves": curves}), encoding="utf-8")
    run("crossover_picture.py", "--result", str(tmp_path / "r.json"), "--picture", str(tmp_path / "p.svg"))
    picture = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert "from 2k tokens" in picture and "a GPU &lt;1&gt;" in picture and picture.count("<polyline") == 3
