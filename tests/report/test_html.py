import dataclasses
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_run import make_run
from transformers import AutoTokenizer

from megatron_rl.errors import DataError
from megatron_rl.report import sections
from megatron_rl.report.html import page, write_report
from megatron_rl.report.run_data import Trained, open_buffer, read_run, run_config
from megatron_rl.report.samples import choose, coloured_tokens, token_texts
from megatron_rl.report.sections import categories, chosen_settings, quarters
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.types import Ending, Message, Prompt, Segment, Trajectory


class Tokens(HTMLParser):
    """What a browser would show of the sampled trajectories: [(id, [(version, colour class, log-prob, text), ...])]."""

    def __init__(self, markup):
        super().__init__()
        self.samples, self.segment, self.token, self.title = [], None, None, False
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "span" and "data-v" in attrs:
            self.segment = (int(attrs["data-v"]), attrs["class"])
        if tag == "i" and "data-p" in attrs:
            self.token = [*self.segment, float(attrs["data-p"]), ""]
            self.samples[-1][1].append(self.token)
        self.title = tag == "b"

    def handle_endtag(self, tag):
        self.token, self.title = None, False

    def handle_data(self, data):
        if self.token is not None:
            self.token[3] += data
        elif self.title and (found := re.fullmatch(r"Trajectory (\d+)", data)):
            self.samples.append((int(found[1]), []))


@pytest.fixture(scope="module")
def markup(run_folder):
    return write_report(run_folder).read_text()


def test_the_report_loads_nothing(markup):
    assert not re.search(r"https?:|//[a-z]|\ssrc=|\shref=|url\(|@import|<link|<iframe", markup)


def test_the_report_has_every_section(markup):
    titles = re.findall(r"<h2>(.*?)</h2>", markup)
    assert titles == [
        "Reward and correctness",
        "Response length",
        "Held-out prompts, before and after",
        "Success by difficulty and tag",
        "Time of each phase",
        "Tokens",
        "How segments ended",
        "Staleness",
        "Engine and trainer",
        "Conservation",
        "Configuration",
        "Sampled trajectories",
        "Further metrics",
    ]
    assert "no data" not in markup and "broken" not in markup


def test_turns_on_a_shared_gpu_have_one_card_for_memory_and_their_place_among_the_phases(run_folder):
    run = read_run(run_folder)
    turns = {f"time/{turn}_s": 0.5 for turn in ("release", "onload", "offload", "resume")}
    states = ("released", "onloaded", "trained", "resumed", "published", "generating")
    memory = {f"memory/gpu_{kind}_{state}_bytes": 3e10 for kind in ("free", "allocated") for state in states}
    shared = dataclasses.replace(run, rows=[row | turns | memory for row in run.rows])
    assert sections.shared_gpu_card(run) == "" and "memory/gpu_" not in sections.others_card(shared)
    assert [state for state in states if state in sections.shared_gpu_card(shared)] == list(states)
    shown = re.findall(r">(release|onload|train|offload|resume|publish)<", sections.phases_card(shared))
    assert shown[-6:] == ["release", "onload", "train", "offload", "resume", "publish"]


def test_every_token_of_every_sample_has_the_colour_of_its_version_its_log_prob_and_its_text(markup, run_folder):
    shown = Tokens(markup).samples
    config = run_config(run_folder)
    tokenizer = AutoTokenizer.from_pretrained(config.model.folder)
    assert len(shown) == config.report.samples
    with open_buffer(config) as buffer:
        trajectories = buffer.trajectories([i for i, _ in shown])
    for (_, tokens), trajectory in zip(shown, trajectories, strict=True):
        assert [version for version, *_ in tokens] == trajectory.weight_versions.tolist()
        assert all(colour == f"seg v{version % 8}" for version, colour, *_ in tokens)
        np.testing.assert_allclose([p for _, _, p, _ in tokens], trajectory.log_probs, atol=5e-4)
        text = "".join(t for *_, t in tokens).replace("⏎", "").replace("·", "")
        assert text == tokenizer.decode(trajectory.token_ids)


