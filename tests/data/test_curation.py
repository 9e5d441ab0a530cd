"""The rules of curation by examples; a whole curation of a random model, interrupted and gone on with."""

import json

import numpy as np
import pytest

from megatron_rl import config as configuration
from megatron_rl.config import SamplerConfig
from megatron_rl.curate import Rules, curate
from megatron_rl.data import curation
from megatron_rl.data.curation import Verdict
from megatron_rl.data.jsonl import read_jsonl
from megatron_rl.data.samplers import make_sampler
from megatron_rl.data.sources import load_prompts
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.types import Message, Prompt
from tests.resume.recipe import write_recipe

RULES = Rules(samples=4, tries=1, answer_tokens=2, highest=0.75, in_flight=5)


def prompt(text: str, answer: str = "5") -> Prompt:
    return Prompt("p", (Message("user", text),), np.zeros(1, np.int32), answer, "exact")


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("Which? (A) one (B) two", "B", Verdict.MULTIPLE_CHOICE),
        ("Which?\nA. one\nB. two", "(a)", Verdict.MULTIPLE_CHOICE),
        ("Which? (A) one (B) two", "B) two", Verdict.MULTIPLE_CHOICE),
        ("Which?\n(A) one\n(B) Two", "two", Verdict.MULTIPLE_CHOICE),
        ("A. Compute 2+2. B. Compute 3+3.", "4 and 6", None),
        ("Which letter comes after C?", "D", None),
        ("Is 7 prime?", "Yes", Verdict.TRUE_FALSE),
        ("True or false: 1 = 2", "false.", Verdict.TRUE_FALSE),
        ("Prove that 2 is even.", "see text", Verdict.PROOF),
        ("How many proofs improve that?", "3", None),
    ],
)
def test_kinds_that_can_be_guessed_or_not_checked_are_found(text, answer, verdict):
    assert curation.guessable(prompt(text, answer)) is verdict


def test_repeats_differ_in_looks_only():
    key = curation.repeat_key
    assert key(prompt("What is  2+2 ?")) == key(prompt("what is 2+2"))
    assert key(prompt("2-2")) != key(prompt("2+2")) and key(prompt("1.5")) != key(prompt("15"))


def test_the_bounds_of_the_pass_rate_are_kept():
    verdicts = [curation.by_pass_rate(rate, lowest=0.2, highest=0.8) for rate in (0.1, 0.2, 0.8, 0.9)]
    assert verdicts == [Verdict.TOO_HARD, Verdict.KEPT, Verdict.KEPT, Verdict.TOO_EASY]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curation")
    path = write_recipe(folder, iterations=1)
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "0+0 =", "answer": ""}\n{"prompt": "Is 0+0=1?", "answer": "no"}\n')
    return configuration.load(path, ["run.folder=unused"])


def test_an_interrupted_curation_goes_on_to_the_same_end(config, tmp_path):
    counts = curate(config, config.model.folder, tmp_path / "whole", RULES)
    assert sum(counts.values()) == 38 and counts["kept"] and counts["easy_to_hack"], counts
    assert counts["true_false"] == 1
    kept = read_jsonl(tmp_path / "whole" / "kept.jsonl")
    decided = [json.loads(line)["curation"] for line in (tmp_path / "whole" / "kept.jsonl").read_text().splitlines()]
    assert all(d["verdict"] == "kept" and d["reason"].startswith("pass rate") for d in decided)
    assert len(kept) == counts["kept"] and all(r.difficulty in (0, 0.25, 0.5, 0.75) for r in kept)
    plain = config.data.model_copy(update={"path": tmp_path / "whole" / "kept.jsonl"})
    prompts = load_prompts(plain, ChatTokenizer.from_folder(config.model.folder), terms=config.rewards.names).train
    weights = np.array([1 - r.difficulty for r in kept])
    sampler = make_sampler(SamplerConfig(name="prioritized"), prompts, 0, batch=4)
    np.testing.assert_allclose(sampler.probabilities(), weights / weights.sum())  # begins at what was measured
    dropped = [json.loads(line) for line in (tmp_path / "whole" / "dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 38 - counts["kept"] and all(line["curation"]["reason"] for line in dropped)

    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
    lines = (tmp_path / "whole" / "decisions.jsonl").read_text()
    (cut / "decisions.jsonl").write_text(lines[: len(lines) // 2])  # within a line
    assert curate(config, config.model.folder, cut, RULES) == counts
    for name in ("kept.jsonl", "dropped.jsonl", "report.json"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_settings_and_an_empty_result_are_refused(config, tmp_path):
    strict = Rules(samples=1, tries=1, lowest=0.5, highest=0.6)
    with pytest.raises(DataError, match="nothing is left of 38 prompts; dropped.jsonl says why"):
        curate(config, config.model.folder, tmp_path / "none", strict)
    with pytest.raises(DataError, match="began with other settings or prompts"):
        curate(config, config.model.folder, tmp_path / "none", RULES)
    text = config.data.path.read_text()
    try:
        config.data.path.write_text(text.replace('"answer": "no"', '"answer": "one half"'))  # its verdict would be stale
        with pytest.raises(DataError, match="began with other settings or prompts"):
            curate(config, config.model.folder, tmp_path / "none", strict)
    finally:
        config.data.path.write_text(text)
