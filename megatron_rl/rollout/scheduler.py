"""The rollout phase: unfinished trajectories first, then fresh prompts, until a batch is complete or nothing may go on.

It decides who generates, how much, and when a group is complete, dropped or part of the batch. It does not generate
(`engines/`), store (`buffer.py`), score, or train. One trajectory's limits and endings: `continuation.py`.

Tasks of a phase (all on one event loop; the buffer is written between awaits only):
| task | consumes | produces | waits for | unblocked by |
|---|---|---|---|---|
| `run` | finished tasks | draws, the batch | `wake`, at most one tick | any task that ends, `stop` |
| `_generate`, one a group and engine | chunks | segments, `_score` tasks | its engine | the engine; `run` aborts or cancels it |
| `_score`, one an ended trajectory | a response | an outcome | the scorer | the scorer; `run` cancels it |
Their number is bounded by the trajectories of `rollout.max_open_groups` groups. `run` looks at the deadlines at every tick.

When the phase ends because every open trajectory has spent its budget, draws and segments are the same whatever the order
in which engines and scorers answer: a group's fate depends on its own tokens only, and groups are drawn in one order
until `max_open_groups` of them are incomplete. An engine that only all ranks can bring back ends the phase as SIGTERM does: what
has been made is kept, and the same phase is run again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megatron_rl.config import Config
from megatron_rl.errors import BufferFileError, EngineError, EngineLostError, RewardError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.continuation import Continuation, Limits, room
from megatron_rl.rollout.engines.base import Chunk, Engine, Sampling
from megatron_rl.rollout.repetition import RepetitionDetector
from megatron_rl.rollout.selection import oldest_loss_version
from megatron_rl.rollout.temperature import temperature
from megatron_rl.types import DropReason, Ending, Group, Outcome, OutcomeKind, Prompt, Trajectory

log = logging.getLogger(__name__)

_SLACK = 1.1  # of rollout.request_timeout_s: an engine judges the silence of its server first, and may start it again


class PromptSource(Protocol):
    def draw(self, n: int) -> list[Prompt]: ...


class ResponseScorer(Protocol):
    async def score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome: ...


class ResponseTokenizer(Protocol):
    stop_token_ids: tuple[int, ...]

    def decode(self, ids: Sequence[int]) -> str: ...


class Rollout:
    """Conducts the rollout phases of a run, one after the other."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        engines: Sequence[Engine],
        sampler: PromptSource,
        scorer: ResponseScorer,
        tokenizer: ResponseTokenizer,
        config: Config,
        model_config: ModelConfig,
    ) -> None:
        self.buffer, self.engines, self.sampler = buffer, tuple(engines), sampler
        self.scorer, self.tokenizer, self.config = scorer, tokenizer, config
        settings = config.rollout
        self.limits = Limits(
            settings.token_budget, settings.max_response_tokens, settings.max_segments, model_config.max_positions
        )
        self.sampling = Sampling(
            settings.temperature,  # at first; see `temperature`
            settings.top_p,
            settings.top_k,
            settings.min_p,
            seed=config.run.seed,
            stop_token_ids=tuple(tokenizer.stop_token_ids),
        )
        self.on_tokens: Callable[[int, int], None] | None = None  # (tokens made in this phase, complete groups)
        self.is_stopping = False
        self._phase: _Phase | None = None

    async def run(self, iteration: int, weight_version: int) -> list[Group]:
        """One phase. Returns the batch: at most `groups_per_iteration` complete groups, oldest first; the surplus stays.
        Empty when fewer than `min_groups` are complete, when a later phase has begun already, or after `stop`.

        Raises EngineError or RewardError, naming engine and trajectories, for a dead engine or a missed deadline; what was
        generated is kept. EngineLostError where the same phase can go on, by another call, once the engine is back."""
        if self.is_stopping or not self.buffer.begin_phase(iteration):
            return []
        self._phase = _Phase(self, iteration, weight_version)
        try:
            complete = await self._phase.run()
        finally:
            self._phase = None
        settings = self.config.rollout
        if self.is_stopping or len(complete) < settings.min_groups:
            return []
        return complete[: settings.groups_per_iteration]

    def stop(self) -> None:
        """SIGTERM, on the event loop: no more requests, now or later; `run` commits all tokens and returns []."""
        self.is_stopping = True
        if self._phase is not None:
            self._phase.wake.set()


