"""Rollout phases over a fake engine: who generates, how much, when a phase ends, and what comes out."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_engine import STOP, FakeEngine, response_token
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from material import append, config, finish, prompt

from megatron_rl.config import Config
from megatron_rl.errors import EngineError, RewardError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.buffer import ReplayBuffer, TrajectoryState
from megatron_rl.rollout.scheduler import Rollout
from megatron_rl.types import DropReason, Ending, Group, Outcome, OutcomeKind, Prompt

MODEL = ModelConfig(
    "llama",
    1,
    8,
    1,
    1,
    8,
    8,
    100_000,
    64,
    1e-5,
    1e4,
    None,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    eos_token_ids=(STOP,),
)


class Prompts:
    """The i-th draw is prompt i, as a resumed sampler would go on."""

    def __init__(self, drawn: int = 0) -> None:
        self.drawn = drawn

    def draw(self, n: int) -> list[Prompt]:
        self.drawn += n
        return [prompt(i) for i in range(self.drawn - n, self.drawn)]


class Scorer:
    """Reward by the first token; `fails` names responses that cannot be scored. Answers after a seeded number of turns."""

    def __init__(self, fails: Callable[[str], bool] = lambda response: False, seed: int = 0) -> None:
        self.fails, self.random = fails, random.Random(seed)
        self.endings: list[Ending] = []

    async def score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome:
        for _ in range(self.random.randrange(5)):
            await asyncio.sleep(0)
        self.endings.append(ending)
        if self.fails(response):
            return Outcome(OutcomeKind.FAILED, 0.0, False, detail="exact: crashed")
        reward = float(int(response.split()[0]) % 2)
        return Outcome(OutcomeKind.VALUE, reward, reward == 1.0, {"exact": reward})


class Tokenizer:
    stop_token_ids = (STOP,)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def rollout(
    buffer: ReplayBuffer, engines: FakeEngine | list[FakeEngine], settings: Config, scorer: Scorer | None = None
) -> Rollout:
    engines = engines if isinstance(engines, list) else [engines]
    return Rollout(buffer, engines, Prompts(buffer.num_drawn), scorer or Scorer(), Tokenizer(), settings, MODEL)


def run(phase: Rollout, iteration: int, version: int = 0, record: bool = True) -> list[Group]:
    """One iteration as the loop does it."""
    groups = asyncio.run(asyncio.wait_for(phase.run(iteration, version), 60))
    if groups and record:
        phase.buffer.record_batch(iteration, [g.id for g in groups])
    phase.buffer.check()
    return groups


@pytest.fixture
def buffer(tmp_path: Path) -> ReplayBuffer:
    return ReplayBuffer(tmp_path / "buffer.sqlite")


def endings(buffer: ReplayBuffer, trajectory_id: int) -> list[tuple[int, Ending]]:
    (trajectory,) = buffer.trajectories([trajectory_id])
    return [(len(s.token_ids), s.ending) for s in trajectory.segments]


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


def content(buffer: ReplayBuffer, count: int) -> list:
    """All that generation decided: segments as they stand, however their chunks were committed."""
    return [
        [(s.iteration, s.weight_version, s.ending, s.token_ids.tolist(), s.log_probs.tolist()) for s in t.segments]
        for t in buffer.trajectories(range(count))
    ]


def starved_length(trajectory_id: int) -> int:
    return 2 + trajectory_id // 3 * 7 % 20 + trajectory_id % 3


def starved(path: Path, seed: int, *, iterations: int = 4) -> tuple[list, list, list]:
    """Phases that end because every trajectory spent its budget; lengths differ, so that groups complete at odd times."""
    buffer = ReplayBuffer(path)
    engines = [FakeEngine(starved_length, name=f"fake-{i}", seed=seed + i, chunk=1 + seed % 5) for i in range(2)]
    scorer = Scorer(fails=lambda response: int(response.split()[0]) % 11 == 0, seed=seed)
    settings = config(group_size=3, groups_per_iteration=5, max_open_groups=5, token_budget=7, max_segments=6)
    phase = rollout(buffer, engines, settings, scorer)
    batches = [[g.id for g in run(phase, i, i)] for i in range(iterations)]
    found = batches, content(buffer, 3 * buffer.num_drawn), [(s.state, s.dropped_reason) for s in buffer.statuses()]
    buffer.close()
    return found


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(1, 1_000_000))
def test_an_exhausted_phase_does_not_depend_on_the_order_of_completion(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("order")
    expected = starved(folder / "a.sqlite", 0)
    assert all(0 < len(batch) < 5 for batch in expected[0])  # some groups complete, not enough to end the phase
    assert starved(folder / "b.sqlite", seed) == expected


def killed_after(chunks: int, path: Path) -> None:
    """The phases of `starved` in a child process that kills itself with SIGKILL."""
    step, count = FakeEngine._step, 0

    def counted(self: FakeEngine, *request: object) -> object:
        nonlocal count
        count += 1
        if count == chunks:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *request)

    pid = os.fork()
    if pid == 0:
        try:
            FakeEngine._step = counted
            starved(path, 0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_killed_phase_goes_on_to_the_tokens_of_an_undisturbed_one(tmp_path: Path):
    expected = starved(tmp_path / "undisturbed.sqlite", 0)
    tokens = [[x for s in t for x in s[3]] for t in expected[1]]
    for chunks in (7, 60, 150, 300):
        path = tmp_path / f"{chunks}.sqlite"
        killed_after(chunks, path)
        buffer = ReplayBuffer(path)
        buffer.check()
        for trajectory in buffer.trajectories(range(len(tokens))):
            assert trajectory.token_ids.tolist() == tokens[trajectory.id][: trajectory.num_tokens]
        buffer.close()
        batches, segments, states = resumed(path)
        assert (batches, states) == (expected[0], expected[2])
        assert [[x for s in t for x in s[3]] for t in segments] == tokens


def resumed(path: Path) -> tuple[list, list, list]:
    """What the loop does after a kill: recorded batches are taken, the interrupted phase goes on."""
    buffer = ReplayBuffer(path)
    engine = [FakeEngine(starved_length, name=f"fake-{i}", seed=5) for i in range(2)]
    scorer = Scorer(fails=lambda response: int(response.split()[0]) % 11 == 0)
    settings = config(group_size=3, groups_per_iteration=5, max_open_groups=5, token_budget=7, max_segments=6)
    phase = rollout(buffer, engine, settings, scorer)
    batches = [[g.id for g in buffer.batch(i) or run(phase, i, i)] for i in range(4)]
    found = batches, content(buffer, 3 * buffer.num_drawn), [(s.state, s.dropped_reason) for s in buffer.statuses()]
    buffer.close()
    return found


def test_a_response_killed_between_its_last_token_and_its_ending_ends_without_a_request(tmp_path: Path):
    buffer = ReplayBuffer(tmp_path / "buffer.sqlite")
    buffer.draw(prompt(0), 2, 0)
    settings = config(groups_per_iteration=1, max_open_groups=1, max_response_tokens=6)
    for t, last in ((0, STOP), (1, 7)):  # one at its stop token, one at the longest response
        segment = buffer.open_segment(t, 0, 0, 1.0, "fake-0")
        append(buffer, segment, 5, start=1000)
        append(buffer, segment, 1, start=last)
    buffer.close()
    buffer, engine = ReplayBuffer(tmp_path / "buffer.sqlite"), FakeEngine(lambda t: 6)
    (group,) = run(rollout(buffer, engine, settings), 0)
    assert [endings(buffer, t) for t in (0, 1)] == [
        [(6, Ending.ABORT), (0, Ending.STOP)],
        [(6, Ending.ABORT), (0, Ending.LENGTH)],
    ]
    assert group.id == 0 and engine.requests == []


def test_an_iteration_run_again_generates_nothing_twice(buffer: ReplayBuffer):
    phase = rollout(buffer, FakeEngine(lambda t: 15 if t < 2 else 35), config(groups_per_iteration=2, max_open_groups=2))
    assert run(phase, 0) == []
    before = content(buffer, 4)
    assert run(phase, 0) == [] and content(buffer, 4) == before
    assert [g.id for g in run(phase, 1)] == [0]  # group 2 was drawn in its place
    before = content(buffer, 6)
    assert run(phase, 0) == [] and content(buffer, 6) == before  # a phase that a later one followed is over


def test_stop_commits_what_was_made_and_the_phase_can_go_on_later(buffer: ReplayBuffer):
    settings = config(groups_per_iteration=2, token_budget=40, max_segments=1)
    phase = rollout(buffer, FakeEngine(lambda t: 20, chunk=1), settings)
    phase.on_tokens = lambda tokens, complete: phase.stop() if tokens == 37 else None
    assert run(phase, 0) == []
    assert run(phase, 0) == []  # stopped for good
    assert buffer.generated_tokens(0) >= 37
    assert buffer.counts()["trained"] == 0 and all(e is not Ending.LENGTH for i in range(8) for _, e in endings(buffer, i))
    batch = run(rollout(buffer, FakeEngine(lambda t: 20), settings), 0)
    assert len(batch) == 2
    for trajectory in (t for g in batch for t in g.trajectories):
        assert trajectory.token_ids.tolist() == [response_token(trajectory.id, p) for p in range(19)] + [STOP]


def test_a_dead_engine_is_named_and_its_tokens_are_kept(buffer: ReplayBuffer):
    engines = [FakeEngine(lambda t: 20, name=f"fake-{i}") for i in range(2)]
    engines[1].dies_after = 5
    with pytest.raises(EngineError, match=r"engine fake-1, trajectories 2, 3: the process is gone"):
        run(rollout(buffer, engines, config(max_open_groups=2)), 0)
    buffer.check()
    assert buffer.generated_tokens(0) > 0 and len(buffer.open_groups()) == 2


def test_a_silent_engine_and_a_late_phase_are_named(buffer: ReplayBuffer):
    engine = FakeEngine(lambda t: 20)
    engine.hangs_after = 3
    with pytest.raises(EngineError, match=r"engine fake-0: silent for rollout\.request_timeout_s=0\.05.*trajectories 0, 1"):
        run(rollout(buffer, engine, config(request_timeout_s=0.05)), 0)
    engine = FakeEngine(lambda t: 20)
    engine.hangs_after = 0
    with pytest.raises(EngineError, match=r"phase_timeout_s=0\.05 while engine fake-0 generates trajectories 0, 1"):
        run(rollout(buffer, engine, config(phase_timeout_s=0.05, commit_s=0.02)), 0)

    class Hanging(Scorer):
        async def score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome:
            return await asyncio.Event().wait()

    settings = config(phase_timeout_s=0.5, commit_s=0.1, token_budget=40)
    with pytest.raises(RewardError, match=r"phase_timeout_s=0\.5 while trajectories 0, 1.* are scored"):
        run(rollout(buffer, FakeEngine(lambda t: 20), settings, Hanging()), 0)
    buffer.check()


def test_an_engine_that_aborts_unasked_is_an_error(buffer: ReplayBuffer):
    engine = FakeEngine(lambda t: 20)
    phase = rollout(buffer, engine, config())
    phase.on_tokens = lambda tokens, complete: engine._aborted.add(0)
    with pytest.raises(EngineError, match="engine fake-0, trajectories 0, 1: aborted trajectory 0"):
        run(phase, 0)


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
