"""The ablations' arithmetic and what they train on, without a run."""

from __future__ import annotations

import random
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl import config as configuration
from megatron_rl.rewards import exact

CIRCLE = "{http://www.w3.org/2000/svg}circle"
FOLDER = Path(__file__).parents[1] / "benchmarks" / "ablations"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """run.py and tasks.py, found as a script in their folder finds them."""
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        import run
        import tasks

        yield run, tasks
    finally:
        sys.path[:] = path


def measured(run: ModuleType, correct: list[float], steps: int) -> object:
    """An iteration without a batch first, then one a value, of 10 tokens and 2 seconds each; evaluated before and after."""
    batches = [{"reward/correct": c, "length/mean": 5.0, "tokens/trained": 10, "time/rollout_s": 1.5} for c in correct]
    rows = [{"iteration": i, "time/train_s": 0.5, **row} for i, row in enumerate([{"time/rollout_s": 1.5}, *batches])]
    rows[0] |= {"eval/held_out/pass@1": 0.2, "time/evaluation_s": 100.0}
    rows.append({"iteration": len(rows), "eval/held_out/pass@1": correct[-1]})
    outcome = {"steps": steps, "rows": 3 * steps, "prefill_tokens": steps}
    return run.Measured(rows, outcome | {"evaluation": {"held_out": {"mean": correct[-1], "mean_tokens": 4.0}}})


def test_arms_are_compared_over_as_many_batches_as_all_have_and_costs_over_whole_runs(scripts) -> None:
    run, _ = scripts
    ours = [measured(run, [0.0, 0.2, 0.4, 0.6, 9.0], 100), measured(run, [0.0, 0.2, 0.4, 0.8], 80)]
    peers = [measured(run, [0.0, 0.1, 0.2, 0.35], 200), measured(run, [0.0, 0.1, 0.2, 0.35], 200)]
    rows = run.compared(run.ABLATIONS["partial"], {"partial": ours, "full": peers})
    last = next(row for row in rows if "batches 4 to 4" in row.case and row.unit == "share")
    assert (last.ours, last.peer, last.ratio_to_peer, last.spread["ours"]) == (0.7, 0.35, 2.0, (0.6, 0.8))
    speed = next(row for row in rows if row.unit == "tokens/s")  # 50 tokens in 12 s, 40 in 10 s
    assert speed.ours == pytest.approx((50 / 12 + 40 / 10) / 2, abs=1e-4) and speed.peer == pytest.approx(40 / 10)
    steps = next(row for row in rows if row.unit == "steps")  # fewer are better: the ratio is the peer's over ours
    assert (steps.ours, steps.peer, steps.ratio_to_peer) == (2000.0, 5000.0, 2.5)


def test_arms_of_other_batches_are_compared_on_fixed_questions_each_with_the_first(scripts) -> None:
    run, _ = scripts
    arms = {
        "curriculum": [measured(run, [0.9, 0.6], 1)],
        "uniform": [measured(run, [0.1, 0.4], 1)],
        "other": [measured(run, [0.8], 1)],
    }
    rows = run.compared(run.ABLATIONS["sampling"], arms)
    means = [(row.ours, row.peer, row.peer_name) for row in rows if "mean of all" in row.case]
    assert means == [(0.4, 0.3, "uniform"), (0.4, 0.5, "other")]  # of 0.2 before training and the last value after it
    assert not any("batches" in row.case for row in rows)
    picture = run.drawn(run.ABLATIONS["sampling"], arms, [0])
    assert picture.count("<path") == 6 and "2 iterations" not in picture and "3 iterations" in picture


def test_a_picture_shows_every_seed_and_each_mean_and_says_what_was_cut(scripts) -> None:
    from picture import scatter

    run, _ = scripts
    arms = {"a": [measured(run, [0.1 * i] * 8, 1) for i in range(3)], "b": [measured(run, [0.5] * 6, 1)] * 3}
    picture = run.drawn(run.ABLATIONS["rest_chain"], arms, [0, 1, 2])
    paths = ElementTree.fromstring(picture).findall(".//{http://www.w3.org/2000/svg}path")
    assert sum("faint" in p.get("class", "") for p in paths) == 6 and len(paths) == 8
    dots = ElementTree.fromstring(scatter("", {"a": [(2, 0.5), (4, 0.7)], "b": [(3, 0.6)]}, "")).iter(CIRCLE)
    means = {(c.get("cx"), c.get("cy")) for c in dots if c.get("r") == "5"}
    assert len(means) == 1  # both models need 3 tokens and are right in 0.6
    assert "Seeds 0, 1, 2 (faint), their mean; 7 to 9 iterations, cut at batch 6; means of 5." in picture
    whole = run.drawn(run.ABLATIONS["rest_chain"], {"a": arms["a"][:1], "b": arms["a"][1:2]}, [0])
    assert "Seeds 0 (faint), their mean; 9 iterations, nothing cut; means of 5." in whole


def test_every_arm_is_a_configuration_that_the_package_accepts(scripts) -> None:
    run, tasks = scripts
    for ablation in run.ABLATIONS.values():
        for name in ablation.arms.values():
            task, overrides = run.RUNS[name]
            assert configuration.load(FOLDER / f"{task}.yaml", list(overrides)) and task in tasks.TASKS
    used = [name for ablation in run.ABLATIONS.values() for name in ablation.arms.values()]
    assert set(used) == set(run.RUNS)
    assert configuration.load_supervised(configuration.DPOConfig, FOLDER / "dpo.yaml")


def test_held_out_questions_are_in_neither_split_twice_and_have_every_difficulty(scripts) -> None:
    _, tasks = scripts
    for task in tasks.TASKS.values():
        trained, held_out = tasks.split(task.questions())
        assert len(trained) == 4 * len(held_out) and not set(trained) & set(held_out)
    ways = [len(answer) for _, answer in tasks.split(tasks.chains())[1]]
    assert min(ways) == 2 and max(ways) > 40


def test_many_at_once_makes_what_is_missing_and_stops_at_the_limit(scripts, tmp_path, monkeypatch) -> None:
    import side_by_side

    script = tmp_path / "job.py"
    script.write_text("import sys, time\nif sys.argv[1] == 'bad': sys.exit('broken')\ntime.sleep(float(sys.argv[1]))\n")
    monkeypatch.setattr(side_by_side, "HERE", tmp_path)
    bench = side_by_side.Bench(seconds=3.0, num_jobs=5, environment={})

    def job(argument: str) -> object:
        (tmp_path / argument).mkdir()
        (tmp_path / argument / "left").touch()
        return side_by_side.Job(argument, argument, ["job.py", argument], tmp_path / argument)

    for chain in (["0"], ["bad", "1"], ["60"], ["0.5"]):
        bench.run_chain([job(argument) for argument in chain])
    assert bench.counts == {"done": 1, "failed": 1, "not started": 2, "stopped": 1}
    assert not (tmp_path / "60").exists() and (tmp_path / "1" / "left").exists()  # one was stopped, one never touched
    assert "broken" in (tmp_path / "bad.log").read_text()


def test_warm_up_responses_have_the_form_and_are_right_only_sometimes(scripts) -> None:
    _, tasks = scripts
    for name, prefix in (("chain", None), ("sum", "=")):
        draw, task = random.Random(0), tasks.TASKS[name]
        questions = task.questions()
        assert len({question for question, _ in questions}) == len(questions)
        scores = [
            exact.score(response=task.response(draw, question, answer), answer=answer, prompt=None, prefix=prefix)
            for question, answer in questions * 3
        ]
        assert None not in scores and 0.2 < sum(scores) / len(scores) < 0.8