@dataclass
class _OpenGroup:
    """A group some of whose living members are not scored."""

    prompt: Prompt
    unscored: set[int] = field(default_factory=set)


class _Phase:
    def __init__(self, rollout: Rollout, iteration: int, weight_version: int) -> None:
        self.rollout, self.buffer, self.settings = rollout, rollout.buffer, rollout.config.rollout
        self.iteration, self.weight_version = iteration, weight_version
        self.wake = asyncio.Event()
        self.num_tokens = 0
        self._open: dict[int, _OpenGroup] = {}
        self._complete: list[Group] = []
        self._running: dict[int, Continuation] = {}
        self._generating: dict[asyncio.Task[None], Engine] = {}
        self._scoring: dict[asyncio.Task[None], int] = {}
        self._aborting: set[asyncio.Task[None]] = set()
        self._is_ending = False
        self._lost: EngineLostError | None = None
        self._sampling = replace(rollout.sampling, temperature=temperature(rollout.config.rollout, iteration))
        self._started = self._now()
        self._heard = {engine.name: self._started for engine in rollout.engines}

    async def run(self) -> list[Group]:
        """All complete groups, oldest first."""
        try:
            self._resume()
            self._draw()
            while (self._generating or self._scoring) and not self._is_over:
                await self._wait()
                self._draw()
            self._is_ending = True
            self._heard = dict.fromkeys(self._heard, self._now())
            self._abort(list(self._running))
            while self._generating or (self._scoring and not self.rollout.is_stopping):
                await self._wait()
        except BufferFileError:
            self._running.clear()  # nothing more can be written; what is committed is kept
            raise
        finally:
            await self._leave()
        log.info("iteration %d: %d tokens, %d complete groups", self.iteration, self.num_tokens, len(self._complete))
        if self._lost is not None and not (self._is_enough or self.rollout.is_stopping):
            raise self._lost
        return sorted(self._complete, key=lambda group: group.id)

    @property
    def _is_over(self) -> bool:
        return self._is_enough or self.rollout.is_stopping or self._lost is not None

    @property
    def _is_enough(self) -> bool:
        return len(self._complete) >= self.settings.groups_per_iteration

    @property
    def _most_open(self) -> int:
        """Full rollouts draw no group beyond what the batch needs: each is waited for."""
        most, missing = self.rollout.config.max_open_groups, self.settings.groups_per_iteration - len(self._complete)
        return most if self.settings.partial else min(most, missing)

    # --- who generates -----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """The groups of earlier phases, oldest first; those that can only become stale are dropped, not continued."""
        for group in self.buffer.complete_groups():
            self._complete_or_drop(group)
        certain = self.rollout.config.algorithm.loss_segments == "all"  # else later tokens may decide
        for group in self.buffer.open_groups():
            if certain and self._is_stale(group):
                self._drop_stale(group)
            else:
                self._start(group)

    def _draw(self) -> None:
        """Fresh prompts, one by one, while fewer groups are incomplete than may be."""
        while not self._is_over and len(self._open) < self._most_open:
            (prompt,) = self.rollout.sampler.draw(1)
            self._start(self.buffer.draw(prompt, self.settings.group_size, self.iteration))

    def _start(self, group: Group) -> None:
        """Continue or score what is unfinished. One request to an engine for all members there: they share their prompt."""
        unfinished = [t for t in group.trajectories if t.outcome is None]
        self._open[group.id] = _OpenGroup(group.prompt, {t.id for t in unfinished})
        by_engine: dict[str, list[Continuation]] = {}
        for trajectory in unfinished:
            if trajectory.ending and trajectory.ending.ends_trajectory:
                self._score(trajectory.id, trajectory.ending)
                continue
            continuation = self._continuation(group, trajectory)
            ending = continuation.ending_at_start()
            if ending is None:
                by_engine.setdefault(continuation.engine.name, []).append(continuation)
                self._running[trajectory.id] = continuation
            elif ending.ends_trajectory:
                self._close(continuation, ending)
        for continuations in by_engine.values():
            engine = continuations[0].engine
            if engine not in self._generating.values():
                self._heard[engine.name] = self._now()
            self._generating[self._task(self._generate(engine, continuations))] = engine

    def _continuation(self, group: Group, trajectory: Trajectory) -> Continuation:
        space = room(trajectory, len(group.prompt.token_ids), self.iteration, self.rollout.limits)
        engine, r = self._engine(group, trajectory), self.settings.repetition
        detector = RepetitionDetector(r.max_period, r.min_repeats, r.min_tokens) if r.enabled else None
        return Continuation(trajectory, group.prompt, engine, space, sampling=self._sampling, detector=detector)

    def _engine(self, group: Group, trajectory: Trajectory) -> Engine:
        """The one that holds its KV, else the one that holds its prompt's, else the least loaded."""
        by_name = {engine.name: engine for engine in self.rollout.engines}
        for known in (trajectory, *group.trajectories):
            for segment in reversed(known.segments):
                if segment.engine in by_name:
                    return by_name[segment.engine]
        load = {engine.name: 0 for engine in self.rollout.engines}
        for continuation in self._running.values():
            if continuation.trajectory.group_id == group.id:
                return continuation.engine
            load[continuation.engine.name] += 1
        return min(self.rollout.engines, key=lambda engine: load[engine.name])

    def _abort(self, trajectory_ids: Sequence[int]) -> None:
        by_engine: dict[str, tuple[Engine, list[int]]] = {}
        for i in trajectory_ids:
            engine = self._running[i].engine
            by_engine.setdefault(engine.name, (engine, []))[1].append(i)
        for engine, ids in by_engine.values():
            self._aborting.add(self._task(engine.abort(ids)))

    # --- what comes back ---------------------------------------------------------------------------------------------

    async def _generate(self, engine: Engine, continuations: list[Continuation]) -> None:
        try:
            async for chunk in engine.generate([c.request(self.weight_version) for c in continuations]):
                self._receive(engine, chunk)
        except EngineLostError as e:
            self._lost = e
            for continuation in [c for c in continuations if c.id in self._running]:
                self._finish(continuation, Ending.ABORT)
            return
        except EngineError as e:
            raise EngineError(f"engine {engine.name}, {_names(c.id for c in continuations)}: {e}") from e
        silent = [c.id for c in continuations if c.id in self._running]
        if silent:
            raise EngineError(f"engine {engine.name}: ended its answer without an ending for {_names(silent)}; see its log")

    def _receive(self, engine: Engine, chunk: Chunk) -> None:
        self._heard[engine.name] = self._now()
        continuation = self._running.get(chunk.trajectory_id)
        if continuation is None or chunk.weight_version != self.weight_version:
            raise EngineError(
                f"sent a chunk of trajectory {chunk.trajectory_id}, weight version {chunk.weight_version}, where "
                f"{_names(self._running)} of version {self.weight_version} run; engine and trainer are out of step"
            )
        has_repeated = continuation.accept(chunk, self._now())
        self.num_tokens += len(chunk.token_ids)
        if chunk.ending:
            self._finish(continuation, chunk.ending)
        elif has_repeated:
            self._abort([continuation.id])
        if continuation.num_pending >= self.settings.commit_tokens:
            continuation.commit(self.buffer, self.iteration, self.weight_version)
        if self.rollout.on_tokens:
            self.rollout.on_tokens(self.num_tokens, len(self._complete))

    def _finish(self, continuation: Continuation, ending: Ending) -> None:
        goes_on = self.rollout.is_stopping or self._lost is not None
        verdict = continuation.verdict(ending, phase_is_over=self._is_ending and not goes_on)
        if verdict is Ending.ABORT and not (self._is_ending or goes_on or continuation.is_abandoned):
            raise EngineError(f"aborted trajectory {continuation.id}, which nobody asked for; see its log")
        del self._running[continuation.id]
        self._close(continuation, verdict)

    def _close(self, continuation: Continuation, ending: Ending) -> None:
        continuation.close(self.buffer, self.iteration, self.weight_version, ending)
        if ending.ends_trajectory:
            self._score(continuation.id, ending)

    def _score(self, trajectory_id: int, ending: Ending) -> None:
        if not self.rollout.is_stopping:
            self._scoring[self._task(self._outcome(trajectory_id, ending))] = trajectory_id

    async def _outcome(self, trajectory_id: int, ending: Ending) -> None:
        (trajectory,) = self.buffer.trajectories([trajectory_id])
        if trajectory.group_id not in self._open:
            return  # dropped before its turn came
        group = self._open[trajectory.group_id]
        response = self.rollout.tokenizer.decode(trajectory.token_ids.tolist())
        outcome = await self.rollout.scorer.score(group.prompt, response, ending)
        if trajectory_id not in group.unscored:
            return  # dropped while it was scored
        gone = [trajectory_id]
        with self.buffer.transaction():
            self.buffer.set_outcome(trajectory_id, outcome)
            if outcome.kind is OutcomeKind.FAILED:
                log.warning("trajectory %d dropped, its reward failed: %s", trajectory_id, outcome.detail)
                gone = self.buffer.drop([trajectory_id], DropReason.REWARD, self.iteration)
        group.unscored.difference_update(gone)
        running = [i for i in gone if i in self._running]
        for i in running:
            self._running[i].is_abandoned = True
        self._abort(running)
        if not group.unscored:
            del self._open[trajectory.group_id]
            self._complete_or_drop(self.buffer.groups([trajectory.group_id])[0])

    def _complete_or_drop(self, group: Group) -> None:
        if not group.trajectories:
            return  # all its members were dropped
        if self._is_stale(group):
            self._drop_stale(group)
        else:
            self._complete.append(group)

    def _is_stale(self, group: Group) -> bool:
        oldest = oldest_loss_version(group, self.rollout.config.algorithm.loss_segments, self.weight_version)
        return oldest is not None and self.weight_version - oldest > self.settings.max_staleness

    def _drop_stale(self, group: Group) -> None:
        self.buffer.drop([t.id for t in group.trajectories], DropReason.STALE, self.iteration)

    # --- time --------------------------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Until a task ends, `stop`, or a tick; then look after errors, commits and deadlines."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(self.settings.commit_s, self.settings.request_timeout_s)):
                await self.wake.wait()
        self.wake.clear()
        for tasks in (self._generating, self._scoring, self._aborting):
            for task in [t for t in tasks if t.done()]:
                tasks.pop(task) if isinstance(tasks, dict) else tasks.remove(task)
                task.result()
        now = self._now()
        with self.buffer.transaction():
            for continuation in self._running.values():
                since = continuation.pending_since
                if since is not None and now - since >= self.settings.commit_s:
                    continuation.commit(self.buffer, self.iteration, self.weight_version)
        self._check_deadlines(now)

    def _check_deadlines(self, now: float) -> None:
        for engine in set(self._generating.values()):
            if engine.is_restarting:
                self._heard[engine.name] = now
            if now - self._heard[engine.name] > _SLACK * self.settings.request_timeout_s:
                ids = [c.id for c in self._running.values() if c.engine is engine]
                raise EngineError(
                    f"engine {engine.name}: silent for rollout.request_timeout_s={self.settings.request_timeout_s:g} while "
                    f"{_names(ids)} run; see its log, or raise the setting"
                )
        if now - self._started <= self.settings.phase_timeout_s:
            return
        late = f"the phase of iteration {self.iteration} passed rollout.phase_timeout_s={self.settings.phase_timeout_s:g}"
        if self._generating:
            engines = ", ".join(sorted({engine.name for engine in self._generating.values()}))
            raise EngineError(f"{late} while engine {engines} generates {_names(self._running)}; raise it or lower token_budget")
        raise RewardError(f"{late} while {_names(self._scoring.values())} are scored; see rewards.timeout_s")

    async def _leave(self) -> None:
        """No task outlives the phase; what an error left running keeps its tokens."""
        tasks: list[asyncio.Task[None]] = [*self._generating, *self._scoring, *self._aborting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(BufferFileError):  # an error is already on its way
            for continuation in self._running.values():
                continuation.close(self.buffer, self.iteration, self.weight_version, Ending.ABORT)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self.wake.set())
        return task

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _names(trajectory_ids: Any) -> str:
    """The first few of them."""
    ids = sorted(trajectory_ids)
    return f"trajectories {', '.join(map(str, ids[:8]))}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
