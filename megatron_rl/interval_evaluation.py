"""Evaluation while training: the run's own engines answer fixed sets of prompts, between a publish and the next rollout phase.

It disturbs nothing: request ids lie in a range that no trajectory has (`EVALUATION_IDS`), so no sampling noise is shared;
nothing of it enters the replay buffer; afterwards engines that keep KV forget it. The ids are the same each time, so equal
weights have equal numbers, and a replayed iteration those it had. A response that cannot be scored costs the evaluation of
its set, not the run. Rank 0 only, on its event loop. What is computed: `evaluate.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from megatron_rl.answering import EVALUATION_IDS, answer, sampling_at
from megatron_rl.config import Config
from megatron_rl.data.evaluation_sets import EvaluationSet, load_set, ready_made_rewards
from megatron_rl.data.sources import PromptSet
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import EngineError, RewardError
from megatron_rl.evaluate import Evaluation, answer_prefix, summary
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Engine

log = logging.getLogger(__name__)


class IntervalEvaluation:
    def __init__(self, config: Config, tokenizer: ChatTokenizer, prompts: PromptSet, scorer: Scorer) -> None:
        """scorer: the run's; sets that bring their own way of scoring get one of their own.

        Raises DataError for a set that cannot be used."""
        self._config, self._settings, self._tokenizer = config, config.evaluation, tokenizer
        self._sets = [load_set(name, config, tokenizer, prompts) for name in config.evaluation.sets]
        self._scorer = scorer
        needs_own = any(s.rewards.terms != config.rewards.terms for s in self._sets)
        self._own = Scorer(ready_made_rewards(config.rewards), config.rollout.repetition.penalty) if needs_own else None
        self._work: asyncio.Task[dict[str, float]] | None = None
        self._is_stopping = False

    def is_due(self, iteration: int) -> bool:
        """Before this iteration; after the last one, `iteration` is their number."""
        return iteration % (self._settings.every or 1) == 0 or iteration >= self._config.run.iterations

    async def run(self, engines: Sequence[Engine]) -> dict[str, float]:
        """`eval/<set>/*` of the weights that the engines hold; {} after `stop`.

        Raises EngineError for an engine that fails, or past rollout.phase_timeout_s."""
        if self._is_stopping:
            return {}
        self._work = asyncio.create_task(self._evaluate(engines))
        await asyncio.wait([self._work])
        return {} if self._work.cancelled() else self._work.result()

    def stop(self) -> None:
        """On the event loop: leave off, now and later."""
        self._is_stopping = True
        if self._work is not None:
            self._work.cancel()

    async def close(self) -> None:
        if self._own:
            await self._own.close()

    async def _evaluate(self, engines: Sequence[Engine]) -> dict[str, float]:
        limit_s = self._config.rollout.phase_timeout_s
        row: dict[str, float] = {}
        try:
            async with asyncio.timeout(limit_s) as deadline:
                for number, questions in enumerate(self._sets):
                    row |= await self._scores(engines, questions, number)
        except TimeoutError as e:
            if not deadline.expired():  # another wait's: it says itself what it waited for
                raise
            names = ", ".join(engine.name for engine in engines)
            raise EngineError(
                f"the evaluation of {', '.join(self._settings.names)} on {names} passed rollout.phase_timeout_s={limit_s:g}; "
                "raise it, or lower evaluation.prompts, samples or max_tokens"
            ) from e
        await self._make_room(engines)
        return row

    async def _make_room(self, engines: Sequence[Engine]) -> None:
        """Empty caches have the room for kept KV that they would have had. A server without a memory saver cannot be emptied
        here: what finds no room there is computed again, and counted."""
        r = self._config.rollout
        if r.kv_policy == "keep" and (r.engine == "embedded" or r.sglang.takes_turns):
            for engine in engines:
                await engine.health()  # a server that died since its last request is mended
                await engine.release_memory(("kv_cache",))
                await engine.resume_memory(("kv_cache",))

    async def _scores(self, engines: Sequence[Engine], questions: EvaluationSet, number: int) -> dict[str, float]:
        e, config = self._settings, self._config
        prompts = questions.prompts[: e.prompts]
        try:
            responses = await answer(
                engines,
                self._tokenizer,
                self._own if self._own and questions.rewards.terms != config.rewards.terms else self._scorer,
                prompts,
                samples=e.samples,
                sampling=sampling_at(config, self._tokenizer, e.temperature),
                max_tokens=e.max_tokens or config.rollout.max_response_tokens,
                first_id=EVALUATION_IDS * (number + 1),
            )
        except RewardError as error:
            log.warning("evaluation of %s left out: %s", questions.name, error)
            return {f"eval/{questions.name}/failed": 1}
        found = summary(
            responses,
            seed=config.run.seed,
            prefix=answer_prefix(questions.rewards),
            model=str(config.run.folder),
            split=questions.name,
            greedy=e.temperature == 0,
            temperature=e.temperature,
        )
        log.info("%s: pass@1 %.3f (%.3f to %.3f), %.0f tokens", found.split, found.mean, found.low, found.high, found.mean_tokens)
        return row_of(found)


def row_of(found: Evaluation) -> dict[str, float]:
    """An evaluation as metrics: each score with its interval, and the mean length of a response [tokens]."""
    row: dict[str, float] = {}
    for score in found.scores:
        key = f"eval/{found.split}/{score.name}"
        row |= {key: score.mean, f"{key}/low": score.low, f"{key}/high": score.high}
    return row | {f"eval/{found.split}/tokens": found.mean_tokens}