def test_trajectories_of_several_versions_come_first_then_early_and_late_ones(run_folder):
    run = read_run(run_folder)
    facts = {t.trajectory_id: t for t in run.trained}
    chosen = [facts[i] for i in choose(run.trained, 8)]
    assert all(t.num_versions > 1 for t in chosen[:4])
    spread = [t.iteration for t in chosen[:4]]
    assert spread == sorted(spread) and len(set(spread)) >= 3, "spread over the run"
    iterations = [t.iteration for t in run.trained]
    assert [t.iteration for t in chosen[4:]] == [min(iterations), max(iterations)] * 2, "from both ends in turn"
    assert {t.correct for t in chosen[4::2]} == {t.correct for t in chosen[5::2]} == {True, False}


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=30), st.integers(0, 20))
def test_a_choice_is_as_large_as_it_can_be_without_repeats(kinds, count):
    trained = [Trained(i, i // 3, 0.0, correct, versions, 5, {}, None) for i, (versions, correct) in enumerate(kinds)]
    ids = choose(trained, count)
    assert len(ids) == len(set(ids)) == min(count, len(trained))


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_tokenizer_folder):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_folder)


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=20))
def test_token_texts_join_to_the_decoded_whole(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    texts = token_texts(byte_tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == byte_tokenizer.decode(ids)


def test_a_character_cut_in_two_by_the_end_is_still_shown(byte_tokenizer):
    ids = byte_tokenizer.encode("aé")[:-1]
    assert token_texts(byte_tokenizer, ids) == ["a", "\ufffd"]


def test_of_a_long_response_the_middle_is_left_out(byte_tokenizer):
    def segment(version, count):
        ids = np.full(count, byte_tokenizer.encode("x")[0], np.int32)
        zeros = np.zeros(count, np.float32)
        return Segment(version, version, 0, 1.0, "e", Ending.BUDGET, ids, zeros, np.full(count, version, np.int32), zeros == 0)

    prompt = Prompt("p", (Message("user", "q"),), np.zeros(3, np.int32), "", "exact")
    trajectory = Trajectory(0, 0, (segment(0, 500), segment(1, 4000), segment(2, 500)))
    markup = coloured_tokens(trajectory, prompt, byte_tokenizer, 300)
    assert markup.count("data-p") == 300
    assert markup.count("4,700 tokens not shown") == 1
    assert [int(v) for v in re.findall(r'data-v="(\d)"', markup)] == [0, 1, 2]


def test_success_by_category_counts_as_the_rows_do(run_folder):
    run = read_run(run_folder)
    assert [(key, value) for key, value, _ in categories(run.trained)] == [
        ("pass rate", "0.2 to 0.4"),
        ("pass rate", "0.6 to 0.8"),
        ("digits", "1"),
        ("digits", "2"),
        ("operator", "difference"),
        ("operator", "sum"),
    ]
    by_pass_rate, by_digits = (
        [belongs(t) for t in run.trained] for _, _, belongs in (categories(run.trained)[0], categories(run.trained)[3])
    )
    assert by_pass_rate == by_digits == [t.tags["digits"] == "2" for t in run.trained], "two digits are the hard ones"
    early, late = quarters(run)
    iterations = [t.iteration for t in run.trained]
    assert early == [t for t in run.trained if t.iteration == min(iterations)], (
        "a quarter of seven iterations that trained is one"
    )
    assert late == [t for t in run.trained if t.iteration == max(iterations)]


def test_the_rows_of_the_report_are_those_of_the_buffer(run_folder):
    run = read_run(run_folder)
    with open_buffer(run.config) as buffer:
        batches = [(i, t) for i in range(8) for g in buffer.batch(i) or [] for t in g.trajectories]
    assert [(t.iteration, t.trajectory_id, t.correct, t.num_tokens) for t in run.trained] == [
        (i, t.id, t.outcome.correct, t.num_tokens) for i, t in batches
    ]
    assert [t.num_versions for t in run.trained] == [len(set(t.weight_versions.tolist())) for _, t in batches]


def test_the_configuration_shows_what_was_chosen_and_no_default(run_folder):
    chosen = dict(chosen_settings(run_config(run_folder)))
    assert chosen["rollout.token_budget"] == "24" and chosen["training.optimizer.lr"] == "5.0e-06"
    assert "rollout.temperature" not in chosen


def test_text_from_outside_cannot_become_markup(tmp_path, tiny_tokenizer_folder):
    folder = make_run(tmp_path / "run", tiny_tokenizer_folder, 3)
    with_markup = ReplayBuffer(folder / "buffer.sqlite", "run-1")
    with_markup._file.execute(
        "UPDATE prompt SET answer = ?, messages = ?", ("<b id=1>", '[["user", "<script>alert(1)</script>"]]')
    )
    with_markup.close()
    markup = write_report(folder).read_text()
    assert markup.count("<script>") == 1 and "<b id=1>" not in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in markup


def test_a_run_that_has_trained_nothing_yet_has_a_report(tmp_path, tiny_tokenizer_folder):
    markup = page(read_run(make_run(tmp_path / "run", tiny_tokenizer_folder, 0)))
    assert markup.count("no data") >= 6 and "Conservation" in markup


def test_without_its_tokenizer_a_run_still_has_a_report_with_token_ids(tmp_path, tiny_tokenizer_folder):
    model = shutil.copytree(tiny_tokenizer_folder, tmp_path / "model")
    folder = make_run(tmp_path / "run", model, 2)
    shutil.rmtree(model)
    tokens = Tokens(write_report(folder).read_text()).samples[0][1]
    assert all(text.strip().isdigit() for *_, text in tokens)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        write_report(tmp_path)
