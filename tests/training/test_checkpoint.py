from __future__ import annotations

import json
import multiprocessing.process
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.config import Config
from megatron_rl.errors import CheckpointError
from megatron_rl.training import checkpoint
from megatron_rl.training.trainer import Trainer
from tests.training.checkpoint_fates import fill_disk, save_and_die, start_again
from tests.training.material import flat, make_config, make_groups, make_model
from tests.zygote import Zygote

MakeTrainer = Callable[[Config], Trainer]


def step(trainer: Trainer) -> float:
    batch = trainer.distribute([flat(make_groups())])
    return trainer.step(batch, MirrorDescent(tau=0.1), None)["loss"]


def main_weights(trainer: Trainer) -> list[torch.Tensor]:
    return [trainer.optimizer.main_weight(p).clone() for chunk in trainer.chunks for p in chunk.parameters()]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_continues_exactly_where_the_saved_one_was(
    make_trainer: MakeTrainer, tmp_path: Path, dtype: str, distributed_optimizer: bool, reset: bool
) -> None:
    folder = make_model(tmp_path / "model", tied=distributed_optimizer)
    optimizer = {"lr": 1e-2, "eps": 1e-3, "reset": reset}
    config = make_config(folder, dtype=dtype, training={"distributed_optimizer": distributed_optimizer, "optimizer": optimizer})
    first = make_trainer(config)
    step(first)
    step(first)
    assert first.optimizer.num_steps == (0 if reset else 2)
    extra = {"version": 3, "sampler": {"drawn": [1, 2], "rates": {"a": 0.5}}}
    path = checkpoint.save(first, tmp_path, 1, extra, keep=2)
    second = make_trainer(config)
    assert checkpoint.load(second, path) == extra
    assert all(torch.equal(a, b) for a, b in zip(main_weights(first), main_weights(second), strict=True))
    if dtype == "bfloat16":
        weights = zip(first.chunks[0].parameters(), main_weights(first), strict=True)
        assert not all(torch.equal(p.float(), main) for p, main in weights), "main weights hold no more than the model's"
    assert [step(first), step(first)] == [step(second), step(second)]
    assert all(torch.equal(a, b) for a, b in zip(main_weights(first), main_weights(second), strict=True))


def test_the_newest_checkpoints_are_kept_and_the_highest_number_is_current(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(make_model(tmp_path / "model")))
    assert checkpoint.latest(tmp_path) is None
    for iteration in (8, 9, 10, 1_000_000):
        path = checkpoint.save(trainer, tmp_path, iteration, {}, keep=2)
        assert checkpoint.latest(tmp_path) == path
    assert names(tmp_path) == ["iteration_000010", "iteration_1000000"]
    before = path.stat().st_mtime_ns
    assert checkpoint.save(trainer, tmp_path, 1_000_000, {"other": 1}, keep=2) == path
    assert path.stat().st_mtime_ns == before
    assert (path / "hf" / "config.json").is_file()


def test_a_save_starts_no_process(make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise AssertionError("a writer process would import the main script again")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    trainer = make_trainer(make_config(make_model(tmp_path / "model")))
    assert checkpoint.load(trainer, checkpoint.save(trainer, tmp_path, 1, {"position": 1}, keep=1)) == {"position": 1}


def damage_state(path: Path) -> None:
    (path / "state.json").write_text('{"format"')


def newer(path: Path) -> None:
    (path / "state.json").write_text(json.dumps({"format": 2}))


def truncate(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_state, r"iteration_000001/state\.json: cannot read.*delete .*iteration_000001"),
        (newer, r"state\.json: format 2, this version reads 1; use a newer megatron_rl"),
        (truncate, "iteration_000001: cannot read"),
        (lambda path: (path / "metadata.json").unlink(), "iteration_000001: cannot read"),
        (lambda path: (path / ".metadata").unlink(), "iteration_000001: cannot read"),
        (lambda path: next(path.glob("*.distcp")).unlink(), "iteration_000001: cannot read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    make_trainer: MakeTrainer, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    trainer = make_trainer(make_config(make_model(tmp_path / "model", num_hidden_layers=1)))
    path = checkpoint.save(trainer, tmp_path, 1, {}, keep=1)
    harm(path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(trainer, path)


@pytest.mark.parametrize("shape", [{"intermediate_size": 64}, {"num_hidden_layers": 5}])
def test_a_checkpoint_of_another_model_is_refused(make_trainer: MakeTrainer, tmp_path: Path, shape: dict) -> None:
    path = checkpoint.save(make_trainer(make_config(make_model(tmp_path / "a"))), tmp_path, 1, {}, keep=1)
    other = make_trainer(make_config(make_model(tmp_path / "b", **shape)))
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(other, path)


# -- faults: each fork saves iteration 1, then meets its fate in iteration 2


@pytest.mark.parametrize(
    ("place", "current"),
    [
        ("before the weights", 1),
        ("after the weights", 1),
        ("before the commit", 1),
        ("within the commit", 1),
        ("after the commit", 2),
        ("while the old one is deleted", 2),
    ],
)
def test_a_save_killed_anywhere_leaves_one_whole_current_checkpoint(
    zygote: Zygote, tmp_path: Path, place: str, current: int
) -> None:
    folder, log = make_model(tmp_path / "model", num_hidden_layers=1), tmp_path / "log"
    assert zygote.run(save_and_die, folder, tmp_path, place, log=log) == -signal.SIGKILL, log.read_text()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == f"iteration_00000{current}"
    assert any(name.endswith(".partial") for name in names(tmp_path)) == (place != "after the commit")
    assert zygote.run(start_again, folder, tmp_path, current, log=log) == 0, log.read_text()
    assert names(tmp_path) == ["iteration_000003"]


def test_a_disk_that_fills_up_is_reported_and_the_old_checkpoint_stays(zygote: Zygote, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert zygote.run(fill_disk, make_model(tmp_path / "model"), tmp_path, log=log) == 0, log.read_text()


def test_a_disk_too_small_is_noticed_before_anything_is_written(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_config(make_model(tmp_path / "model")))
    checkpoint.save(trainer, tmp_path, 1, {}, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"iteration_000002: .*needs [\d,]+ bytes, the disk has 1,000 free"):
        checkpoint.save(trainer, tmp_path, 2, {}, keep=1)
    assert names(tmp_path) == ["iteration_000001"]
