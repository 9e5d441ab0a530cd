"""Phases that are killed, stopped, run again, or whose engines fail; and phases in any order of events."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_engine import STOP, FakeEngine, response_token
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from material import append, config, prompt
from phases import Scorer, content, endings, rollout, run

from megatron_rl.errors import EngineError, EngineLostError, RewardError
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.engines.base import Chunk, Request
from megatron_rl.types import Ending, Outcome, Prompt


@pytest.fixture
def buffer(tmp_path: Path) -> ReplayBuffer:
    return ReplayBuffer(tmp_path / "buffer.sqlite")


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


def test_a_phase_that_loses_an_engine_keeps_what_all_have_made_and_goes_on_when_it_is_back(buffer: ReplayBuffer):
    engines = [FakeEngine(lambda t: 20, name=f"fake-{i}") for i in range(2)]
    engines[1].dies_after, engines[1].dies_with = 5, EngineLostError
    phase = rollout(buffer, engines, config(max_open_groups=2, groups_per_iteration=2, token_budget=40, max_segments=1))
    made: list[int] = []
    phase.on_tokens = lambda tokens, complete: made.append(tokens)
    with pytest.raises(EngineLostError, match="the process is gone"):
        run(phase, 0)
    buffer.check()
    assert buffer.generated_tokens(0) == made[-1] > 0, "those of the engine that lives, up to its abort, too"
    engines[1].dies_after = None
    batch = run(phase, 0)
    assert [g.id for g in batch] == [0, 1]
    for trajectory in (t for g in batch for t in g.trajectories):
        assert trajectory.token_ids.tolist() == [response_token(trajectory.id, p) for p in range(19)] + [STOP]
    assert {s.engine for t in batch[1].trajectories for s in t.segments} == {"fake-1"}


def test_an_engine_lost_when_the_batch_is_there_is_no_reason_to_go_back(buffer: ReplayBuffer):
    engines = [FakeEngine(lambda t: 20, name=f"fake-{i}") for i in range(2)]
    engines[1].dies_with = EngineLostError
    phase = rollout(buffer, engines, config(groups_per_iteration=1, max_open_groups=2, token_budget=40))

    def lose(tokens: int, complete: int) -> None:
        if complete:
            engines[1].dies_after = 0

    phase.on_tokens = lose
    engines[1]._step = lambda request, start, made: (wait_for(request), made)  # type: ignore[method-assign]
    assert [g.id for g in run(phase, 0)] == [0]
    buffer.check()


def wait_for(request: Request) -> Chunk:
    """A chunk without tokens: its engine falls behind."""
    none = np.zeros(0, np.int32)
    return Chunk(request.trajectory_id, none, np.zeros(0, np.float32), request.weight_version, none, 0, None)


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


def test_silence_of_an_engine_that_is_started_again_is_no_missed_deadline(buffer: ReplayBuffer):
    class Restarting(FakeEngine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
            self.is_restarting = True
            await asyncio.sleep(0.4)
            self.is_restarting = False
            async for chunk in super().generate(requests):
                yield chunk

    assert len(run(rollout(buffer, Restarting(lambda t: 5), config(request_timeout_s=0.1)), 0)) == 2
    buffer.check()


def test_an_engine_that_aborts_unasked_is_an_error(buffer: ReplayBuffer):
    engine = FakeEngine(lambda t: 20)
    phase = rollout(buffer, engine, config())
    phase.on_tokens = lambda tokens, complete: engine._aborted.add(0)
    with pytest.raises(EngineError, match="engine fake-0, trajectories 0, 1: aborted trajectory 0"):
        run(phase, 0)
