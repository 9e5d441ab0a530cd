"""Work side by side: bounded, in order, and nothing left running after an error; and how responses are sampled."""

import asyncio

import pytest

from megatron_rl import config as configuration
from megatron_rl import curate, evaluate, rejection
from megatron_rl.answering import in_order, side_by_side
from megatron_rl.errors import DataError, EngineError
from tests.resume.recipe import write_recipe


class Works:
    """Each one takes as many turns of the loop as it is told."""

    def __init__(self):
        self.running, self.most, self.cancelled = 0, 0, 0

    async def one(self, number, turns):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if number == 13:
            raise EngineError("broken")
        return number


@pytest.mark.parametrize("limit", [1, 3, 50])
def test_results_come_in_order_and_no_more_than_the_limit_run(limit):
    works, turns = Works(), [9, 1, 40, 2, 2, 1, 30, 1, 1, 1]

    async def collect():
        return [n async for n in in_order((works.one(i, t) for i, t in enumerate(turns)), limit)]

    assert asyncio.run(collect()) == list(range(len(turns)))
    assert works.most == min(limit, len(turns))


def test_an_error_is_raised_as_it_is_before_earlier_work_has_ended_and_ends_the_rest():
    works = Works()

    async def collect():
        async for n in in_order((works.one(i, 10**6 if i == 10 else 1) for i in range(10, 30)), 5):
            raise AssertionError(f"{n} came before 10")

    with pytest.raises(EngineError, match="broken"):
        asyncio.run(collect())
    assert works.running == 0 and works.cancelled >= 1

    async def together():
        await side_by_side(works.one(i, 10**6 if i == 10 else 1) for i in range(10, 30))

    with pytest.raises(EngineError, match="broken"):
        asyncio.run(together())
    assert works.running == 0


def test_prompts_that_cannot_be_judged_or_answered_are_refused_before_an_engine_is_made(tmp_path):
    recipe = write_recipe(tmp_path, iterations=1)
    model = tmp_path / "model"
    commands = [
        lambda c: evaluate.evaluate(c, model, split="train"),
        lambda c: curate.curate(c, model, tmp_path / "out", curate.Rules()),
        lambda c: rejection.write_data(c, model, tmp_path / "out", rejection.Rules()),
    ]
    long = f"data.system_message={'x' * 600}"
    for command in commands:
        for settings, message in (
            (["rewards.terms=[]"], r"`answer` is blank, and exact compares .*\(36 of 36 questions"),
            ([long, "data.max_prompt_tokens=1000"], "leave no room for a response in the model's context of 512 tokens"),
        ):
            with pytest.raises(DataError, match=message):
                command(configuration.load(recipe, ["run.folder=unused", *settings]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [evaluate, curate])
def test_who_samples_does_so_as_the_config_says(command, tmp_path, monkeypatch):
    async def answer(*_, sampling, **options):
        raise EngineError(f"asked for {sampling.temperature}, {sampling.top_p}, {sampling.top_k}, {sampling.min_p}")

    monkeypatch.setattr(command, "answer", answer)
    settings = ["rollout.top_p=0.9", "rollout.top_k=5", "rollout.min_p=0.1", "rollout.temperature=0.7"]
    config = configuration.load(write_recipe(tmp_path, iterations=1), ["run.folder=unused", *settings])
    with pytest.raises(EngineError, match=r"asked for 0\.7, 0\.9, 5, 0\.1"):
        if command is evaluate:
            evaluate.evaluate(config, config.model.folder, split="train", greedy=False)
        else:
            curate.curate(config, config.model.folder, tmp_path / "out", curate.Rules(temperature=0.7))
