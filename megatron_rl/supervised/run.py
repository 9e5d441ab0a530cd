"""A supervised run: every optimizer step of its course, checkpoints with moments, metrics, report, exported model.

All ranks run `train` together; rank 0 alone reads the data and tells the others what comes next. A run killed anywhere goes on
from its last checkpoint with the step it would have done next, and ends with the same weights. Refuses to go on with data or
settings other than those it began with. Folder: as of any run (`run_folder.py`), without a replay buffer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from megatron_rl.algorithms.objective import Objective
from megatron_rl.config import SupervisedConfig, check_supervised_model
from megatron_rl.errors import DataError, TrainingError
from megatron_rl.model_config import ModelConfig
from megatron_rl.report.metrics import MetricsLog
from megatron_rl.report.supervised import write_course, write_supervised_report
from megatron_rl.run_folder import open_folder
from megatron_rl.shutdown import Shutdown
from megatron_rl.supervised.course import Course
from megatron_rl.training import checkpoint, parallel
from megatron_rl.training.trainer import Reference, Trainer, TrainingBatch
from megatron_rl.weights.folder import write_model_folder

log = logging.getLogger(__name__)

_OF_SAMPLES = ("mismatch/", "drift/", "entropy/", "supervised/")  # metrics that say nothing here, or the loss once more


@dataclass(frozen=True)
class Method:
    """What tells one kind of supervised run from another."""

    objective: Objective
    load: Callable[[ModelConfig], Course]  # called on rank 0
    needs_reference: bool = False  # log-probs of the model as it was before the run
    whole_groups: bool = False


@dataclass(frozen=True)
class Order:
    """What all ranks do next."""

    step: int
    lr: float = 0.0
    save: bool = False  # after the step
    stop: bool = False  # instead of it


def train(config: SupervisedConfig, method: Method) -> int:
    """Train to the course's end, or to a SIGTERM. Collective; returns the exit code."""
    with _open(config, method) as run:
        while not (order := run.next()).stop:
            run.train(order)
            if order.save:
                run.save()
        run.finish()
    return 0


