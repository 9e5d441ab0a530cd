"""Rollout phases over a fake engine: who generates, how much, when a phase ends, and what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_engine import STOP, FakeEngine, response_token
from material import append, config, finish, prompt
from phases import Scorer, endings, rollout, run

from megatron_rl.rollout.buffer import ReplayBuffer, TrajectoryState
from megatron_rl.types import DropReason, Ending


@pytest.fixture
def buffer(tmp_path: Path) -> ReplayBuffer:
    return ReplayBuffer(tmp_path / "buffer.sqlite")


def test_a_trajectory_beyond_its_budget_waits_and_goes_on_with_the_tokens_it_would_have_had(buffer: ReplayBuffer):
    phase = rollout(buffer, FakeEngine(lambda t: 25), config(groups_per_iteration=1, max_open_groups=1))
    assert run(phase, 0) == [] and run(phase, 1) == []
    (group,) = run(phase, 2)
    for trajectory in group.trajectories:
        assert endings(buffer, trajectory.id) == [(10, Ending.BUDGET), (10, Ending.BUDGET), (5, Ending.STOP)]
        assert trajectory.token_ids.tolist() == [response_token(trajectory.id, p) for p in range(24)] + [STOP]
        assert [s.iteration for s in trajectory.segments] == [0, 1, 2]
        assert trajectory.outcome is not None
    assert [buffer.generated_tokens(i) for i in range(3)] == [20, 20, 10]


def test_unfinished_groups_come_first_and_fresh_ones_fill_the_open_slots(buffer: ReplayBuffer):
    # Even groups need two phases, odd ones one; at most two groups are incomplete at any time.
    engine = FakeEngine(lambda t: 15 if (t // 2) % 2 == 0 else 4)
    phase = rollout(buffer, engine, config(groups_per_iteration=2, max_open_groups=2))
    assert [g.id for g in run(phase, 0)] == [1]  # groups 0 and 2 are incomplete, so no more may be drawn
    assert buffer.num_drawn == 3
    asked = len(engine.requests)
    batch = run(phase, 1)
    assert [r.trajectory_id for r in engine.requests[asked : asked + 4]] == [0, 1, 4, 5]
    assert len(batch) == 2 and all(t.outcome for g in batch for t in g.trajectories)
    assert [g.id for g in batch] == sorted(g.id for g in batch)


def test_the_phase_ends_when_the_batch_is_complete_and_aborts_the_rest(buffer: ReplayBuffer):
    phase = rollout(buffer, FakeEngine(lambda t: 3 if t < 4 else 30), config(token_budget=30, max_open_groups=6))
    assert [g.id for g in run(phase, 0)] == [0, 1]
    rest = buffer.open_groups()
    assert len(rest) >= 4
    for trajectory in (t for g in rest for t in g.trajectories):
        assert trajectory.ending in (None, Ending.ABORT, Ending.STOP)
        assert trajectory.token_ids.tolist() == [response_token(trajectory.id, p) for p in range(trajectory.num_tokens)]
    assert sum(t.num_tokens for t in buffer.trajectories(range(100))) == buffer.generated_tokens(0)


def test_full_rollouts_draw_what_the_batch_needs_and_wait_for_all_of_it(buffer: ReplayBuffer):
    engine = FakeEngine(lambda t: 3 if t < 4 else 30)
    phase = rollout(buffer, engine, config(token_budget=40, max_open_groups=6, groups_per_iteration=3, partial=False))
    assert [[g.id for g in run(phase, i)] for i in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert buffer.num_drawn == 6 and buffer.open_groups() == []
    assert {s.ending for t in buffer.trajectories(range(12)) for s in t.segments} == {Ending.STOP}


def test_surplus_groups_go_first_next_time_without_generating(buffer: ReplayBuffer):
    for i in range(5):
        buffer.draw(prompt(i), 2, 0)
        for t in (2 * i, 2 * i + 1):
            finish(buffer, t)
    engine = FakeEngine(lambda t: 3)
    phase = rollout(buffer, engine, config())
    assert [g.id for g in run(phase, 1)] == [0, 1]
    assert [g.id for g in run(phase, 2)] == [2, 3]
    assert engine.requests == []
    assert run(phase, 3)[0].id == 4 and engine.requests != []


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_response_tokens": 13}, [(10, Ending.BUDGET), (3, Ending.LENGTH)]),
        ({"max_response_tokens": 10}, [(10, Ending.LENGTH)]),
        ({"max_segments": 2}, [(10, Ending.BUDGET), (10, Ending.LENGTH)]),
        ({"max_response_tokens": 1000, "token_budget": 40}, [(40, Ending.BUDGET), (21, Ending.LENGTH)]),  # 64 - 3 of the prompt
    ],
)
def test_a_response_ends_as_length_at_each_limit_and_is_trained(buffer: ReplayBuffer, limits: dict, expected: list):
    scorer = Scorer()
    phase = rollout(buffer, FakeEngine(lambda t: 10_000), config(groups_per_iteration=1, max_open_groups=1, **limits), scorer)
    for iteration in range(len(expected) - 1):
        assert run(phase, iteration) == []
    (group,) = run(phase, len(expected) - 1)
    assert [endings(buffer, t.id) for t in group.trajectories] == [expected] * 2
    assert scorer.endings == [Ending.LENGTH] * 2


def test_a_phase_that_ends_in_a_trajectorys_last_segment_ends_it(buffer: ReplayBuffer):
    settings = config(groups_per_iteration=1, max_open_groups=2, token_budget=40, max_segments=1)
    engine = FakeEngine(lambda t: 2 if t < 2 else 200, chunk=1)
    assert [g.id for g in run(rollout(buffer, engine, settings), 0)] == [0]
    for trajectory in buffer.trajectories([2, 3]):
        assert trajectory.num_tokens == 0 or trajectory.ending is Ending.LENGTH and trajectory.outcome is not None


@pytest.mark.parametrize("chunk", [1, 7])
def test_a_repeating_response_is_stopped_where_it_repeats(buffer: ReplayBuffer, chunk: int):
    # Trajectory 0 repeats two tokens from position 5 on; eight tokens of it are allowed.
    engine = FakeEngine(lambda t: 30, chunk=chunk, token=lambda t, p: 1000 + p % 2 if t == 0 and p >= 5 else response_token(t, p))
    repetition = {"max_period": 4, "min_repeats": 3, "min_tokens": 8}
    scorer = Scorer()
    phase = rollout(buffer, engine, config(groups_per_iteration=1, max_open_groups=1, repetition=repetition), scorer)
    assert run(phase, 0) == []  # the repetition is not over within the first budget
    for iteration in (1, 2):
        batch = run(phase, iteration)
    assert endings(buffer, 0) == [(10, Ending.BUDGET), (3, Ending.REPEAT)]
    assert [len(g.trajectories) for g in batch] == [2] and Ending.REPEAT in scorer.endings
    terms = {term.name: term.count for term in buffer.conservation()}
    assert terms["made by engines"] == terms["kept"] + terms["cut after repetition"] == 13 + 30 + terms["cut after repetition"]


def test_a_group_whose_oldest_token_is_too_old_is_dropped_whole(buffer: ReplayBuffer):
    settings = config(groups_per_iteration=1, max_open_groups=1, max_staleness=1, max_segments=2, token_budget=20)
    group = buffer.draw(prompt(0), 2, 0)
    finish(buffer, 0, iteration=0)
    segment = buffer.open_segment(1, 2, 2, 1.0, "fake-0")
    append(buffer, segment, 4, version=2)
    buffer.close_segment(segment, Ending.BUDGET)
    engine = FakeEngine(lambda t: 6)
    (batch,) = run(rollout(buffer, engine, settings), 2, version=2)
    assert batch.id == 1 and {r.trajectory_id for r in engine.requests} == {2, 3}  # nothing was spent on the old group
    assert {(s.state, s.dropped_reason) for s in buffer.statuses(group.id)} == {(TrajectoryState.DROPPED, DropReason.STALE)}


def test_a_group_as_old_as_allowed_is_trained(buffer: ReplayBuffer):
    buffer.draw(prompt(0), 2, 0)
    for t in (0, 1):
        finish(buffer, t, iteration=0)
    settings = config(groups_per_iteration=1, max_open_groups=1, max_staleness=3)
    assert [g.id for g in run(rollout(buffer, FakeEngine(lambda t: 6), settings), 3, version=3)] == [0]


def test_iterations_that_train_nothing_do_not_age_a_group(buffer: ReplayBuffer):
    buffer.draw(prompt(0), 2, 0)
    for t in (0, 1):
        finish(buffer, t, iteration=0)
    settings = config(groups_per_iteration=1, max_open_groups=1, max_staleness=1, max_segments=2, token_budget=20)
    assert [g.id for g in run(rollout(buffer, FakeEngine(lambda t: 6), settings), 50, version=1)] == [0]


def test_too_few_complete_groups_wait_for_a_later_iteration(buffer: ReplayBuffer):
    settings = config(groups_per_iteration=2, min_groups=2, max_open_groups=1, token_budget=20)
    phase = rollout(buffer, FakeEngine(lambda t: 6 if t < 2 else 30), settings)
    assert run(phase, 0) == []  # group 0 is complete, group 1 has spent its budget
    assert [g.id for g in run(phase, 1)] == [0, 1]


def test_with_last_segments_only_old_tokens_do_not_make_a_group_stale(buffer: ReplayBuffer):
    settings = config(groups_per_iteration=1, max_open_groups=1, token_budget=10, max_staleness=1, loss_segments="last")
    phase = rollout(buffer, FakeEngine(lambda t: 25), settings)
    assert run(phase, 0, 0) == [] and run(phase, 1, 1) == []
    (group,) = run(phase, 2, 2)
    assert group.id == 0 and {s.weight_version for s in group.trajectories[0].segments} == {0, 1, 2}


def test_a_failed_reward_drops_its_trajectory_and_a_lone_member_drops_its_group(buffer: ReplayBuffer):
    failing = {response_token(t, 0) for t in (1, 3, 4)}  # one of group 0, two of group 1
    scorer = Scorer(fails=lambda response: int(response.split()[0]) in failing)
    settings = config(group_size=3, groups_per_iteration=2, max_open_groups=2, token_budget=50, max_response_tokens=50)
    engine = FakeEngine(lambda t: 10_000 if t == 5 else 5)  # 5 still runs when its group is dropped
    batch = run(rollout(buffer, engine, settings, scorer), 0)
    assert [[t.id for t in g.trajectories] for g in batch] == [[0, 2], [6, 7, 8]]
    assert [s.dropped_reason for s in buffer.statuses(1)] == [DropReason.REWARD, DropReason.REWARD, DropReason.GROUP]
    assert [s.state for s in buffer.statuses(1)] == [TrajectoryState.DROPPED] * 3


def test_tokens_are_committed_while_a_trajectory_runs(buffer: ReplayBuffer):
    phase = rollout(buffer, FakeEngine(lambda t: 200, chunk=2), config(token_budget=60, max_response_tokens=60, commit_tokens=8))
    uncommitted = []

    def look(tokens: int, complete: int) -> None:
        uncommitted.append(tokens - sum(t.num_tokens for t in buffer.trajectories(range(8))))

    phase.on_tokens = look
    run(phase, 0)
    assert max(uncommitted) <= 8 * 8 and len(uncommitted) > 100


def test_tokens_are_committed_after_commit_s_too(buffer: ReplayBuffer):
    slow = config(token_budget=60, max_response_tokens=60, commit_tokens=10_000, commit_s=1e-6)
    phase = rollout(buffer, FakeEngine(lambda t: 200, chunk=2), slow)
    committed = set()
    phase.on_tokens = lambda tokens, complete: committed.add(sum(t.num_tokens for t in buffer.trajectories([0, 1])))
    run(phase, 0)
    assert len(committed - {0, 60, 120}) > 3


def test_prompts_are_sent_once_a_group_and_resumed_where_their_kv_is(buffer: ReplayBuffer):
    engines = [FakeEngine(lambda t: 15, name=f"fake-{i}", seed=i) for i in range(2)]
    phase = rollout(buffer, engines, config(groups_per_iteration=4, max_open_groups=4))
    run(phase, 0)
    first = [{r.trajectory_id for r in e.requests} for e in engines]
    assert first == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert len({r.kv_key for r in engines[0].requests}) == 2
    run(phase, 1)
    for engine, ids in zip(engines, first, strict=True):
        again = [r for r in engine.requests if len(r.token_ids) > 6]
        assert {r.trajectory_id for r in again} == ids
        assert all(np.count_nonzero(r.token_ids >= 100) == 10 and r.max_new_tokens == 10 for r in again)
