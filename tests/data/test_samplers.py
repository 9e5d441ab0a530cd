"""Samplers: their distributions, and that a restored one goes on as if nothing had happened."""

import json
import logging
from collections import Counter

import numpy as np
import pytest

from megatron_rl.config import SamplerConfig
from megatron_rl.data.samplers import Curriculum, Prioritized, Uniform, make_sampler
from megatron_rl.errors import DataError
from megatron_rl.types import Message, Prompt

NAMES = ("uniform", "curriculum", "prioritized")


def prompts(*difficulties: float | None) -> list[Prompt]:
    return [
        Prompt(f"p{i}", (Message("user", str(i)),), np.zeros(1, np.int32), "", "exact", difficulty=difficulty)
        for i, difficulty in enumerate(difficulties)
    ]


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def chi_square(drawn: list[str], expected: dict[str, float]) -> float:
    """Sum over prompts of (seen - expected)^2 / expected, with `expected` probabilities."""
    counts, n = Counter(drawn), len(drawn)
    assert set(counts) <= set(expected)
    return sum((counts[name] - n * p) ** 2 / (n * p) for name, p in expected.items())


def test_uniform_draws_every_prompt_once_an_epoch_in_changing_order():
    sampler = Uniform(prompts(*[None] * 7), seed=3)
    epochs = [ids(sampler.draw(7)) for _ in range(20)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert ids(Uniform(prompts(*[None] * 7), seed=4).draw(7)) != epochs[0]


def test_prioritized_draws_in_proportion_to_one_minus_success():
    rates = (0.0, 0.25, 0.5, 0.75, 1.0)
    sampler = Prioritized(prompts(*rates), seed=0, smoothing=0.5, floor=0.0)
    drawn = ids(sampler.draw(5000))
    total = sum(1 - rate for rate in rates)
    expected = {f"p{i}": (1 - rate) / total for i, rate in enumerate(rates) if rate < 1}
    assert chi_square(drawn, expected) < 16.27  # 3 degrees of freedom, p = 0.001


def test_prioritized_follows_what_it_observes():
    sampler = Prioritized(prompts(None, None, 0.8), seed=0, smoothing=0.25, floor=0.1)
    for _ in range(2):
        sampler.observe("p0", [True, True, False, True])
    sampler.observe("p2", [True] * 4)
    s0 = 0.75 * (0.75 * 0.5 + 0.25 * 0.75) + 0.25 * 0.75
    weights = np.array([1 - s0, 1 - 0.5, max(1 - (0.75 * 0.8 + 0.25), 0.1)])
    np.testing.assert_allclose(sampler.probabilities(), weights / weights.sum())
    for _ in range(50):
        sampler.observe("p2", [True] * 4)
    assert sampler.probabilities()[2] > 0, "the floor lets a solved prompt come back"


def test_prioritized_with_everything_solved_and_no_floor_is_uniform():
    sampler = Prioritized(prompts(1.0, 1.0), seed=0, smoothing=0.5, floor=0.0)
    assert set(ids(sampler.draw(50))) == {"p0", "p1"}


def curriculum(*rates: float | None, batch: int) -> Curriculum:
    return Curriculum(prompts(*rates), 0, switch_iteration=5, hard_below=0.5, smoothing=0.5, batch=batch)


def test_curriculum_draws_only_hard_prompts_from_the_switch_on():
    sampler = curriculum(0.1, 0.9, 0.4, None, None, batch=2)
    sampler.begin(4)
    assert sorted(ids(sampler.draw(5))) == ["p0", "p1", "p2", "p3", "p4"]
    sampler.observe("p0", [True] * 8)  # 0.55: no longer hard
    sampler.observe("p3", [False] * 8)  # 0.25: hard now
    sampler.begin(5)
    drawn = ids(sampler.draw(2000))
    assert chi_square(drawn, {"p2": 0.5, "p3": 0.5}) < 10.83  # 1 degree of freedom, p = 0.001


def test_curriculum_that_runs_out_of_hard_prompts_fills_its_batches_from_all_and_says_so_once(caplog):
    sampler = curriculum(0.0, 0.9, 0.9, 0.9, batch=4)
    with caplog.at_level(logging.WARNING):
        sampler.begin(4)
        assert not caplog.records
        sampler.begin(5)
        drawn = ids(sampler.draw(4000))
        sampler.begin(6)
    expected = {
        "p0": 1 / 4 + 3 / 4 / 4,
        **dict.fromkeys(("p1", "p2", "p3"), 3 / 4 / 4),
    }  # once a batch, and a quarter of the rest
    assert chi_square(drawn, expected) < 16.27  # 3 degrees of freedom, p = 0.001
    (record,) = caplog.records
    assert (
        "sampler.hard_below=0.5: in iteration 5 only 1 of 4 prompts are known to have a lower success rate, fewer than "
        "rollout.groups_per_iteration=4; the rest of a batch is drawn from all prompts"
    ) in record.getMessage()


def test_curriculum_without_any_hard_prompt_is_uniform():
    sampler = curriculum(0.9, None, 1.0, batch=4)
    sampler.begin(5)
    assert sorted(ids(sampler.draw(3))) == ["p0", "p1", "p2"]


def history(sampler: Uniform, first: int, last: int) -> list[str]:
    """Iterations of three draws, each observed as a pure function of the prompt and iteration."""
    drawn = []
    for iteration in range(first, last):
        sampler.begin(iteration)
        for prompt in sampler.draw(3):
            drawn.append(prompt.id)
            sampler.observe(prompt.id, [(int(prompt.id[1:]) + iteration + member) % 3 == 0 for member in range(4)])
    return drawn


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_a_restored_sampler_goes_on_exactly(name, stop):
    settings = SamplerConfig(name=name, switch_iteration=3)
    undisturbed = history(make_sampler(settings, prompts(*[None] * 11), 7, batch=3), 0, 12)
    before = make_sampler(settings, prompts(*[None] * 11), 7, batch=3)
    drawn = history(before, 0, stop)
    after = make_sampler(settings, prompts(*[None] * 11), 7, batch=3)
    after.restore(json.loads(json.dumps(before.state())), len(drawn))
    assert drawn + history(after, stop, 12) == undisturbed


@pytest.mark.parametrize("name", NAMES)
def test_draws_do_not_depend_on_how_many_are_asked_for_at_once(name):
    one, many = (make_sampler(SamplerConfig(name=name), prompts(*[0.3] * 5), 1, batch=8) for _ in range(2))
    assert [prompt.id for _ in range(12) for prompt in one.draw(1)] == ids(many.draw(12))


@pytest.mark.parametrize("name", NAMES)
def test_observations_of_prompts_that_left_the_data_are_forgotten(name):
    sampler = make_sampler(SamplerConfig(name=name), prompts(None, None), -1, batch=2)
    sampler.observe("gone", [True])
    sampler.restore({"rates": {"gone": 0.9, "p0": 0.2}}, 0)
    assert "gone" not in json.dumps(sampler.state())
    assert len(sampler.draw(2)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_prompt_set_is_refused(name):
    with pytest.raises(DataError, match="no prompt to train on"):
        make_sampler(SamplerConfig(name=name), [], 0, batch=2)
