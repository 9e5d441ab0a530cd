"""Rejection sampling: the rules by examples; a whole sampling of a random model, killed and gone on with, on both engines."""

import json
from dataclasses import replace

import pytest

from megatron_rl import config as configuration
from megatron_rl import curate, folder_engines, rejection
from megatron_rl.answering import Response
from megatron_rl.data.conversations import read_conversations, read_pairs
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.rejection import Rules, select, write_data
from megatron_rl.types import Ending
from tests.resume.recipe import write_recipe
from tests.test_serving_sglang import served_by_fake


def response(text: str, num_tokens: int, right: bool = True, ending: Ending = Ending.STOP) -> Response:
    return Response(text, num_tokens, right, ending)


@pytest.mark.parametrize(
    ("rules", "kept", "why"),
    [
        (Rules(), ["long"], {"surplus": 2}),
        (Rules(keep="shortest", most=2), ["a", "b"], {"surplus": 1}),
        (Rules(keep="all"), ["long", "b", "a"], {}),
        (Rules(keep="all", max_tokens=20), ["b", "a"], {"too long": 1}),
    ],
)
def test_right_and_ended_responses_are_kept_as_the_rules_say(rules, kept, why):
    cut, wrong, again = response("c", 1, ending=Ending.LENGTH), response("d", 1, right=False), response("b", 8)
    rows = [cut, response("long", 30), wrong, response("b", 8), again, response("a", 5)]
    found, others = select([*rows, response(" ", 2)], rules)
    assert [r.text for r in found] == kept
    assert others == {"cut off": 1, "wrong": 1, "repeat": 1, "blank": 1, **why}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejection")
    opening = ["data.system_message=s", "data.worked_turns=[{question: q, answer: a}]"]
    longer = "rollout.max_response_tokens=20"  # most responses end by themselves
    settings = [f"run.folder={folder / 'run'}", "data.held_out=18", longer, *opening]
    return configuration.load(write_recipe(folder, iterations=1), settings)


def test_a_sampling_that_was_killed_goes_on_to_the_same_files_and_they_can_be_trained_on(config, tmp_path, monkeypatch):
    model = config.model.folder
    rules = Rules(samples=8, keep="shortest", bare=True, pairs=True)
    monkeypatch.setattr(rejection, "BATCH", 5)
    report = write_data(config, model, tmp_path / "whole", rules)
    answers = tmp_path / "killed" / "answers.jsonl"
    answers.parent.mkdir()
    text = (tmp_path / "whole" / "answers.jsonl").read_text()
    answers.write_text(text[: len(text) // 3])  # a line is cut short
    (answers.parent / "settings.json").write_text((tmp_path / "whole" / "settings.json").read_text())
    assert write_data(config, model, answers.parent, rules) == report
    for name in ("answers.jsonl", "sft.jsonl", "pairs.jsonl", "report.json"):
        assert (answers.parent / name).read_text() == (tmp_path / "whole" / name).read_text(), name

    assert (report["prompts"], report["responses"]) == (18, 144)
    assert report["kept"] + sum(report["not_kept"].values()) == 144 and report["prompts_without"] == 18 - report["kept"]
    tokenizer = ChatTokenizer.from_folder(model)
    lines = [json.loads(line) for line in (answers.parent / "sft.jsonl").read_text().splitlines()]
    assert len(lines) == report["kept"] > 2
    for line in lines:
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"], "without the opening"
        assert not set(line["messages"][-1]["content"]) & set("abcdefghijklm"), "right by the recipe's rule"
    assert len(read_conversations(answers.parent / "sft.jsonl", tokenizer, "sft.path")) == report["kept"]
    pairs = [json.loads(line) for line in (answers.parent / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == report["pairs"] > 2 and all(chosen < rejected for chosen, rejected in (p["num_tokens"] for p in pairs))
    assert len(read_pairs(answers.parent / "pairs.jsonl", tokenizer, "dpo.path")) == report["pairs"]

    other = write_data(config, model, answers.parent, Rules(samples=8, keep="all"))  # nothing is sampled again
    assert other["kept"] == report["kept"] + report["not_kept"].get("surplus", 0)
    assert not (answers.parent / "pairs.jsonl").exists(), "of other rules than the report's"
    with pytest.raises(DataError, match="no response to the 18 prompts is kept: .*'too long'"):
        write_data(config, model, answers.parent, replace(rules, max_tokens=1))
    assert not (answers.parent / "sft.jsonl").exists(), "what is there is of the last rules"
    with pytest.raises(DataError, match="sampled with other settings or prompts; choose another folder"):
        write_data(config, model, answers.parent, Rules(samples=7))
    load = rejection.load_prompts
    monkeypatch.setattr(rejection, "load_prompts", lambda *a, **k: replace(p := load(*a, **k), train=p.train[::-1]))
    with pytest.raises(DataError, match="or prompts"):  # the file changed under its name: answers would get other questions
        write_data(config, model, answers.parent, rules)


def test_an_sglang_server_is_started_with_the_folder_and_answers_as_well(config, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_engines, "SGLangServing", served_by_fake)
    recipe = config.model.folder.parent / "config.yaml"
    settings = [f"run.folder={tmp_path}", "rollout.engine=sglang", "data.held_out=26"]
    served = configuration.load(recipe, settings)
    report = write_data(served, config.model.folder, tmp_path / "out", Rules(samples=4))
    assert report["responses"] == 40 and report["kept"] > 0
    counts = curate.curate(served, config.model.folder, tmp_path / "curated", curate.Rules(samples=2, tries=1, highest=1))
    assert sum(counts.values()) == 10
    given = configuration.load(recipe, [*settings, "rollout.sglang.urls=[http://127.0.0.1:1]"])
    with pytest.raises(ConfigError, match="may hold other weights than .*model; leave the setting out"):
        write_data(given, config.model.folder, tmp_path / "given", Rules(samples=2))


def test_a_model_that_is_never_right_is_an_error_not_an_empty_file(config, tmp_path):
    hopeless = config.model_copy(
        update={"rewards": config.rewards.model_validate({"terms": [{"name": "regex", "options": {"pattern": "^()$x"}}]})}
    )
    with pytest.raises(DataError, match="no response to the 18 prompts is kept: .*take easier prompts"):
        write_data(hopeless, config.model.folder, tmp_path, Rules(samples=2))
    assert not (tmp_path / "sft.jsonl").exists() and (tmp_path / "report.json").exists()
