"""What lives as long as a run, on every rank: process groups, trainer, engine, orders; on rank 0 the master.

`open_run` builds it in the order in which mistakes are cheap: settings, model shape, prompts and rewards, then the model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from megatron_rl.algorithms import make_algorithm
from megatron_rl.algorithms.objective import Objective
from megatron_rl.config import Config, check_model, check_world
from megatron_rl.errors import EngineError, TrainingError
from megatron_rl.master import Master
from megatron_rl.model_config import ModelConfig
from megatron_rl.orders import Orders
from megatron_rl.run_folder import open_folder
from megatron_rl.serving import EmbeddedServing, Serving
from megatron_rl.serving_sglang import SGLangServing
from megatron_rl.shutdown import Shutdown
from megatron_rl.training import checkpoint, parallel
from megatron_rl.training.phase_memory import PhaseMemory
from megatron_rl.training.trainer import Reference, Trainer, TrainingBatch
from megatron_rl.weights.folder import write_model_folder

log = logging.getLogger(__name__)


class Run:
    """State of the loop. `iteration` is the next one to do, `version` the weights the engines hold."""

    def __init__(self, config: Config, trainer: Trainer, serving: Serving, orders: Orders, master: Master | None) -> None:
        self.config, self.trainer, self.serving, self.orders, self.master = config, trainer, serving, orders, master
        self.objective: Objective = make_algorithm(config.algorithm).objective
        self.iteration = self.version = self.saved_iteration = 0
        self.shutdown = Shutdown(config.run.shutdown_s, master.stop if master else _nothing)

    @property
    def is_over(self) -> bool:
        return self.iteration >= self.config.run.iterations

    def resume(self) -> dict[str, Any]:
        """Load the newest checkpoint, else the model folder. Returns what was saved beside the weights, for the master."""
        newest = checkpoint.latest(self.config.run.folder)
        if newest is None:
            self.trainer.load_hf(self.config.model.folder)
            return {}
        extra = checkpoint.load(self.trainer, newest)
        self.iteration = self.saved_iteration = extra["iteration"]
        self.version = extra["version"]
        log.info("resuming from %s: iteration %d, weight version %d", newest, self.iteration, self.version)
        return extra

    def step(self, batch: TrainingBatch, reference: Reference | None) -> dict[str, float]:
        """All optimizer steps of the iteration. Raises TrainingError, on every rank, where a loss or gradient is not finite; the
        checkpoints there are stay."""
        try:
            return self.trainer.step(batch, self.objective, reference, epochs=self.config.training.epochs)
        except TrainingError as e:
            given = "; id -n is the n-th conversation of algorithm.ptx.path" if any(i < 0 for i in e.trajectory_ids) else ""
            raise TrainingError(
                f"iteration {self.iteration}: {e}{given}. The checkpoint before iteration {self.saved_iteration} is the last; "
                "the same command goes on from it and trains the recorded batches again",
                trajectory_ids=e.trajectory_ids,
            ) from e

    def publish(self, version: int) -> None:
        """Give the trainer's weights to every engine. Collective; no request runs anywhere meanwhile."""
        self.serving.load_weights(partial(self.trainer.export_buckets, self.config.weights.bucket_bytes), version)
        self.version = version

    def save(self) -> None:
        """Checkpoint at an iteration boundary: a position in the buffer's log. Collective."""
        extra = {"iteration": self.iteration, "version": self.version, **(self.master.state() if self.master else {})}
        keep = self.config.run.keep_checkpoints
        with self.serving.readable_weights():
            checkpoint.save(self.trainer, self.config.run.folder, self.iteration, extra, keep=keep)
        self.saved_iteration = self.iteration

    def check_mismatch(self, stats: dict[str, float]) -> None:
        """Engine and trainer must agree on tokens sampled from the very weights the trainer held."""
        found, bound = stats["mismatch/logp_abs_mean"], self.config.weights.mismatch_bound
        if found > bound:
            raise EngineError(
                f"mismatch/logp_abs_mean={found:.4f} at iteration {self.iteration} is above weights.mismatch_bound={bound}: the "
                "engines do not hold the trainer's weights, or compute them differently; "
                "see `megatron-rl doctor`, and export the checkpoint to compare"
            )

    def finish(self) -> None:
        """After the last iteration the model is exported; always the report and, if unfinished, the command that resumes."""
        self.serving.leave_kv(for_next_start=not self.is_over)
        if self.is_over:
            with self.serving.readable_weights():
                write_model_folder(
                    self.trainer.export_buckets(self.config.weights.bucket_bytes),
                    self.config.run.folder / "hf",
                    source=self.config.model.folder,
                    write=self.master is not None,
                )
        if self.master:
            self.master.finish(is_over=self.is_over, iteration=self.iteration)


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Build everything, resume if there is something to resume, publish the weights; close all on the way out."""
    make_algorithm(config.algorithm)  # values that it cannot use are said before a process group is there
    model = ModelConfig.from_folder(config.model.folder)
    check_model(config, model)
    ranks = parallel.initialize(config)
    check_world(config, ranks.world_size)
    if ranks.rank:
        logging.getLogger().setLevel(logging.WARNING)  # what all ranks would say, rank 0 says
    with ExitStack() as stack:
        stack.callback(parallel.shutdown)
        runner = stack.enter_context(asyncio.Runner())
        master, identity = parallel.on_rank_0(partial(_open_master, config, model, runner, stack)) or (None, "")
        trainer = Trainer(config, model)
        serving = _open_serving(config, model, ranks, runner, trainer, identity)
        stack.callback(serving.close)
        wait_s = config.rollout.phase_timeout_s * (2 if config.evaluation.every else 1)  # an evaluation is a phase of its own
        orders = Orders(ranks.rank, ranks.world_size, host=ranks.master_host, timeout_s=wait_s)
        run = Run(config, trainer, serving, orders, master)
        stack.callback(run.shutdown.close)
        state = run.resume()
        run.publish(run.version)
        if master:
            master.start(serving.engines, iteration=run.iteration, state=state)
        yield run


def _open_master(config: Config, model: ModelConfig, runner: asyncio.Runner, stack: ExitStack) -> tuple[Master, str]:
    """And what kept KV is bound to."""
    master = Master(config, model, open_folder(config), runner)
    stack.callback(master.close)
    checkpoint.remove_leftovers(config.run.folder)
    return master, master.begin_lineage(checkpoint.latest_iteration(config.run.folder))


def _open_serving(
    config: Config, model: ModelConfig, ranks: parallel.Launch, runner: asyncio.Runner, trainer: Trainer, identity: str
) -> Serving:
    if config.rollout.engine == "embedded":
        return EmbeddedServing(config, model, ranks, runner, identity=identity)
    export = partial(trainer.export_buckets, config.weights.bucket_bytes) if ranks.world_size == 1 else None
    shares = config.rollout.sglang.takes_turns and not config.rollout.sglang.urls
    memory = PhaseMemory(trainer.chunks, trainer.optimizer) if shares else None
    return SGLangServing(config, model, ranks, runner, export=export, memory=memory)


def _nothing() -> None:
    """Other ranks act on rank 0's orders; the signal only starts their deadline."""
