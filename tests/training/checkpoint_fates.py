"""What may happen to a process that saves a checkpoint; `test_checkpoint.py` runs each in a fork of the zygote."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

from megatron_rl.errors import CheckpointError
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import checkpoint, parallel
from megatron_rl.training.trainer import Trainer
from megatron_rl.weights import atomic, sharded
from tests.training.material import make_config

# (where the function is looked up, its name, whether it still does its work)
PLACES: dict[str, tuple[Any, str, bool]] = {
    "before the weights": (sharded.torch_checkpoint, "save", False),
    "after the weights": (sharded.torch_checkpoint, "save", True),
    "before the commit": (atomic, "commit", False),
    "within the commit": (atomic, "_sync", True),
    "after the commit": (atomic, "discard", False),
    "while the old one is deleted": (atomic.shutil, "rmtree", False),
}


def start(folder: str) -> Trainer:
    config = make_config(Path(folder))
    parallel.initialize(config)
    trainer = Trainer(config, ModelConfig.from_folder(folder))
    trainer.load_hf(folder)
    return trainer


def save_and_die(folder: str, run: str, place: str) -> None:
    trainer = start(folder)
    checkpoint.save(trainer, Path(run), 1, {"iteration": 1}, keep=1)
    owner, name, works = PLACES[place]
    original = getattr(owner, name)

    def die(*args: Any, **kwargs: Any) -> None:
        if works:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)
    checkpoint.save(trainer, Path(run), 2, {"iteration": 2}, keep=1)


def start_again(folder: str, run: str, current: int) -> None:
    trainer = start(folder)
    newest = checkpoint.latest(Path(run))
    assert newest is not None
    checkpoint.remove_leftovers(Path(run))
    assert all(path.name.startswith("iteration_") for path in newest.parent.iterdir())
    assert checkpoint.load(trainer, newest) == {"iteration": current}
    checkpoint.save(trainer, Path(run), 3, {}, keep=1)


def fill_disk(folder: str, run: str) -> None:
    trainer = start(folder)
    first = checkpoint.save(trainer, Path(run), 1, {"iteration": 1}, keep=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # no file may grow beyond: writes fail as on a full disk
    try:
        checkpoint.save(trainer, Path(run), 2, {"iteration": 2}, keep=1)
    except CheckpointError as e:
        message = str(e)
    assert "iteration_000002: the checkpoint could not be written" in message and "File too large" in message, message
    assert f"needs {sharded.num_bytes(trainer.model_config):,} bytes" in message and "free" in message, message
    assert list(first.parent.iterdir()) == [first]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    checkpoint.load(trainer, checkpoint.save(trainer, Path(run), 2, {"iteration": 2}, keep=1))
