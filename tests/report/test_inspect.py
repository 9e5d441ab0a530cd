import io

import pytest
from rich.console import Console

from megatron_rl.errors import DataError
from megatron_rl.report.evaluation import read_evaluation, record_evaluation
from megatron_rl.report.inspect import show_group, show_run, show_trajectory
from megatron_rl.report.run_data import open_buffer, read_run, run_config


def shown(show, *arguments):
    console = Console(file=io.StringIO(), width=160)
    show(*arguments, console)
    return console.file.getvalue()


def test_a_run_is_shown_with_its_conservation_table_and_last_iterations(run_folder):
    text = shown(show_run, run_folder)
    for term in read_run(run_folder).terms:
        assert term.name in text and f"{term.count:,}" in text
    assert "8 of 8" in text and "trained on" in text


def test_a_trajectory_is_shown_with_all_its_segments_and_their_text(run_folder):
    run = read_run(run_folder)
    chosen = next(t for t in run.trained if t.num_versions > 1)
    with open_buffer(run.config) as buffer:
        segments = buffer.trajectories([chosen.trajectory_id])[0].segments
    text = shown(show_trajectory, run_folder, chosen.trajectory_id)
    assert all(f"{i}       │ {s.iteration}" in text and s.ending in text for i, s in enumerate(segments))
    assert "Answer:" in text and "<|end|>" in text


def test_a_group_is_shown_with_its_dropped_members(run_folder):
    run = read_run(run_folder)
    with open_buffer(run.config) as buffer:
        dropped = next(s for s in buffer.statuses() if s.dropped_reason)
    text = shown(show_group, run_folder, dropped.group_id)
    assert "dropped: reward" in text and "right answer" in text


@pytest.mark.parametrize("show", [show_group, show_trajectory])
def test_an_unknown_id_is_answered_with_the_known_ones(run_folder, show):
    with pytest.raises(DataError, match="99999: not in .*it holds 0 to"):
        show(run_folder, 99999, Console())


def test_a_buffer_on_another_machine_is_said(run_folder, tmp_path):
    text = (run_folder / "config.yaml").read_text().replace("buffer:\n  path: null", "buffer:\n  path: /nowhere/buffer.sqlite")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match="/nowhere/buffer.sqlite: no replay buffer here"):
        show_run(tmp_path, Console())


def test_a_moved_run_is_read_where_it_lies(run_folder, tmp_path):
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert run_config(tmp_path).run.folder == tmp_path


def test_greedy_and_sampled_results_of_one_moment_are_kept_together(tmp_path):
    greedy = {"model": "m", "n": 5, "samples": 1, "greedy": True, "mean": 0.4, "low": 0.2, "high": 0.6}
    sampled = {**greedy, "greedy": False, "samples": 8, "mean": 0.3}
    record_evaluation(tmp_path, "before", sampled)
    record_evaluation(tmp_path, "before", greedy)
    record_evaluation(tmp_path, "after", greedy)
    found = read_evaluation(tmp_path)
    assert found["before"] == {**greedy, "sampled_mean": 0.3, "sampled_low": 0.2, "sampled_high": 0.6, "sampled_samples": 8}
    assert found["after"] == greedy


@pytest.mark.parametrize("text", ["{", "[]", '{"before": 1}'])
def test_an_evaluation_file_of_another_form_is_named(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(DataError, match="evaluation.json"):
        read_evaluation(tmp_path)
