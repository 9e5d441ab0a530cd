"""One rank's process group and parallel state for each test that asks for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import parallel
from megatron_rl.training.trainer import Trainer


@pytest.fixture
def make_trainer() -> Iterator[Callable[[Config], Trainer]]:
    """Builds trainers with the weights of `model.folder`, one after the other; leaves the process group afterwards."""
    started = []

    def make(config: Config) -> Trainer:
        if not started:
            started.append(parallel.initialize(config))
        trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
        trainer.load_hf(Path(config.model.folder))
        return trainer

    yield make
    if started:
        parallel.shutdown()
