"""What each reward term says, called directly; `test_scorer.py` has them under deadlines."""

import inspect
import json
import re
import sys

import numpy as np
import pytest

from megatron_rl.config import DataConfig
from megatron_rl.data.reasoning_gym import generate
from megatron_rl.errors import DataError, RewardError
from megatron_rl.rewards import exact, reasoning_gym, regex
from megatron_rl.rewards import math as math_term
from megatron_rl.rewards.terms import check_name, load_term
from megatron_rl.types import Message, Prompt


def source_of_module(cls: type) -> str:
    return inspect.getsource(sys.modules[cls.__module__])


def prompt(answer: str = "12", **tags: str) -> Prompt:
    tags = {name.replace("__", "."): value for name, value in tags.items()}
    return Prompt("p", (Message("user", "?"),), np.zeros(1, np.int32), answer, "exact", tags)


@pytest.mark.parametrize(
    ("response", "prefix", "value"),
    [
        ("12", None, 1.0),
        ("  12\n", None, 1.0),
        ("13", None, 0.0),
        ("", None, None),
        ("Answer: 12", None, 0.0),
        ("Answer: 12", "Answer:", 1.0),
        ("Answer: 3, no. Answer: 12\nthank you", "Answer:", 1.0),
        ("Answer: 12\nAnswer: 3", "Answer:", 0.0),
        ("12", "Answer:", None),
        ("Answer:\n12", "Answer:", None),
    ],
)
def test_exact_reads_the_rest_of_the_line_after_the_last_prefix(response, prefix, value):
    assert exact.score(response=response, answer="12", prompt=prompt(), prefix=prefix) == value


def test_exact_ignores_case_and_whitespace_but_not_meaning():
    assert exact.score(response="new  YORK", answer="New York", prompt=prompt()) == 1.0
    assert exact.score(response="cafe\u0301", answer="caf\u00e9", prompt=prompt()) == 1.0
    assert exact.score(response="x2", answer="x\u00b2", prompt=prompt()) == 0.0


def test_regex_compares_its_group_in_the_last_match():
    pattern = r"\[(\d+)\]"
    assert regex.score(response="[3] then [12]", answer="12", prompt=prompt(), pattern=pattern) == 1.0
    assert regex.score(response="[12] then [3]", answer="12", prompt=prompt(), pattern=pattern) == 0.0
    assert regex.score(response="12", answer="12", prompt=prompt(), pattern=pattern) is None


@pytest.mark.parametrize(
    ("response", "answer", "equal"),
    [
        ("so it is \\boxed{12}", "12", True),
        ("The answer is 12.", "12", True),
        ("The answer is 13.", "12", False),
        ("$\\frac{1}{2}$", "0.5", True),
        ("\\boxed{\\frac12}", "\\frac{1}{2}", True),
        ("\\boxed{0.5}", "$\\frac{1}{2}$", True),
        ("\\boxed{(a+2)(a-2)}", "a^2-4", True),
        ("\\boxed{(a+2)(a-2)}", "a^2+4", False),
        ("It is \\boxed{3}. Wait, no. It is \\boxed{4}.", "4", True),
        ("It is \\boxed{3}. Wait, no. It is \\boxed{4}.", "3", False),
        ("$$x = \\boxed{4}$$", "4", True),
        ("\\boxed{\\boxed{4}}", "4", True),
        ("\\boxed{4}, because 7 - 3 = 4 and not 5", "4", True),
        ("\\boxed{1,234}", "1234", True),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),
        ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", True),
        ("\\boxed{[1,2)}", "(1,2]", False),
        ("-7", "-7", True),
        ("7", "-7", False),
        ("Paris", "paris", True),
    ],
)
def test_math_compares_values(response, answer, equal):
    assert math_term.verify(response, answer) is equal


@pytest.mark.parametrize("text", ["", " ", "{", "}", "\\boxed{", "\\boxed{}", "$", "$\\frac{1}{0}$", "\x00\ud800", "(" * 200])
def test_math_takes_odd_text_on_both_sides_without_raising(text):
    assert math_term.verify(text, "12") is False
    assert math_term.verify("12", text) is False


def test_math_tells_no_answer_from_a_wrong_one():
    assert math_term.score(response="I do not know", answer="12") is None
    assert math_term.score(response="13", answer="12") == 0.0


def test_reasoning_gym_scores_by_the_tasks_own_rule():
    entry = {"question": "?", "answer": "12", "metadata": {}}
    tagged = prompt(reasoning_gym__task="basic_arithmetic", reasoning_gym__entry=json.dumps(entry))

    def score(response: str, prefix: str | None = None) -> float | None:
        return reasoning_gym.score(response=response, answer="12", prompt=tagged, prefix=prefix)

    assert score("12") == 1.0
    assert score("13") == 0.0
    assert 0.0 < score("it is 12") < 1.0  # its partial credit for an answer inside other text
    assert score("Answer: 12", prefix="Answer:") == 1.0
    assert score("12", prefix="Answer:") is None


def test_nothing_that_a_model_wrote_is_executed(tmp_path):
    """Which tasks would: those with an eval in their module, but for the ones that evaluate text of their own."""
    from reasoning_gym.factory import DATASETS

    evaluates = {n for n, (cls, _) in DATASETS.items() if re.search(r"\b(eval|exec|parse_expr)\(", source_of_module(cls))}
    own = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic"}
    assert evaluates - own == reasoning_gym.EXECUTED | reasoning_gym.EVALUATED_ARITHMETIC

    def score(task: str, response: str) -> float | None:
        entry = {"question": "?", "answer": "5 - 2", "metadata": {"numbers": [5, 2], "target": 3}}
        tagged = prompt(reasoning_gym__task=task, reasoning_gym__entry=json.dumps(entry))
        return reasoning_gym.score(response=response, answer="", prompt=tagged)

    deed = f"__import__('pathlib').Path('{tmp_path}/done').touch()"
    for task in reasoning_gym.EXECUTED:
        with pytest.raises(RewardError, match=f"reasoning-gym scores {task} by evaluating the response as Python"):
            score(task, deed)
    assert [score("countdown", text) for text in ("5 - 2", deed, "5 .real - 2")] == [1.0, 0.0, 0.0]
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="data.task=spiral_matrix: reasoning-gym scores spiral_matrix by evaluating"):
        generate(DataConfig(source="reasoning_gym", task="spiral_matrix"))


def test_reasoning_gym_refuses_prompts_of_other_sources():
    with pytest.raises(RewardError, match="term reasoning_gym cannot judge prompt p"):
        reasoning_gym.score(response="12", answer="12", prompt=prompt())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, "the nearest is exact"),
        ("regex", {}, "missing a required argument: 'pattern'"),
        ("regex", {"pattern": "("}, "correct it"),
        ("regex", {"pattern": "ab"}, "has 0 groups"),
        ("exact", {"prefx": "A:"}, "unexpected keyword argument 'prefx'"),
        ("no_such_module:f", {}, "cannot import no_such_module"),
        ("json:no_such_function", {}, "has no function no_such_function"),
        ("json:loads", {}, "cannot be called with"),
    ],
)
def test_unusable_terms_are_refused_by_name(name, options, message):
    with pytest.raises(RewardError, match="(?s)^rewards: .*" + message.replace("(", r"\(")):
        load_term(name, options)


def test_names_are_checked_without_importing():
    check_name("no_such_module:function")
    with pytest.raises(RewardError, match="no term 'no_such_module:'"):
        check_name("no_such_module:")
