"""The k1.5 iteration: roll out, score, take advantages, train, publish. Read it beside figure 3 of the paper.

All ranks run this loop together. Rank 0 is also the master (`master.py`): it conducts the rollout phase while the others
wait for its order (`orders.py`) and serve their engines. What lives as long as the run is built in `run.py`.

Consistency: the batch is recorded in the buffer before its step, so a run killed anywhere continues from its last
checkpoint by training the recorded batches again, in order, without generating anything twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeVar

from megatron_rl.config import Config
from megatron_rl.errors import EngineLostError
from megatron_rl.orders import Order
from megatron_rl.run import Run, open_run
from megatron_rl.training.cpu import return_freed_memory
from megatron_rl.types import Group

log = logging.getLogger(__name__)

T = TypeVar("T")


def train(config: Config) -> int:
    """Run to `run.iterations`, or to a SIGTERM. Returns the exit code."""
    with open_run(config) as run:
        while True:
            seconds: dict[str, float] = {}
            scores = _evaluate(run, seconds)
            groups = _roll_out(run, seconds)
            order = _order(run, groups)
            if order.stop:
                break
            stats = scores | (_train(run, groups, seconds) if order.train else {})
            run.iteration += 1
            if run.master:
                run.master.report_iteration(order.iteration, run.version, groups, stats, seconds)
            if order.save:
                run.save()
        if run.master and run.is_over and scores:
            run.master.report_last_evaluation(run.iteration, run.version, scores)
        if run.iteration > run.saved_iteration:
            run.save()
        run.finish()
    return 0


def _evaluate(run: Run, seconds: dict[str, float]) -> dict[str, float]:
    """Rank 0: the weights at hand on fixed sets of prompts, where this iteration is one before which that is due."""
    if run.master is None or run.shutdown.requested or not run.master.evaluates(run.iteration):
        return {}
    with _timed(run, seconds, "evaluation"):
        return _with_all_engines(run, run.master.evaluate)


def _roll_out(run: Run, seconds: dict[str, float]) -> list[Group]:
    """Rank 0: unfinished trajectories first, then fresh prompts, until the phase ends; scored meanwhile."""
    if run.master is None or run.is_over or run.shutdown.requested:
        return []
    with _timed(run, seconds, "rollout"):
        return _with_all_engines(run, partial(run.master.batch, run.iteration, run.version))


def _with_all_engines(run: Run, phase: Callable[[], T]) -> T:
    """Rank 0: the phase, again for as long as an engine is lost in it that all ranks together bring back."""
    while True:
        try:
            return phase()
        except EngineLostError as e:
            log.warning("iteration %d is interrupted: %s", run.iteration, e)
            run.orders.give(Order(run.iteration, mend=True))
            run.mend()


def _order(run: Run, groups: list[Group]) -> Order:
    """What all ranks do next; decided by rank 0 alone."""
    if run.master is None:
        while (order := run.orders.take()).mend:
            run.mend()
        return order
    if run.is_over or run.shutdown.requested:
        return run.orders.give(Order(run.iteration, stop=True))
    save = (run.iteration + 1) % run.config.run.checkpoint_every == 0
    return run.orders.give(Order(run.iteration, train=bool(groups), save=save))


def _train(run: Run, groups: list[Group], seconds: dict[str, float]) -> dict[str, float]:
    """The training phase: reference = weights at its start, optimizer state reset, new weights to the engines."""
    master, trainer = run.master, run.trainer
    run.serving.release()
    return_freed_memory()
    sequences = master.sequences(groups, run.iteration, run.version) if master else None
    batch = trainer.distribute(sequences, run.version)
    reference = None
    if run.config.steps_per_iteration > 1:  # with one step the log-ratio is zero, see paper 2.3.2
        with _timed(run, seconds, "reference"):
            reference = trainer.log_probs(batch)
    with _timed(run, seconds, "train"):
        stats = run.step(batch, reference)
    return_freed_memory()
    run.check_mismatch(stats)
    with _timed(run, seconds, "publish"):
        run.publish(run.version + 1)
    turns = run.serving.phase_seconds
    seconds["publish"] -= turns.get("offload", 0.0) + turns.get("resume", 0.0)  # these take place inside it
    seconds |= turns
    if master:
        master.observe(groups)
    return stats | run.serving.phase_memory


@contextmanager
def _timed(run: Run, seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    with run.master.phase(phase) if run.master else nullcontext():
        yield
    seconds[phase] = time.perf_counter() - start
