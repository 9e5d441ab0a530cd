"""The sampling temperature falls over a run, and the trainer's log-probs follow it token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.temperature import temperature
from tests.resume.recipe import write_recipe
from tests.resume.runs import Zygote


@pytest.mark.parametrize(
    ("end", "expected"), [(None, [1.6, 1.6, 1.6, 1.6]), (0.4, [1.6, 1.3, 0.4, 0.4]), (2.0, [1.6, 1.7, 2, 2])]
)
def test_the_decay_is_linear_and_stays_at_its_end(end: float | None, expected: list[float]) -> None:
    lengths = {"groups_per_iteration": 1, "token_budget": 8, "max_response_tokens": 8}
    config = RolloutConfig(temperature=1.6, temperature_decay={"end": end, "iterations": 4}, **lengths)
    assert [temperature(config, i) for i in (0, 1, 4, 9)] == pytest.approx(expected)


def test_engine_and_trainer_agree_on_trajectories_of_several_temperatures(zygote: Zygote, tmp_path: Path) -> None:
    """The weights stand still, so a log-prob can differ only by the temperature it is computed at."""
    decay = ("rollout.temperature=1.6", "rollout.temperature_decay={end: 0.4, iterations: 4}", "training.optimizer.lr=1e-12")
    code = zygote.run(write_recipe(tmp_path, iterations=4), tmp_path / "run", 3, *decay)
    assert code == 0, (tmp_path / "run.log").read_text()
    buffer = ReplayBuffer(tmp_path / "run" / "buffer.sqlite", read_only=True)
    trajectories = [t for i in range(4) for group in buffer.batch(i) or [] for t in group.trajectories]
    buffer.close()
    for segment in (s for t in trajectories for s in t.segments):
        assert segment.temperature == pytest.approx(1.6 - 0.3 * segment.iteration)
    assert sum(len(set(t.temperatures.tolist())) > 1 for t in trajectories) >= 5
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert len(trained) >= 2
    assert all(row["mismatch/logp_abs_mean"] < 1e-4 and row["drift/logp_abs_mean"] < 1e-4 for row in trained)
    assert all(row["log_ratio/abs_mean"] < 1e-4 for row in trained)
