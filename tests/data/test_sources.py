"""Prompts from JSONL, reasoning-gym and Hugging Face folders: what comes out, and what is refused, with its place."""

import json

import numpy as np
import pytest

from megatron_rl.config import DataConfig
from megatron_rl.data.sources import load_prompts
from megatron_rl.errors import DataError
from megatron_rl.rewards import reasoning_gym
from megatron_rl.types import Message


class Bytes:
    """A tokenizer of one token a byte."""

    def encode_chat(self, messages):
        return np.frombuffer("".join(message.content for message in messages).encode(), np.uint8).astype(np.int32)


def load(path, *lines, **options):
    path = path / "questions.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return load_prompts(DataConfig(source="jsonl", path=path, **options), Bytes())


def questions(n):
    return [json.dumps({"prompt": f"question {i}", "answer": str(i)}) for i in range(n)]


def test_all_fields_are_read(tmp_path):
    full = {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}],
        "answer": 2,
        "verifier": "math",
        "tags": {"topic": "sums"},
        "difficulty": 0.25,
        "source": "a field that is not read",
    }
    first, second = load(tmp_path, json.dumps(full), "", '{"prompt": "2+2", "answer": "4"}', verifier="regex").train
    assert first.messages == (Message("system", "be brief"), Message("user", "1+1"))
    assert (first.answer, first.verifier, first.tags, first.difficulty) == ("2", "math", {"topic": "sums"}, 0.25)
    assert (second.answer, second.verifier, second.tags, second.difficulty) == ("4", "regex", {}, None)
    assert second.token_ids.tolist() == list(b"2+2")


def test_system_message_and_worked_turns_stand_before_the_question(tmp_path):
    turns = ({"question": "1+1", "answer": "Answer: 2"},)
    plain = load(tmp_path, '{"prompt": "2+2", "answer": "4"}').train[0]
    prompt = load(tmp_path, '{"prompt": "2+2", "answer": "4"}', system_message="be brief", worked_turns=turns).train[0]
    assert [(message.role, message.content) for message in prompt.messages] == [
        ("system", "be brief"),
        ("user", "1+1"),
        ("assistant", "Answer: 2"),
        ("user", "2+2"),
    ]
    assert prompt.id == plain.id, "the identity of a question does not depend on how it is presented"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": "b"', "column 30: not valid JSON: .*found the end of the line"),
        ('{"prompt": "a" "answer": "b"}', 'column 16: not valid JSON: .*found \'"answer"'),
        ("[1]", r"column 1: found \[1\]; a question is an object"),
        (b'{"prompt": "\xff", "answer": "b"}', "column 13: byte 0xff is not UTF-8"),
        ('{"answer": "b"}', "column 1: `prompt` is missing"),
        ('{"prompt": "  ", "answer": "b"}', "column 2: `prompt` is '  '"),
        ('{"prompt": "a"}', "column 1: `answer` is missing"),
        ('{"prompt": "a", "answer": 1.5}', "column 17: `answer` is 1.5; give the reference answer as text"),
        ('{"prompt": "a", "messages": [], "answer": "b"}', "column 17: both `prompt` and `messages`"),
        ('{"messages": [{"role": "tool"}], "answer": "b"}', "column 2: `messages` holds {'role': 'tool'}"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}',
            "the last of `messages` is of role assistant",
        ),
        ('{"prompt": "a", "answer": "b", "verifier": "exakt"}', "column 32: .*the nearest is exact"),
        ('{"prompt": "a", "answer": "b", "tags": {"x": 1}}', r"column 32: `tags` is \{'x': 1\}"),
        ('{"prompt": "a", "answer": "b", "difficulty": 30}', "column 32: `difficulty` is 30; .*from 0 to 1"),
        ('{"prompt": "a", "answer": "b", "difficulty": NaN}', "column 32: `difficulty` is nan"),
    ],
)
def test_a_broken_line_is_named_by_file_line_and_column(tmp_path, line, message):
    with pytest.raises(DataError, match="(?s)questions.jsonl, line 3.*" + message):
        load(tmp_path, questions(1)[0], "", line)


def test_files_without_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no question in it"):
        load(tmp_path, "", " ")
    with pytest.raises(DataError, match=r"data.path=.*missing.jsonl: cannot read it: No such file"):
        load_prompts(DataConfig(source="jsonl", path=tmp_path / "missing.jsonl"), Bytes())


def test_a_prompt_longer_than_the_limit_is_named_with_its_length(tmp_path):
    with pytest.raises(DataError, match=r"line 2, column 1: the prompt has 11 tokens, more than data.max_prompt_tokens=10"):
        load(tmp_path, '{"prompt": "short", "answer": "b"}', '{"prompt": "eleven char", "answer": "b"}', max_prompt_tokens=10)


