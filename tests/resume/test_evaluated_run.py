"""A run that evaluates while it trains is, but for `eval/*`, the run that does not; killed, it evaluates to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_rl.rollout.buffer import ReplayBuffer
from tests.resume.recipe import write_recipe
from tests.resume.runs import Zygote

ITERATIONS = 4
SETTINGS = (
    *("data.held_out=6", "training.optimizer.lr=1e-2"),
    *("rollout.kv_policy=keep", "rollout.max_kv_age=2", "rollout.embedded.page_size=4"),
)
EVALUATED = ("evaluation.every=2", "evaluation.samples=3", "evaluation.temperature=1")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("evaluation"), iterations=ITERATIONS)
    questions = [{"prompt": f"{a}-{a}=", "answer": ""} for a in range(5)]
    (path.parent / "minus.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return path


def run(zygote: Zygote, config: Path, name: str, *overrides: str, kill: str | None = None) -> Path:
    folder = config.parent / name
    code = zygote.run(config, folder, 3, *SETTINGS, *overrides, kill=kill)
    is_killed = kill is not None and "stop" not in kill
    assert code == (-9 if is_killed else 0), folder.with_suffix(".log").read_text()
    return folder


def evaluated(zygote: Zygote, config: Path, name: str, *overrides: str, kill: str | None = None) -> Path:
    sets = f"evaluation.sets=[held_out, {config.parent / 'minus.jsonl'}]"
    return run(zygote, config, name, *EVALUATED, sets, *overrides, kill=kill)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(folder: Path) -> dict[int, dict[str, Any]]:
    found = {row["iteration"]: {k: v for k, v in row.items() if k.startswith("eval/")} for row in rows_of(folder)}
    return {iteration: row for iteration, row in found.items() if row}


def training(folder: Path) -> tuple[dict[int, Any], list[dict[str, Any]], dict[str, np.ndarray]]:
    """Every trajectory drawn, the weights at the end, and metrics but those that time enters, or the engine's log-probs: their
    last bit depends on what was decoded together."""
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    found = {t.id: (t.token_ids.tolist(), t.weight_versions.tolist()) for t in buffer.trajectories(range(3 * buffer.num_drawn))}
    buffer.check()
    buffer.close()
    left_out = ("eval/", "time/", "memory/", "mismatch/", "drift/")
    rows = [{k: v for k, v in row.items() if not k.startswith(left_out) and not k.endswith("_s")} for row in rows_of(folder)]
    return found, [r for r in rows if len(r) > 2], load_file(folder / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, config: Path) -> Path:
    return evaluated(zygote, config, "evaluated")


def test_evaluation_changes_no_token_no_weight_and_no_kept_kv(zygote: Zygote, config: Path, undisturbed: Path) -> None:
    assert list(scores(undisturbed)) == [0, 2, 4], "before the first iteration, every second, and after the last"
    trajectories, rows, weights = training(undisturbed)
    plain_trajectories, plain_rows, plain_weights = training(run(zygote, config, "plain"))
    assert trajectories == plain_trajectories
    assert rows == plain_rows and sum("loss" in row for row in rows) >= 2
    assert all(np.array_equal(weights[name], value) for name, value in plain_weights.items())
    assert any(row["kv/restored_tokens"] > 0 for row in rows[1:])


def test_an_evaluation_has_scores_with_intervals_and_the_report_draws_them(undisturbed: Path) -> None:
    by_iteration = scores(undisturbed)
    kinds = [f"{score}{end}" for score in ("pass@1", "pass@2", "pass@3", "maj@3") for end in ("", "/low", "/high")]
    for row in by_iteration.values():
        assert set(row) == {f"eval/{name}/{key}" for name in ("held_out", "minus") for key in ("tokens", *kinds)}
        assert row["eval/minus/pass@1/low"] <= row["eval/minus/pass@1"] <= row["eval/minus/pass@1/high"]
    assert len({json.dumps(row) for row in by_iteration.values()}) > 1, "the weights have moved"
    markup = (undisturbed / "report.html").read_text()
    assert "Evaluation while training" in markup and markup.count('class="band') == 2
    assert f"{ITERATIONS} <em>of {ITERATIONS}</em>" in markup


def test_an_evaluation_told_to_stop_is_made_after_the_resume(zygote: Zygote, config: Path, undisturbed: Path) -> None:
    folder = evaluated(zygote, config, "stopped", kill="told to stop while evaluating")
    assert list(scores(folder)) == [0]
    evaluated(zygote, config, "stopped")
    assert scores(folder) == scores(undisturbed) and training(folder)[0] == training(undisturbed)[0]


def test_a_replayed_iteration_has_the_numbers_it_had(zygote: Zygote, config: Path) -> None:
    recompute = "rollout.kv_policy=recompute"  # after a kill, kept KV would not be what it was
    undisturbed = evaluated(zygote, config, "recompute", recompute)
    folder = evaluated(zygote, config, "killed", recompute, kill="generating")
    assert len(scores(folder)) < 3
    for _ in range(2):  # the second time a finished run is started again
        evaluated(zygote, config, "killed", recompute)
        assert scores(folder) == scores(undisturbed)
        assert [row["iteration"] for row in rows_of(folder)] == list(range(ITERATIONS + 1)), "none twice"
