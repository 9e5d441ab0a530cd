"""An evaluation that cannot be finished: what it costs, and what is said. Whole runs: `tests/resume/`."""

import asyncio

import numpy as np
import pytest

from megatron_rl.config import Config
from megatron_rl.data.sources import PromptSet
from megatron_rl.errors import EngineError
from megatron_rl.interval_evaluation import IntervalEvaluation
from megatron_rl.rollout.engines.base import Sampling
from megatron_rl.types import Message, Outcome, OutcomeKind, Prompt
from tests.rollout.fake_engine import STOP, FakeEngine

PROMPTS = tuple(Prompt(f"p{i}", (Message("user", "?"),), np.arange(3, dtype=np.int32), "1", "exact") for i in range(4))


TRUNCATED = {"top_p": 0.9, "top_k": 5, "min_p": 0.1}


class Tokenizer:
    stop_token_ids = (STOP,)

    def decode(self, ids):
        return " ".join(map(str, ids))


class Scorer:
    def __init__(self, broken=False):
        self.broken = broken

    async def score(self, prompt, response, ending):
        if self.broken and prompt.id == "p2":
            return Outcome(OutcomeKind.FAILED, 0.0, False, detail="crashed")
        return Outcome(OutcomeKind.VALUE, 1.0, prompt.id == "p0")


def evaluation(scorer, temperature=0.0, **rollout):
    config = Config.model_validate(
        {
            "run": {"folder": "unused", "iterations": 7},
            "model": {"folder": "unused"},
            "data": {"source": "reasoning_gym", "task": "none", "held_out": 4},
            "rollout": {"groups_per_iteration": 1, "token_budget": 8, "max_response_tokens": 8} | rollout,
            "evaluation": {"every": 3, "temperature": temperature},
        }
    )
    return IntervalEvaluation(config, Tokenizer(), PromptSet(PROMPTS[:1], PROMPTS), scorer)


def test_it_is_due_at_intervals_and_after_the_last_iteration():
    assert [i for i in range(8) if evaluation(Scorer()).is_due(i)] == [0, 3, 6, 7]


def test_a_response_that_cannot_be_scored_costs_the_evaluation_and_not_the_run(caplog):
    engine = FakeEngine(lambda trajectory_id: 4)
    assert asyncio.run(evaluation(Scorer()).run([engine]))["eval/held_out/pass@1"] == 0.25
    assert asyncio.run(evaluation(Scorer(broken=True)).run([engine])) == {"eval/held_out/failed": 1}
    assert "evaluation of held_out left out: a response to prompt p2 could not be scored: crashed" in caplog.text


def test_an_engine_that_fails_or_hangs_ends_the_run_and_is_named():
    dead, hung = FakeEngine(lambda _: 4), FakeEngine(lambda _: 4, name="fake-1")
    dead.dies_after = hung.hangs_after = 2
    with pytest.raises(EngineError, match="the process is gone"):
        asyncio.run(evaluation(Scorer()).run([dead]))
    with pytest.raises(EngineError, match=r"evaluation of held_out on fake-1 passed rollout.phase_timeout_s=0.05; raise it, or"):
        asyncio.run(evaluation(Scorer(), phase_timeout_s=0.05).run([hung]))


def test_responses_are_sampled_as_the_rollouts_are_but_for_the_temperature():
    engine = FakeEngine(lambda _: 4)
    asyncio.run(evaluation(Scorer(), temperature=0.5, temperature_decay={"end": 0.2}, **TRUNCATED).run([engine]))
    assert {r.sampling for r in engine.requests} == {Sampling(0.5, 0.9, 5, 0.1, seed=0, stop_token_ids=(STOP,))}


def test_another_waits_timeout_is_not_taken_for_the_deadline():
    class Slow(Scorer):
        async def score(self, prompt, response, ending):
            raise TimeoutError("the judge's server")

    with pytest.raises(TimeoutError, match="the judge's server"):
        asyncio.run(evaluation(Slow()).run([FakeEngine(lambda _: 4)]))


@pytest.mark.parametrize("early", [False, True])
def test_told_to_stop_it_leaves_off_and_does_not_begin_again(early):
    hung, work = FakeEngine(lambda _: 4), evaluation(Scorer())
    hung.hangs_after = 2

    async def stopped():
        if early:
            work.stop()
        running = asyncio.create_task(work.run([hung]))
        for _ in range(20):
            await asyncio.sleep(0)
        work.stop()
        return await running, await work.run([hung])

    assert asyncio.run(stopped()) == ({}, {})
    assert bool(hung.requests) is not early