def test_a_blank_answer_is_named_with_its_line_where_responses_are_compared_with_it(tmp_path):
    blank = '{"prompt": "2+2", "answer": " "}'
    with pytest.raises(DataError, match=r"questions.jsonl, line 2, .*: `answer` is blank, and exact .*\(1 of 2 .*; fill it in"):
        load(tmp_path, *questions(1), blank)
    own = '{"prompt": "2+2", "answer": "", "verifier": "math"}'
    with pytest.raises(DataError, match=r"line 2, column 1: `answer` is blank, and math compares"):
        load(tmp_path, *questions(1), own, verifier="my.rewards:judge")
    assert len(load(tmp_path, *questions(1), blank, verifier="my.rewards:judge").train) == 2
    path, data = tmp_path / "questions.jsonl", DataConfig(source="jsonl", path=tmp_path / "questions.jsonl")
    path.write_text(blank + "\n")
    assert len(load_prompts(data, Bytes(), terms=["regex"]).train) == 1, "rewards.terms score in place of the verifier"
    with pytest.raises(DataError, match="exact, math compares"):
        load_prompts(data, Bytes(), terms=["regex", "math", "exact"])


def test_repeats_are_left_out_and_contradictions_refused(tmp_path):
    assert len(load(tmp_path, *questions(3), *questions(3)).train) == 3
    with pytest.raises(DataError, match="line 4, column 1: the same question as .*line 2.*'5', there '1'"):
        load(tmp_path, *questions(3), '{"prompt": "question 1", "answer": "5"}')


def test_a_second_system_message_is_refused(tmp_path):
    line = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "b"}'
    with pytest.raises(DataError, match="it brings its own system message"):
        load(tmp_path, line, system_message="t")


def test_held_out_prompts_are_disjoint_stable_and_independent_of_order(tmp_path):
    lines = questions(50)
    split = load(tmp_path, *lines, held_out=12)
    assert len(split.held_out) == 12 and len(split.train) == 38
    assert not {prompt.id for prompt in split.held_out} & {prompt.id for prompt in split.train}
    again = load(tmp_path, *reversed(lines), held_out=12, system_message="another wording")
    assert {prompt.id for prompt in again.held_out} == {prompt.id for prompt in split.held_out}
    assert {prompt.id for prompt in load(tmp_path, *lines, held_out=12, seed=1).held_out} != {p.id for p in split.held_out}


def test_one_question_under_two_system_messages_is_never_split(tmp_path):
    lines = [
        json.dumps({"messages": [{"role": "system", "content": s}, {"role": "user", "content": f"q{i}"}], "answer": "1"})
        for i in range(20)
        for s in ("a", "b")
    ]
    split = load(tmp_path, *lines, held_out=10)
    held_out = {prompt.messages[-1].content for prompt in split.held_out}
    assert len(split.held_out) == 10 and len(held_out) == 5
    assert not held_out & {prompt.messages[-1].content for prompt in split.train}


def test_holding_everything_out_is_refused(tmp_path):
    with pytest.raises(DataError, match="data.held_out=3: there are only 3 different prompts"):
        load(tmp_path, *questions(3), held_out=3)


def arithmetic(**options):
    task_options = {"min_terms": 2, "max_terms": 2, "max_digits": 1, "allow_negation": False, "allow_parentheses": False}
    return load_prompts(
        DataConfig(source="reasoning_gym", task="basic_arithmetic", task_options=task_options, size=300, **options), Bytes()
    )


def test_reasoning_gym_questions_differ_and_reproduce():
    split = arithmetic(held_out=40)
    prompts = split.train + split.held_out
    texts = [prompt.messages[-1].content for prompt in prompts]
    assert len(set(texts)) == len(texts) < 300 and len(split.held_out) == 40
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert [prompt.id for prompt in arithmetic(held_out=40).train] == [prompt.id for prompt in split.train]
    assert {prompt.messages for prompt in arithmetic(held_out=40, seed=1).train} != {prompt.messages for prompt in split.train}


def test_reasoning_gyms_own_scorer_judges_from_the_prompt_alone():
    for prompt in arithmetic().train[:20]:
        assert prompt.verifier == "reasoning_gym"
        assert reasoning_gym.score(response=f" {prompt.answer}\n", answer=prompt.answer, prompt=prompt) == 1.0
        assert reasoning_gym.score(response="nothing", answer=prompt.answer, prompt=prompt) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "basic_aritmetic"}, "data.task=basic_aritmetic: .*the nearest is basic_arithmetic"),
        ({"task": "basic_arithmetic", "task_options": {"terms": 2}}, "data.task_options=.*unexpected keyword argument 'terms'"),
        ({"task": "basic_arithmetic", "task_options": {"min_terms": 5, "max_terms": 2}}, "basic_arithmetic refuses them"),
        ({"task": "graph_color"}, "its scorer gives its own answer"),
    ],
)
def test_reasoning_gym_settings_are_refused_by_name(options, message):
    with pytest.raises(DataError, match=message):
        load_prompts(DataConfig(source="reasoning_gym", size=2, **options), Bytes())


def test_a_missing_datasets_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="`datasets` is not installed; `pip install datasets`"):
        load_prompts(DataConfig(source="huggingface", path=tmp_path), Bytes())


def test_a_misspelt_verifier_setting_is_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match="data.verifier: .*the nearest is math"):
        load_prompts(DataConfig(source="jsonl", path=tmp_path, verifier="maths"), Bytes())
