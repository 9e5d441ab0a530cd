"""Scores responses in worker processes, so that no expression, pattern or user's function can stall or kill the run.

A call is one term of one response, under `rewards.timeout_s` of CPU time and a wall-clock backstop several times that
(`process.py`). A failed call (deadline, crash, exception, NaN) is tried once more in a fresh worker; failing again it
makes the response's outcome `failed`, which is never a reward. Refuses at construction terms that cannot be loaded, and
raises RewardError when `rewards.max_failures` responses in a row have failed: then the function is at fault, not a response.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from megatron_rl.config import RewardsConfig
from megatron_rl.errors import RewardError
from megatron_rl.rewards.process import Worker
from megatron_rl.rewards.terms import check_name
from megatron_rl.rewards.wire import Call, Cause, Reply, Setup, TermSpec
from megatron_rl.types import Ending, Outcome, OutcomeKind, Prompt

log = logging.getLogger(__name__)


class Scorer:
    """One thread a worker process; each thread talks to one worker at a time."""

    def __init__(self, config: RewardsConfig, repetition_penalty: float) -> None:
        """Starts the workers and loads all terms in each; raises RewardError naming a term that cannot be loaded."""
        for term in config.terms:
            check_name(term.name)
        self._config, self._repetition_penalty = config, repetition_penalty
        self._labels = _labels([term.name for term in config.terms])
        self._weights = dict(zip(self._labels, (term.weight for term in config.terms), strict=True))
        self._ranges = dict(zip(self._labels, (term.range for term in config.terms), strict=True))
        specs = {label: TermSpec(term.name, term.options) for label, term in zip(self._labels, config.terms, strict=True)}
        setup = Setup(specs, config.memory_bytes)
        self._workers = [Worker(setup) for _ in range(config.workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")
        self._lock = threading.Lock()
        self._failures: Counter[Cause] = Counter()
        self._failed_in_a_row = 0
        self._start()

    def _start(self) -> None:
        try:
            for worker in self._workers:
                worker.launch()
            for worker in self._workers:
                worker.check_ready()
                self._idle.put(worker)
        except RewardError:
            for worker in self._workers:
                worker.kill()
            raise

    @property
    def failures(self) -> dict[str, int]:
        """Failed calls so far by cause, the ones that succeeded in their second trial included."""
        with self._lock:
            return {cause.value: count for cause, count in self._failures.items()}

    async def score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome:
        """The weighted sum of the terms, less the penalty of a repeating response; correct only when every term with a
        positive weight gives its full score, 1. Without terms in the config, the prompt's own verifier with weight 1.

        An answer missing for one term makes the outcome `wrong_format`; that term then counts 0."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._score, prompt, response, ending)

    async def close(self) -> None:
        """End the workers; calls still running return failed outcomes."""
        for worker in self._workers:
            worker.interrupt()
        await asyncio.to_thread(self._threads.shutdown)
        for worker in self._workers:
            worker.kill()

    def _score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome:
        worker = self._idle.get()
        try:
            outcome = self._outcome(worker, prompt, response, ending)
        finally:
            self._idle.put(worker)
        self._watch(outcome)
        return outcome

    def _outcome(self, worker: Worker, prompt: Prompt, response: str, ending: Ending) -> Outcome:
        replies: dict[str, Reply] = {}
        weights = self._weights or {prompt.verifier: 1.0}
        for label in weights:
            reply = self._call(worker, label, prompt, response)
            if reply.kind is OutcomeKind.FAILED:
                detail = f"term {label}, prompt {prompt.id}: {reply.detail}"
                return Outcome(OutcomeKind.FAILED, 0.0, False, detail=detail)
            self._check_range(label, reply, prompt)
            replies[label] = reply
        values = {label: reply.value for label, reply in replies.items()}
        reward = sum(weight * values[label] for label, weight in weights.items())
        if ending is Ending.REPEAT:
            reward -= self._repetition_penalty
        full_scores = [values[label] >= 1.0 for label, weight in weights.items() if weight > 0]
        has_answer = all(reply.kind is OutcomeKind.VALUE for reply in replies.values())
        return Outcome(
            kind=OutcomeKind.VALUE if has_answer else OutcomeKind.WRONG_FORMAT,
            reward=reward,
            correct=bool(full_scores) and all(full_scores),
            terms=values,
        )

    def _check_range(self, label: str, reply: Reply, prompt: Prompt) -> None:
        """A value outside the declared range is the function's fault, whatever the response: training on it must not begin."""
        bounds = self._ranges.get(label)
        if bounds and reply.kind is OutcomeKind.VALUE and not bounds[0] <= reply.value <= bounds[1]:
            raise RewardError(
                f"rewards: term {label} gave {reply.value:g} for prompt {prompt.id}, outside its range {list(bounds)}; correct "
                "the function, or the range in rewards.terms"
            )

    def _call(self, worker: Worker, label: str, prompt: Prompt, response: str) -> Reply:
        call = Call(label, prompt, response, self._config.timeout_s)
        first = self._counted(worker.ask(call))
        if first.kind is not OutcomeKind.FAILED:
            return first
        log.warning("term %s failed on prompt %s (%s); trying once more in a fresh worker", label, prompt.id, first.detail)
        return self._counted(worker.ask(call))

    def _counted(self, reply: Reply) -> Reply:
        if reply.cause is Cause.UNUSABLE:
            raise RewardError(reply.detail)
        if reply.cause is not None:
            with self._lock:
                self._failures[reply.cause] += 1
        return reply

    def _watch(self, outcome: Outcome) -> None:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if outcome.kind is OutcomeKind.FAILED else 0
            count = self._failed_in_a_row
        if count >= self._config.max_failures:
            raise RewardError(
                f"rewards.max_failures={self._config.max_failures}: scoring failed for so many responses in a row; the last "
                f"cause was: {outcome.detail}; correct the reward function, or raise rewards.timeout_s if it needs longer"
            )


def _labels(names: list[str]) -> list[str]:
    """Each term's name; the second one of a name is `name#2`, and so on."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return labels
