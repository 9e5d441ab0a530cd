"""The rules of paper 2.4 on responses made by hand, and an evaluation from a real engine."""

import pytest

from megatron_rl import config as configuration
from megatron_rl.answering import Response
from megatron_rl.errors import DataError
from megatron_rl.evaluate import evaluate, summary
from megatron_rl.long2short.selection import preference_pairs, shortest_correct
from megatron_rl.types import Ending
from tests.resume.recipe import write_recipe


def response(num_tokens: int, is_correct: bool, ending: Ending = Ending.STOP) -> Response:
    return Response(f"{num_tokens} {is_correct}", num_tokens, is_correct, ending)


def test_the_shortest_right_and_ended_response_is_chosen():
    cut = response(5, True, Ending.LENGTH)
    rows = [response(30, True), response(10, False), cut, response(20, True), response(20, True)]
    assert shortest_correct(rows) is rows[3]
    assert shortest_correct([response(10, False), cut]) is None


def test_rejected_are_longer_wrong_ones_and_right_ones_half_as_long_again():
    best = response(20, True)
    rows = [best, response(19, False), response(21, False), response(29, True), response(30, True), response(40, True)]
    assert preference_pairs(rows) == [(best, rows[2]), (best, rows[4]), (best, rows[5])]
    assert preference_pairs([response(3, False), response(9, False)]) == []


def test_what_has_no_text_or_was_cut_off_is_neither_chosen_nor_rejected():
    best, longer = response(20, True), response(90, False)
    blank = [Response("  ", 5, True, Ending.STOP), Response("", 95, False, Ending.STOP)]
    cut = [response(80, False, Ending.LENGTH), response(81, True, Ending.LENGTH)]
    assert preference_pairs([best, *blank, *cut, longer]) == [(best, longer)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long2short")
    return configuration.load(write_recipe(folder, iterations=1), ["data.held_out=6", f"run.folder={folder / 'run'}"])


def test_an_evaluation_holds_pass_at_k_and_the_vote_and_is_the_same_twice(config):
    result = evaluate(config, config.model.folder, greedy=False, samples=6)
    assert result == evaluate(config, config.model.folder, greedy=False, samples=6)
    by_name = {s["name"]: s for s in result["scores"]}
    assert list(by_name) == ["pass@1", "pass@2", "pass@4", "pass@6", "maj@6"] and result["n"] == 6
    means = [by_name[f"pass@{k}"]["mean"] for k in (1, 2, 4, 6)]
    assert means == sorted(means) and means[0] == result["mean"]
    assert all(s["low"] <= s["mean"] <= s["high"] for s in result["scores"])


def test_prompts_without_answers_cannot_be_evaluated(config):
    exact = config.model_copy(update={"rewards": config.rewards.model_copy(update={"terms": ()})})
    with pytest.raises(DataError, match="prompts.jsonl, line 1, .*: `answer` is blank, and exact compares"):
        evaluate(exact, config.model.folder)


def test_the_summary_of_responses_by_hand():
    rows = [[response(4, True), response(8, False)], [response(2, False), response(2, False)]]
    found = summary(rows, seed=0, prefix=None, model="m", split="held_out", greedy=False, temperature=1.0)
    assert [(s.name, s.mean) for s in found.scores] == [("pass@1", 0.25), ("pass@2", 0.5), ("maj@2", 0.5)]
    assert (found.mean_tokens, found.correct_tokens) == (4.0, 4.0)
