"""kill -9 anywhere, start again with the same command: the run ends as if nothing had happened.

Each run is a fork of one process that has the imports behind it (`tests/zygote.py`). Phases end by exhaustion here
(`groups_per_iteration` is out of reach), so what a phase yields does not depend on timing and runs can be compared.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_rl.rollout.buffer import ReplayBuffer
from tests.resume.recipe import write_recipe
from tests.resume.runs import Zygote

KILL_POINTS = (
    "generating",
    "scoring",
    "reference",
    "in_backward",
    "after_optimizer_step",
    "publish",
    "checkpoint_write",
    "after_rename",
)
ITERATIONS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("resume"), iterations=ITERATIONS, ptx=True)


def outcome(folder: Path) -> dict[str, Any]:
    """All of a run that must not depend on whether it was killed."""
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    groups = [g for i in range(ITERATIONS) for g in (buffer.batch(i) or [])]
    trajectories = {
        t.id: (t.token_ids.tolist(), t.weight_versions.tolist(), t.outcome.reward if t.outcome else None)
        for g in [*groups, *buffer.open_groups(), *buffer.complete_groups()]
        for t in g.trajectories
    }
    batches = {i: [g.id for g in buffer.batch(i) or []] for i in range(ITERATIONS)}
    counts = buffer.counts()
    buffer.check()
    buffer.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {k: r[k] for k in ("iteration", "weight_version", "reward/mean", "tokens/trained", "loss")} for r in rows if "loss" in r
    ]
    weights = {k: v for f in sorted((folder / "hf").glob("*.safetensors")) for k, v in load_file(f).items()}
    return {"trajectories": trajectories, "batches": batches, "counts": counts, "metrics": metrics, "weights": weights}


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, config: Path) -> dict[str, Any]:
    folder = config.parent / "undisturbed"
    assert zygote.run(config, folder, 3) == 0, folder.with_suffix(".log").read_text()
    result = outcome(folder)
    assert len(result["metrics"]) >= 3, "the recipe must train in most iterations for the comparison to mean something"
    assert any(len(set(versions)) > 1 for _, versions, _ in result["trajectories"].values()), "no partial rollout happened"
    return result


@pytest.mark.parametrize("checkpoint_every", [1, 3])
@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_run_ends_like_an_undisturbed_one(
    point: str, checkpoint_every: int, zygote: Zygote, config: Path, undisturbed: dict[str, Any]
) -> None:
    folder = config.parent / f"{point}_{checkpoint_every}"
    assert zygote.run(config, folder, checkpoint_every, kill=point) == -9, folder.with_suffix(".log").read_text()
    assert zygote.run(config, folder, checkpoint_every) == 0, folder.with_suffix(".log").read_text()
    result = outcome(folder)
    for key in ("trajectories", "batches", "counts", "metrics"):
        assert result[key] == undisturbed[key], key
    assert result["weights"].keys() == undisturbed["weights"].keys()
    for name, tensor in result["weights"].items():
        np.testing.assert_array_equal(tensor, undisturbed["weights"][name], err_msg=name)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint_and_names_the_batch(
    zygote: Zygote, config: Path, undisturbed: dict[str, Any]
) -> None:
    folder = config.parent / "not_finite"
    assert zygote.run(config, folder, 3, kill="a loss that is not finite") == 1
    said = folder.with_suffix(".log").read_text()
    assert "iteration 4: training: the loss is not finite" in said and "id -n is the n-th conversation" in said
    assert "The checkpoint before iteration 3 is the last" in said
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    batch = {t.id for g in buffer.batch(4) or [] for t in g.trajectories}
    buffer.close()
    named = {int(i) for i in re.findall(r"micro-batches of trajectories \[([^\]]*)\]", said)[0].split(", ")}
    assert {i for i in named if i >= 0} and {i for i in named if i >= 0} <= batch
    assert zygote.run(config, folder, 3) == 0, folder.with_suffix(".log").read_text()
    result = outcome(folder)
    for name, tensor in result["weights"].items():
        np.testing.assert_array_equal(tensor, undisturbed["weights"][name], err_msg=name)


def test_what_is_trained_again_is_not_trained_beside_other_conversations(zygote: Zygote, config: Path) -> None:
    folder, other = config.parent / "ptx", config.parent / "other.jsonl"
    other.write_text((config.parent / "given.jsonl").read_text().replace("yz", "zy"))
    assert zygote.run(config, folder, 3, kill="after_optimizer_step") == -9, folder.with_suffix(".log").read_text()
    assert zygote.run(config, folder, 3, f"algorithm.ptx.path={other}") == 1
    assert f"algorithm.ptx.path={other}, tokens=8: gives other conversations" in folder.with_suffix(".log").read_text()
