"""Sets by name: what their prompts are, how they are scored, and what is refused."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl import config as configuration
from megatron_rl.data.evaluation_sets import check_room, load_set
from megatron_rl.data.ready_made import PREFIX, READY_MADE, SIZE
from megatron_rl.data.sources import load_prompts
from megatron_rl.errors import DataError
from megatron_rl.master import Master
from megatron_rl.model_config import ModelConfig
from megatron_rl.rewards.reasoning_gym import score
from tests.resume.recipe import write_recipe


class Words:
    """An encoder of one token a word."""

    def encode_chat(self, messages):
        return [0] * len(messages)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return configuration.load(write_recipe(folder, iterations=1), ["data.held_out=6", f"run.folder={folder / 'run'}"])


@pytest.mark.parametrize("name", ["gsm_symbolic", "add_in_steps"])
def test_a_ready_made_set_is_the_same_for_every_model_and_scores_what_follows_the_prefix(name, config):
    questions = load_set(name, config, Words())
    again = load_set(name, config.model_copy(update={"rewards": configuration.RewardsConfig()}), Words())
    assert [p.id for p in questions.prompts] == [p.id for p in again.prompts]
    assert questions.rewards.terms == again.rewards.terms
    assert 0.9 * SIZE < len(questions.prompts) <= SIZE
    (term,) = questions.rewards.terms
    prompt = questions.prompts[0]
    assert PREFIX in prompt.messages[0].content and prompt.messages[0].role == "system"
    for response, value in ((f"1 and 2\n{PREFIX} {prompt.answer}\n", 1.0), (f"{PREFIX} nothing", 0.0), (prompt.answer, None)):
        found = score(response=response, answer=prompt.answer, prompt=prompt, **term.options)
        assert found == value or (found is not None and value == 0.0 and found < 1), response


def test_every_ready_made_set_is_a_task_whose_answers_fit_on_a_line():
    import reasoning_gym

    for name, ready in READY_MADE.items():
        for entry in reasoning_gym.create_dataset(ready.task, **ready.options, size=3, seed=1):
            assert "\n" not in str(entry["answer"]).strip() and str(entry["answer"]).strip(), name


def test_training_data_may_be_a_ready_made_set(config):
    data = configuration.DataConfig(source="reasoning_gym", set="add_in_steps", size=20)
    prompts = load_prompts(data, Words()).train
    assert len(prompts) > 15 and all(p.verifier == "reasoning_gym" for p in prompts)
    evaluated = {p.id for p in load_set("add_in_steps", config, Words()).prompts}
    assert not {p.id for p in prompts} <= evaluated, "another seed, other questions"


def test_prompts_that_fill_the_models_context_are_named(config):
    prompts = load_set("held_out", config, Words()).prompts
    full = replace(prompts[3], token_ids=np.zeros(512, np.int32))
    check_room(prompts, "held_out", config.model.folder)
    with pytest.raises(DataError, match=r"1 of its 4 prompts leave no room .* context of 512 tokens \(the first has 512 and"):
        check_room([*prompts[:3], full], "held_out", config.model.folder)


def test_training_on_blank_answers_is_refused_before_a_model_is_loaded(config, tmp_path):
    plain = config.model_copy(update={"rewards": configuration.RewardsConfig()})  # each prompt's own verifier: exact
    model = ModelConfig.from_folder(config.model.folder)
    with (
        asyncio.Runner() as runner,
        pytest.raises(DataError, match="prompts.jsonl, line 1, column 1: `answer` is blank, and exact"),
    ):
        Master(plain, model, "run", runner)
    assert not plain.run.folder.exists(), "no buffer either"


def test_what_cannot_be_evaluated_is_said_before_anything_is_generated(config, tmp_path):
    plain = config.model_copy(update={"rewards": configuration.RewardsConfig()})
    path = tmp_path / "questions.jsonl"
    lines = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": " "}, {"prompt": "3+3="}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="questions.jsonl, line 3.*`answer` is missing; give the reference answer"):
        load_set(str(path), plain, Words())
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(DataError, match="questions.jsonl, line 2, column 1: `answer` is blank, and exact compares"):
        load_set(str(path), plain, Words())
    path.write_text(json.dumps(lines[0]) + "\n")
    assert [p.answer for p in load_set(str(path), plain, Words()).prompts] == ["2"]
    with pytest.raises(DataError, match="no ready-made set 'gsm_symbolik'; the nearest is gsm_symbolic"):
        load_set("gsm_symbolik", plain, Words())
    with pytest.raises(DataError, match="set held_out is empty; set data.held_out"):
        load_set("held_out", config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0})}), Words())
