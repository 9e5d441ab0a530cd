"""Engines with the weights of a model folder, of whichever kind `rollout.engine` says; no trainer, no publishing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_rl.answering import folder_engine
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.serving_sglang import SGLangServing
from megatron_rl.training.parallel import Launch


@contextmanager
def folder_engines(config: Config, folder: Path, runner: asyncio.Runner, *, name: str) -> Iterator[Sequence[Engine]]:
    """Closed on the way out. Raises DataError for a folder that cannot be used, EngineError for a server that does not start,
    ConfigError for servers that run already: what they hold is unknown."""
    if config.rollout.engine == "embedded":
        engine = folder_engine(config, folder, name)
        try:
            yield [engine]
        finally:
            runner.run(engine.close())
        return
    if config.rollout.sglang.urls:
        raise ConfigError(
            f"rollout.sglang.urls={list(config.rollout.sglang.urls)}: a server that runs already may hold other weights than "
            f"{folder}; leave the setting out, and servers are started with that folder"
        )
    served = config.model_copy(update={"model": config.model.model_copy(update={"folder": folder})})
    (config.run.folder / "log").mkdir(parents=True, exist_ok=True)
    launch = Launch(0, 1, 0, local_world_size=0, master_host="127.0.0.1")  # no trainer has a GPU here
    serving = SGLangServing(served, ModelConfig.from_folder(folder), launch, runner, export=None, memory=None)
    try:
        serving.adopt_folder()
        yield serving.engines
    finally:
        serving.close()
