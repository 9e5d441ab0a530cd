"""The replay buffer keeps what it is given, through any number of openings, and sees what others changed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from material import append, finish, outcome, prompt

from megatron_rl.errors import BufferFileError
from megatron_rl.rollout.buffer import ReplayBuffer, TrajectoryState
from megatron_rl.rollout.buffer_file import TABLES
from megatron_rl.types import DropReason, Ending, Outcome, OutcomeKind


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "buffer.sqlite"


def full_buffer(path: Path) -> None:
    """A row in every table: group 0 trained, 1 complete, 2 partly dropped and open, 3 fresh."""
    buffer = ReplayBuffer(path, "run-a")
    for i in range(4):
        buffer.draw(prompt(i % 3), 3, iteration=i // 2)
    for t in range(6):
        finish(buffer, t, reward=t / 6)
    segment = buffer.open_segment(6, 0, 0, 1.0, "engine-0")
    append(buffer, segment, 3)
    append(buffer, segment, 4, start=3)
    buffer.close_segment(segment, Ending.BUDGET, made=7)
    finish(buffer, 7, iteration=1)
    segment = buffer.open_segment(6, 1, 1, 1.0, "engine-1")
    append(buffer, segment, 2, start=7, version=1)
    buffer.close_segment(segment, Ending.REPEAT, made=4, cut=2)
    buffer.set_outcome(6, Outcome(OutcomeKind.FAILED, 0.0, False, detail="exact: no answer within 10 s"))
    buffer.drop([6], DropReason.REWARD, 1)
    buffer.record_batch(0, [0])
    buffer.close()


def rows(path: Path) -> dict[str, list[tuple]]:
    with sqlite3.connect(path) as db:
        return {table: db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES}


def test_schema_is_frozen():
    # Another run must be able to read this file: a change here needs a new SCHEMA_VERSION.
    assert {table: " ".join(columns) for table, columns in TABLES.items()} == {
        "meta": "run_id schema lineage phase",
        "prompt": "id messages token_ids answer verifier tags difficulty",
        "grp": "id prompt_id group_size drawn_at",
        "trajectory": "id group_id state reward outcome dropped_reason dropped_at",
        "segment": "id trajectory_id ordinal iteration weight_version lineage temperature engine ending made cut recovered",
        "chunk": "segment_id offset tokens log_probs kv_versions from_policy",
        "batch": "iteration ordinal group_id",
    }


def test_what_was_written_is_read_back_equal_after_any_number_of_openings(path: Path):
    full_buffer(path)
    before = rows(path)
    for _ in range(3):
        ReplayBuffer(path, "run-a").close()
    assert rows(path) == before
    buffer = ReplayBuffer(path)
    (group,) = buffer.batch(0) or []
    drawn = prompt(0)
    assert (group.prompt.id, group.prompt.messages, group.prompt.tags) == (drawn.id, drawn.messages, drawn.tags)
    assert group.prompt.difficulty == 0.25 and np.array_equal(group.prompt.token_ids, drawn.token_ids)
    assert [t.id for t in group.trajectories] == [0, 1, 2] and group.trajectories[2].outcome == outcome(2 / 6)
    (cut,) = buffer.trajectories([6])
    assert np.array_equal(cut.token_ids, np.arange(9)) and cut.token_ids.dtype == np.int32
    assert np.array_equal(cut.weight_versions, [0] * 7 + [1] * 2) and cut.log_probs.dtype == np.float32
    assert [s.ending for s in cut.segments] == [Ending.BUDGET, Ending.REPEAT] and cut.from_policy.all()
    assert cut.outcome is not None and cut.outcome.kind is OutcomeKind.FAILED
    assert [g.id for g in buffer.complete_groups()] == [1]
    assert [(g.id, [t.id for t in g.trajectories]) for g in buffer.open_groups()] == [(2, [7, 8]), (3, [9, 10, 11])]
    assert buffer.counts() == {"drawn": 12, "trained": 3, "waiting": 8, "dropped": 1}
    assert buffer.counts(0) == {"drawn": 6, "trained": 3, "waiting": 3, "dropped": 0}
    assert (buffer.generated_tokens(0), buffer.generated_tokens(1)) == (6 * 5 + 7, 5 + 4)
    assert buffer.num_drawn == 4 and buffer.last_batch_iteration() == 0 and buffer.batch(1) is None
    assert buffer.mixed_version_share() == 0.0
    buffer.close()
    buffer.close()


def test_fewer_than_two_living_members_drop_the_group(path: Path):
    buffer = ReplayBuffer(path)
    buffer.draw(prompt(0), 3, 0)
    assert buffer.drop([1], DropReason.REWARD, 0) == [1]
    assert buffer.drop([2, 1], DropReason.REWARD, 0) == [2, 0]
    assert [s.dropped_reason for s in buffer.statuses(0)] == [DropReason.GROUP, DropReason.REWARD, DropReason.REWARD]
    buffer.check()


def test_lineage_marks_the_segments_opened_after_it(path: Path):
    buffer = ReplayBuffer(path)
    buffer.draw(prompt(0), 2, 0)
    finish(buffer, 0)
    assert buffer.bump_lineage() == 1
    finish(buffer, 1)
    assert [t.segments[0].lineage for t in buffer.trajectories([0, 1])] == [0, 1]


def test_a_phase_that_a_later_one_followed_is_over(path: Path):
    buffer = ReplayBuffer(path)
    assert buffer.begin_phase(0) and buffer.begin_phase(0) and buffer.begin_phase(1)
    buffer.close()
    assert not ReplayBuffer(path).begin_phase(0)


OPERATIONS = ("draw", "open", "append", "close", "score", "fail", "stale", "batch", "reopen", "kill")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10_000)), max_size=60))
def test_conservation_holds_after_any_operations(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("walk") / "buffer.sqlite"
    buffer = ReplayBuffer(path)
    running: dict[int, int] = {}  # trajectory -> its open segment
    written: dict[int, list[int]] = {}
    batch = 0
    for i, (operation, choice) in enumerate(steps):
        statuses = buffer.statuses()
        idle = [s.id for s in statuses if s.state is TrajectoryState.OPEN and s.id not in running]
        ended = [s.id for s in statuses if s.state is TrajectoryState.ENDED]
        if operation == "draw":
            buffer.draw(prompt(choice % 5), 3, i)
        elif operation == "open" and idle:
            t = idle[choice % len(idle)]
            running[t] = buffer.open_segment(t, i, i, 1.0, "engine-0")
        elif operation == "append" and running:
            t = sorted(running)[choice % len(running)]
            append(buffer, running[t], choice % 7, start=choice)
            written.setdefault(t, []).extend(range(choice, choice + choice % 7))
        elif operation == "close" and running:
            t = sorted(running)[choice % len(running)]
            buffer.close_segment(running.pop(t), list(Ending)[choice % 5])
        elif operation == "score" and ended:
            buffer.set_outcome(ended[choice % len(ended)], outcome(choice / 10_000))
        elif operation == "fail" and ended:
            buffer.drop([ended[choice % len(ended)]], DropReason.REWARD, i)
        elif operation == "stale" and (complete := buffer.complete_groups()):
            buffer.drop([t.id for t in complete[0].trajectories], DropReason.STALE, i)
        elif operation == "batch" and (complete := buffer.complete_groups()):
            buffer.record_batch(batch, [g.id for g in complete[:2]])
            batch += 1
        elif operation in ("reopen", "kill"):
            if operation == "kill":  # a copy of the files as they are now is what a kill leaves
                copy = tmp_path_factory.mktemp("killed") / "buffer.sqlite"
                for suffix in ("", "-wal"):
                    if Path(f"{path}{suffix}").exists():
                        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
                path = copy
            buffer.close()
            buffer = ReplayBuffer(path)
            running.clear()
        buffer.check()
    counts = buffer.counts()
    assert counts["drawn"] == counts["trained"] + counts["waiting"] + counts["dropped"]
    for trajectory in buffer.trajectories(sorted(written)):
        assert trajectory.token_ids.tolist() == written[trajectory.id]
    buffer.close()


CHANGED_CONSISTENTLY = [  # only a row's checksum can tell
    ("meta", "UPDATE meta SET lineage = 7"),
    ("prompt", "UPDATE prompt SET answer = '42' WHERE id = 'prompt-1'"),
    ("grp", "UPDATE grp SET prompt_id = 'prompt-2' WHERE id = 0"),
    ("segment", "UPDATE segment SET weight_version = weight_version + 1 WHERE id = 1"),
    ("chunk", "UPDATE chunk SET tokens = zeroblob(length(tokens)) WHERE segment_id = 1"),
]
CHANGED = [
    ("meta", "DELETE FROM meta"),
    ("prompt", "DELETE FROM prompt WHERE id = 'prompt-1'"),
    ("grp", "DELETE FROM grp WHERE id = 3"),
    ("trajectory", "DELETE FROM trajectory WHERE id = 11"),
    ("trajectory", "DELETE FROM trajectory WHERE id = 0"),
    ("trajectory", "UPDATE trajectory SET reward = 9 WHERE id = 4"),
    ("trajectory", "UPDATE trajectory SET dropped_reason = NULL WHERE id = 6"),
    ("segment", "DELETE FROM segment WHERE trajectory_id = 6 AND ordinal = 0"),
    ("segment", "DELETE FROM segment WHERE id = (SELECT max(id) FROM segment)"),
    ("chunk", "DELETE FROM chunk WHERE segment_id = 1"),
    ("chunk", "UPDATE chunk SET log_probs = x'00000000' WHERE segment_id = 1"),
    ("batch", "DELETE FROM batch"),
    ("batch", "UPDATE batch SET group_id = 1"),
]


@pytest.mark.parametrize(("table", "change"), CHANGED_CONSISTENTLY + CHANGED)
def test_check_names_the_table_that_was_changed_from_outside(path: Path, table: str, change: str):
    full_buffer(path)
    buffer = ReplayBuffer(path, "run-a")
    buffer.check()
    with sqlite3.connect(path) as db:
        db.execute(change)
    with pytest.raises(BufferFileError, match=f"table {table}:"):
        buffer.check()


@pytest.mark.parametrize(("table", "change"), CHANGED)
def test_the_laws_alone_name_the_table_when_checksums_agree(path: Path, table: str, change: str):
    full_buffer(path)
    buffer = ReplayBuffer(path, "run-a")
    buffer._file.execute(change)  # on the writer's own connection, whose triggers renew the checksums
    with pytest.raises(BufferFileError, match=f"table {table}:") as error:
        buffer.check()
    assert "checksum" not in str(error.value)


def test_every_table_loses_a_row_in_the_tests_above():
    assert {table for table, _ in CHANGED} == set(TABLES)


def test_a_killed_writer_loses_its_open_chunk_only(path: Path):
    pid = os.fork()
    if pid == 0:
        try:
            buffer = ReplayBuffer(path, "run-a")
            buffer.draw(prompt(0), 2, 0)
            segments = [buffer.open_segment(t, 0, 0, 1.0, "engine-0") for t in (0, 1)]
            append(buffer, segments[0], 8)
            append(buffer, segments[0], 8, start=8)
            with buffer.transaction():
                append(buffer, segments[1], 8)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    buffer = ReplayBuffer(path, "run-a")
    kept, lost = buffer.trajectories([0, 1])
    assert kept.token_ids.tolist() == list(range(16)) and lost.num_tokens == 0
    assert [t.ending for t in (kept, lost)] == [Ending.ABORT, Ending.ABORT]
    assert {term.name: term.count for term in buffer.conservation()}["cut short by a kill"] == 2
    buffer.check()
    buffer.append_chunk(buffer.open_segment(1, 0, 0, 1.0, "engine-0"), *[np.zeros(2)] * 3)
    buffer.check()


def test_one_writer_at_a_time_and_readers_beside_it(path: Path):
    writer = ReplayBuffer(path, "run-a")
    writer.draw(prompt(0), 2, 0)
    with pytest.raises(BufferFileError, match="already open for writing"):
        ReplayBuffer(path, "run-a")
    reader = ReplayBuffer(path, read_only=True)
    segment = writer.open_segment(0, 0, 0, 1.0, "engine-0")
    append(writer, segment, 3)
    assert reader.trajectories([0])[0].num_tokens == 3
    with pytest.raises(BufferFileError, match="read-only"):
        reader.draw(prompt(1), 2, 0)
    pid = os.fork()
    if pid == 0:  # a worker forked from the run must neither hold nor release its lock
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(BufferFileError, match="already open for writing"):
        ReplayBuffer(path, "run-a")
    writer.close()
    ReplayBuffer(path, "run-a").close()


def test_files_that_cannot_be_ours_are_refused_untouched(path: Path):
    full_buffer(path)
    with pytest.raises(BufferFileError, match="belongs to run run-a, this is run run-b"):
        ReplayBuffer(path, "run-b")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET schema = 99")
    with pytest.raises(BufferFileError, match="has schema 99.*newer megatron_rl"):
        ReplayBuffer(path, "run-a")
    path.write_bytes(b"\x00garbage" * 4096)
    with pytest.raises(BufferFileError, match="damaged, or not a replay buffer"):
        ReplayBuffer(path, "run-a")
    assert path.read_bytes() == b"\x00garbage" * 4096
    other = path.with_name("other.sqlite")
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(BufferFileError, match="not a replay buffer"):
        ReplayBuffer(other)
    with pytest.raises(BufferFileError, match="existing folder"):
        ReplayBuffer(path.with_name("missing") / "buffer.sqlite")
    with pytest.raises(BufferFileError, match="existing folder"):
        ReplayBuffer(path.with_name("absent.sqlite"), read_only=True)


def test_a_file_damaged_in_the_middle_is_one_clear_error(path: Path):
    full_buffer(path)
    with path.open("r+b") as f:
        f.seek(4096)
        f.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(BufferFileError, match="damaged.*restore a copy"):
        ReplayBuffer(path, "run-a").check()


@pytest.mark.parametrize("limit", ["pages", "file size"])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(path: Path, limit: str):
    full_buffer(path)
    buffer = ReplayBuffer(path, "run-a")
    segment = buffer.open_segment(8, 1, 1, 1.0, "engine-0")
    append(buffer, segment, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == "pages":
        buffer._file.execute(f"PRAGMA max_page_count = {buffer._file.value('PRAGMA page_count') + 2}")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50_000, hard))
    try:
        with pytest.raises(BufferFileError, match="everything committed is kept"):
            append(buffer, segment, 200_000, start=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    buffer.check()
    buffer._file.execute("PRAGMA max_page_count = 1000000")
    append(buffer, segment, 200_000, start=100)
    buffer.close()
    again = ReplayBuffer(path, "run-a")
    assert np.array_equal(again.trajectories([8])[0].token_ids, np.arange(200_100))
    again.check()
