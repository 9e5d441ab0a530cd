"""Rank 0's side of the loop: prompts, engines, rewards and the replay buffer. The only conductor.

It owns the event loop in which engines and reward workers are awaited, and everything that is written: buffer, metrics,
report. It knows nothing of Megatron.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from megatron_rl.algorithms import make_algorithm
from megatron_rl.algorithms.silence import silent_without_advantage
from megatron_rl.config import Config
from megatron_rl.data.samplers import make_sampler
from megatron_rl.data.sources import load_prompts
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.file_system import network_advice
from megatron_rl.interval_evaluation import IntervalEvaluation
from megatron_rl.model_config import ModelConfig
from megatron_rl.report.html import write_report
from megatron_rl.report.metrics import MetricsLog
from megatron_rl.report.progress import Progress
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rewards.shaping import Shaping
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.rollout.kept_kv import KeptKV
from megatron_rl.rollout.scheduler import Rollout
from megatron_rl.rollout.selection import share_without_loss, training_sequences, with_advantage
from megatron_rl.supervised.ptx import PTX
from megatron_rl.types import Group, OutcomeKind, TrainingSequence

log = logging.getLogger(__name__)


class Master:
    """Built in two steps, so that bad prompts or rewards are said before a model is loaded: `__init__`, then `start`."""

    def __init__(self, config: Config, model: ModelConfig, run_id: str, runner: asyncio.Runner) -> None:
        self.config, self.model, self.runner = config, model, runner
        self.tokenizer = ChatTokenizer.from_folder(config.model.folder)
        self.prompts = load_prompts(config.data, self.tokenizer, terms=config.rewards.names)
        self.scorer = Scorer(config.rewards, config.rollout.repetition.penalty)
        self.evaluation: IntervalEvaluation | None = None
        if config.evaluation.every:
            self.evaluation = IntervalEvaluation(config, self.tokenizer, self.prompts, self.scorer)
        self.shaping = Shaping(config.rewards)
        self.algorithm = make_algorithm(config.algorithm)
        self._leaves_out = config.steps_per_iteration == 1 and silent_without_advantage(self.algorithm.objective)
        self.ptx = PTX(config, self.tokenizer, model) if config.algorithm.ptx.weight else None
        self.sampler = make_sampler(
            config.sampler, self.prompts.train, config.run.seed, batch=config.rollout.groups_per_iteration
        )
        self.buffer = ReplayBuffer(config.buffer_path, run_id=run_id)
        self.metrics = MetricsLog(config.run.folder, config.report.tensorboard)
        self.progress = Progress(config.run.iterations)
        self.rollout: Rollout | None = None
        self.kept_kv: KeptKV | None = None
        self.stopping = False
        self._shaped_reward = 0.0  # mean over the last batch, as the advantages saw it
        if advice := network_advice(config.buffer_path):
            log.warning("%s", advice)

    def begin_lineage(self, iteration: int) -> str:
        """Before any engine is made, for a run that goes on from `iteration`: run and lineage, what kept KV is bound to.

        Raises DataError where recorded batches would be trained again beside other conversations (`algorithm.ptx`)."""
        last = self.buffer.last_batch_iteration()
        replays = last is not None and last >= iteration
        if self.ptx:
            self.ptx.bind(self.config.run.folder, replays=replays)
        if replays:
            log.info("iterations %d to %d are trained again from their recorded batches", iteration, last)
            if torch.cuda.is_available():  # there a replay is close, not bit-exact: tokens of both lines must be told apart
                self.buffer.bump_lineage()
        return f"run {self.buffer.run_id}, lineage {self.buffer.lineage}"

    def start(self, engines: Sequence[Engine], *, iteration: int, state: dict[str, Any]) -> None:
        """Continue from `iteration` with what `state` told: metrics are cut back to it, draws go on where the buffer ends."""
        config = self.config
        self.sampler.restore(state.get("sampler") or {}, self.buffer.num_drawn)
        self.shaping.restore(state.get("shaping") or {})
        self.metrics.cut_back(iteration)
        self.progress.start_at(iteration)
        self.rollout = Rollout(self.buffer, engines, self.sampler, self.scorer, self.tokenizer, config, self.model)
        self.rollout.on_tokens = self._show_tokens
        if config.rollout.kv_policy == "keep":
            self.kept_kv = KeptKV(engines)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the conductor, as JSON."""
        return {"sampler": self.sampler.state(), "shaping": self.shaping.state()}

    def evaluates(self, iteration: int) -> bool:
        """Whether the weights before this iteration are evaluated; after the last one, `iteration` is their number."""
        return self.evaluation is not None and self.evaluation.is_due(iteration)

    def evaluate(self) -> dict[str, float]:
        """`eval/*` of the weights that the engines hold; {} when told to stop."""
        assert self.evaluation is not None and self.rollout is not None, "`start` comes first"
        return self.runner.run(self.evaluation.run(self.rollout.engines))

    def batch(self, iteration: int, version: int) -> list[Group]:
        """The batch of an iteration: the recorded one where there is one, else what a rollout phase yields.

        Recorded before it is trained on. An iteration before the last recorded batch that recorded none trained none."""
        recorded = self.buffer.batch(iteration)
        last = self.buffer.last_batch_iteration()
        if recorded is not None:
            return recorded
        if last is not None and iteration < last:
            return []
        assert self.rollout is not None, "`start` comes first"
        self.sampler.begin(iteration)
        if self.kept_kv:
            self.runner.run(self.kept_kv.bring_back(self.buffer.open_groups()))
        groups = self.runner.run(self.rollout.run(iteration, version))
        if groups and not self.stopping:
            self.buffer.record_batch(iteration, [group.id for group in groups])
        if self.kept_kv:
            self.runner.run(self.kept_kv.put_away(self.buffer.open_groups()))
        return groups

    def sequences(self, groups: list[Group], iteration: int, version: int) -> list[list[TrainingSequence]]:
        """Shaped rewards and advantages over whole groups, then one list of sequences for each optimizer step of one epoch.

        Sequences that cannot move the weights are left out: in an iteration of one step, those without an advantage."""
        algorithm, training = self.config.algorithm, self.config.training
        rewards = torch.tensor([r for g in groups for r in self.shaping.rewards(g, iteration)], dtype=torch.float32)
        self._shaped_reward = float(rewards.mean())
        group_ids = torch.tensor([g.id for g in groups for _ in g.trajectories])
        values = self.algorithm.advantages(rewards, group_ids).tolist()
        minibatches, start = [], 0
        for part in np.array_split(np.arange(len(groups)), min(training.minibatches, len(groups))):
            members = [groups[i] for i in part]
            count = sum(len(g.trajectories) for g in members)
            part_values, start = values[start : start + count], start + count
            sequences = training_sequences(
                members,
                part_values,
                loss_segments=algorithm.loss_segments,
                weight_version=version,
                normalization=self.algorithm.normalization,
                max_tokens=self.config.rollout.max_response_tokens,
            )
            if empty := share_without_loss(sequences):
                log.warning(
                    "algorithm.loss_segments=%s leaves %.0f %% of the trajectories without loss",
                    algorithm.loss_segments,
                    100 * empty,
                )
            minibatches.append(with_advantage(sequences) if self._leaves_out else sequences)
        if self.ptx:
            minibatches = [[*own, *self.ptx.draw(iteration, step)] for step, own in enumerate(minibatches)]
        return minibatches

    def observe(self, groups: list[Group]) -> None:
        """For samplers and shaping; in the order of the batches, so that a replay repeats it."""
        for group in groups:
            self.shaping.observe(group)
            self.sampler.observe(group.prompt.id, [bool(t.outcome and t.outcome.correct) for t in group.trajectories])

    def report_iteration(
        self, iteration: int, version: int, groups: list[Group], stats: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """One row of metrics; see `iteration_row`."""
        row = {
            **iteration_row(iteration, version, groups),
            **({"reward/shaped": self._shaped_reward} if groups else {}),
            "tokens/generated": self.buffer.generated_tokens(iteration),
            **{f"trajectories/{state}": count for state, count in self.buffer.counts(iteration).items()},
            **stats,
            **(self.runner.run(self.kept_kv.take_metrics()) if self.kept_kv else {}),
            "memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of rank 0's process, so far
            **{f"time/{phase}_s": seconds.get(phase, 0.0) for phase in ("rollout", "reference", "train", "publish")},
            **{
                f"time/{phase}_s": seconds[phase]
                for phase in ("evaluation", "release", "onload", "offload", "resume")
                if phase in seconds
            },
        }
        self.metrics.write(row)
        self.progress.iteration_done(row)

    def report_last_evaluation(self, iteration: int, version: int, scores: dict[str, float]) -> None:
        """A row after those of the iterations: nothing but `eval/*` of the trained weights."""
        self.metrics.write({"iteration": iteration, "weight_version": version, **scores})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the phase while it lasts."""
        self.progress.phase(name, groups=self.config.rollout.groups_per_iteration if name == "rollout" else 0)
        self._shown = (0, 0)
        yield

    def stop(self) -> None:
        """Called from a signal handler: end the rollout phase early, its tokens committed."""
        self.stopping = True
        for part in (self.rollout, self.evaluation):
            if part is not None:
                self.runner.get_loop().call_soon_threadsafe(part.stop)

    def finish(self, *, is_over: bool, iteration: int) -> None:
        """The report, and what to do next."""
        self.progress.close()
        self.buffer.check()
        folder = self.config.run.folder
        write_report(folder)
        if is_over:
            log.info("finished: model in %s, report in %s", folder / "hf", folder / "report.html")
        else:
            log.info(
                "stopped after iteration %d of %d, nothing lost; continue with: megatron-rl train %s",
                iteration,
                self.config.run.iterations,
                folder / "config.yaml",
            )

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
        if self.evaluation:
            self.runner.run(self.evaluation.close())
        self.runner.run(self.scorer.close())
        self.buffer.close()

    def _show_tokens(self, tokens: int, complete_groups: int) -> None:
        self.progress.tokens(tokens - self._shown[0])
        self.progress.group_complete(complete_groups - self._shown[1])
        self._shown = (tokens, complete_groups)


def iteration_row(iteration: int, version: int, groups: list[Group]) -> dict[str, float]:
    """What a batch says of itself. Rewards and lengths are means over trajectories; staleness is in weight versions,
    a mean over tokens, counted from the version the batch was trained on."""
    row: dict[str, float] = {"iteration": iteration, "weight_version": version}
    trajectories = [t for g in groups for t in g.trajectories]
    if not trajectories:
        return row
    outcomes = [t.outcome for t in trajectories if t.outcome]
    versions = np.concatenate([t.weight_versions for t in trajectories])
    mixed = [len({bool(t.outcome and t.outcome.correct) for t in g.trajectories}) > 1 for g in groups]
    trained_on = version - 1  # the step published `version`
    return row | {
        "reward/mean": float(np.mean([o.reward for o in outcomes])),
        "reward/correct": float(np.mean([o.correct for o in outcomes])),
        "reward/wrong_format": float(np.mean([o.kind is OutcomeKind.WRONG_FORMAT for o in outcomes])),
        "groups/trained": len(groups),
        "groups/mixed": float(np.mean(mixed)),
        "length/mean": float(np.mean([t.num_tokens for t in trajectories])),
        "length/max": float(max(t.num_tokens for t in trajectories)),
        "segments/mean": float(np.mean([len(t.segments) for t in trajectories])),
        "staleness/mean": float(np.mean(trained_on - versions)) if len(versions) else 0.0,
        "staleness/mixed_versions": float(np.mean([len(np.unique(t.weight_versions)) > 1 for t in trajectories])),
    }