class Run:
    """State of the loop: `step` is the next one to do."""

    def __init__(self, config: SupervisedConfig, method: Method, trainer: Trainer, course: Course | None) -> None:
        self.config, self.method, self.trainer, self.course = config, method, trainer, course
        told = (len(course.steps), course.digest) if course else None
        self.num_steps, self._digest = trainer.messages.share(told)
        self.step = self.saved = 0
        self.references: dict[int, Reference] = {}
        self.shutdown = Shutdown(config.run.shutdown_s, lambda: None)
        self.metrics = MetricsLog(config.run.folder, config.report.tensorboard) if course else None

    def resume(self) -> None:
        """The model folder's weights; from them the reference of every step to come; then the newest checkpoint, if any."""
        newest = checkpoint.latest(self.config.run.folder)
        if newest is not None:
            extra = checkpoint.read_extra(newest)
            if extra["digest"] != self._digest:
                raise DataError(
                    f"{self.config.run.folder}: the run began with other data than its data file holds now; restore the file, "
                    "or give the new run another run.folder"
                )
            self.step = self.saved = extra["step"]
        if newest is None or self.method.needs_reference:
            self.trainer.load_hf(self.config.model.folder)
        if self.method.needs_reference:
            self.references = {step: self.trainer.log_probs(self._batch(step)) for step in range(self.step, self.num_steps)}
        if newest is not None:
            checkpoint.load(self.trainer, newest)
            log.info("resuming from %s: step %d of %d", newest, self.step, self.num_steps)
        if self.metrics:
            self.metrics.cut_back(self.step)

    def next(self) -> Order:
        """Collective: decided by rank 0 alone."""
        order = None
        if self.course:
            stop = self.step >= self.num_steps or self.shutdown.requested
            lr = 0.0 if stop else self.course.steps[self.step].lr
            order = Order(self.step, lr, save=(self.step + 1) % self.config.run.checkpoint_every == 0, stop=stop)
        return self.trainer.messages.share(order)

    def train(self, order: Order) -> None:
        """One optimizer step. Raises TrainingError, naming its examples, where its loss or gradient is not finite."""
        start = time.perf_counter()
        batch = self._batch(order.step)
        self.trainer.optimizer.set_lr(order.lr)
        try:
            stats = self.trainer.step(batch, self.method.objective, self.references.pop(order.step, None))
        except TrainingError as e:
            raise TrainingError(self._at_fault(order.step, e), trajectory_ids=e.trajectory_ids) from e
        self.step += 1
        if self.course and self.metrics:
            step = self.course.steps[order.step]
            idle = _OF_SAMPLES if self.method.needs_reference else (*_OF_SAMPLES, "log_ratio/")
            kept = {key: value for key, value in stats.items() if not key.startswith(idle)}
            place = {"stage": step.stage, "epoch": step.epoch, "lr": order.lr}
            seconds = time.perf_counter() - start
            self.metrics.write({"iteration": order.step, **place, **kept, "time/train_s": seconds})
            log.info(
                "step %d/%d, loss %.4f, lr %.3g, %.0f tokens/s",
                *(self.step, self.num_steps, stats["loss"], order.lr, stats["tokens/packed"] / seconds),
            )

    def save(self) -> None:
        extra = {"step": self.step, "digest": self._digest}
        checkpoint.save(self.trainer, self.config.run.folder, self.step, extra, keep=self.config.run.keep_checkpoints)
        self.saved = self.step

    def finish(self) -> None:
        """The last checkpoint; after the last step the model too; the report."""
        folder = self.config.run.folder
        if self.step > self.saved:
            self.save()
        is_over = self.step >= self.num_steps
        if is_over:
            buckets = self.trainer.export_buckets(self.config.weights.bucket_bytes)
            write_model_folder(buckets, folder / "hf", source=self.config.model.folder, write=self.course is not None)
        if self.course:
            report = write_supervised_report(folder)
            if is_over:
                log.info("finished: model in %s, report in %s", folder / "hf", report)
            else:
                log.info("stopped after step %d of %d; the same command goes on there", self.step, self.num_steps)

    def close(self) -> None:
        self.shutdown.close()
        if self.metrics:
            self.metrics.close()

    def _batch(self, step: int) -> TrainingBatch:
        minibatches = [self.course.sequences(step)] if self.course else None
        return self.trainer.distribute(minibatches, 0, whole_groups=self.method.whole_groups)

    def _at_fault(self, step: int, error: TrainingError) -> str:
        places = ", ".join(self.course.places(error.trajectory_ids)) if self.course else "rank 0 names them"
        return (
            f"step {step + 1} of {self.num_steps}: the loss or its gradient is not finite; no step was taken, and the last "
            f"checkpoint is that after step {self.saved}. Examples of the micro-batches at fault: {places}. Correct or remove "
            "them, lower the learning rate, or train with model.dtype=float32"
        )


def _open_course(config: SupervisedConfig, method: Method, model: ModelConfig) -> Course:
    course = method.load(model)
    open_folder(config)
    write_course(config.run.folder, course.facts)
    checkpoint.remove_leftovers(config.run.folder)
    return course


@contextmanager
def _open(config: SupervisedConfig, method: Method) -> Iterator[Run]:
    """In the order in which mistakes are cheap: settings, model shape, data, then the model."""
    model = ModelConfig.from_folder(config.model.folder)
    check_supervised_model(config, model)
    ranks = parallel.initialize(config)
    if ranks.rank:
        logging.getLogger().setLevel(logging.WARNING)  # what all ranks would say, rank 0 says
    with ExitStack() as stack:
        stack.callback(parallel.shutdown)
        course = parallel.on_rank_0(partial(_open_course, config, method, model))
        run = Run(config, method, Trainer(config, model), course)
        stack.callback(run.close)
        run.resume()
        yield run
