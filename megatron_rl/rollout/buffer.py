"""The replay buffer: every prompt drawn, every token generated and what became of it, safe against a kill at any moment.

It stores and counts; it decides nothing: which groups are drawn, ended, dropped or trained is the scheduler's business
(`scheduler.py`). Nothing is ever deleted. The file itself: `buffer_file.py`; the laws it obeys: `conservation.py`.

A trajectory's states, each change in one method:
    open --close_segment--> ended --set_outcome--> scored --record_batch--> trained
    open | ended | scored --drop--> dropped
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from megatron_rl.errors import BufferFileError
from megatron_rl.rollout import conservation
from megatron_rl.rollout.buffer_file import BufferFile
from megatron_rl.rollout.buffer_rows import floats_blob, ints_blob, load_groups, load_trajectories, outcome_text, prompt_row
from megatron_rl.types import DropReason, Ending, Group, Outcome, OutcomeKind, Prompt, Trajectory


class TrajectoryState(StrEnum):
    OPEN = "open"  # its response may still grow
    ENDED = "ended"  # its response is whole, its score is not known
    SCORED = "scored"
    TRAINED = "trained"  # its group is in a recorded batch
    DROPPED = "dropped"


@dataclass(frozen=True)
class Status:
    """Where a trajectory stands."""

    id: int
    group_id: int
    state: TrajectoryState
    dropped_reason: DropReason | None


class ReplayBuffer:
    """One file, one writer. Every method raises BufferFileError where the file cannot be read or written."""

    def __init__(self, path: str | Path, run_id: str | None = None, *, read_only: bool = False) -> None:
        """Opens or creates `path`. Segments that a killed process left open become `abort`.

        Raises BufferFileError for the file of another run (`run_id` None: any run's), another schema, a damaged file,
        or one that is already open for writing. `read_only` looks on while another process writes."""
        self._file = BufferFile(path, run_id, read_only=read_only)
        if not read_only:
            self._recover()

    def close(self) -> None:
        """Any number of times."""
        self._file.close()

    def transaction(self) -> AbstractContextManager[None]:
        """Everything written inside is committed together, or not at all."""
        return self._file.transaction()

    # --- writing -----------------------------------------------------------------------------------------------------

    def draw(self, prompt: Prompt, group_size: int, iteration: int) -> Group:
        """A new group of `group_size` trajectories without tokens; group ids are 0, 1, 2, ... in the order of the draws."""
        with self._file.transaction():
            before = self._file.value("SELECT group_size FROM grp LIMIT 1")
            if before is not None and before != group_size:
                raise BufferFileError(
                    f"{self._file.path}: rollout.group_size={group_size}: the groups in this file have {before}, and "
                    f"trajectory ids depend on it; set it to {before}, or start a new run"
                )
            group_id = self.num_drawn
            self._file.execute("INSERT OR IGNORE INTO prompt VALUES (?, ?, ?, ?, ?, ?, ?, 0)", prompt_row(prompt))
            self._file.execute("INSERT INTO grp VALUES (?, ?, ?, ?, 0)", (group_id, prompt.id, group_size, iteration))
            ids = range(group_id * group_size, (group_id + 1) * group_size)
            rows = [(i, group_id, TrajectoryState.OPEN) for i in ids]
            self._file.executemany("INSERT INTO trajectory (id, group_id, state) VALUES (?, ?, ?)", rows)
        return Group(group_id, prompt, tuple(Trajectory(i, group_id, ()) for i in ids))

    def open_segment(self, trajectory_id: int, iteration: int, weight_version: int, temperature: float, engine: str) -> int:
        """Returns the segment's id. The trajectory must be open, without an open segment."""
        with self._file.transaction():
            assert self._state(trajectory_id) is TrajectoryState.OPEN, f"trajectory {trajectory_id} is not open"
            count, num_open = self._file.rows(
                "SELECT count(*), count(*) - count(ending) FROM segment WHERE trajectory_id = ?", (trajectory_id,)
            )[0]
            assert num_open == 0, f"trajectory {trajectory_id} has an open segment"
            cursor = self._file.execute(
                "INSERT INTO segment (trajectory_id, ordinal, iteration, weight_version, lineage, temperature, engine) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (trajectory_id, count, iteration, weight_version, self.lineage, temperature, engine),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def append_chunk(
        self, segment_id: int, token_ids: np.ndarray, log_probs: np.ndarray, kv_versions: np.ndarray, from_policy: bool = True
    ) -> None:
        """Commit further tokens of an open segment; all arrays are [tokens]. No tokens, no row."""
        n = len(token_ids)
        assert n == len(log_probs) == len(kv_versions), "one log-prob and one KV version a token"
        if n == 0:
            return
        blobs = (ints_blob(token_ids), floats_blob(log_probs), ints_blob(kv_versions))
        with self._file.transaction():
            self._file.execute(
                "INSERT INTO chunk SELECT ?1, made, ?2, ?3, ?4, ?5, 0 FROM segment WHERE id = ?1 AND ending IS NULL",
                (segment_id, *blobs, int(from_policy)),
            )
            changed = self._file.execute("UPDATE segment SET made = made + ? WHERE id = ? AND ending IS NULL", (n, segment_id))
            assert changed.rowcount == 1, f"segment {segment_id} is not open"

    def close_segment(self, segment_id: int, ending: Ending, *, made: int | None = None, cut: int = 0) -> None:
        """`made`: tokens the engine says it made in this segment (None: those committed); `cut`: of them, not kept.

        An ending that ends the trajectory moves it to `ended`, unless it was dropped meanwhile."""
        with self._file.transaction():
            changed = self._file.execute(
                "UPDATE segment SET ending = ?, made = coalesce(?, made), cut = ? WHERE id = ? AND ending IS NULL",
                (ending, made, cut, segment_id),
            )
            assert changed.rowcount == 1, f"segment {segment_id} is not open"
            if ending.ends_trajectory:
                self._file.execute(
                    "UPDATE trajectory SET state = ? WHERE state = ? AND id = (SELECT trajectory_id FROM segment WHERE id = ?)",
                    (TrajectoryState.ENDED, TrajectoryState.OPEN, segment_id),
                )

    def set_outcome(self, trajectory_id: int, outcome: Outcome) -> None:
        """Of an ended trajectory. A failed outcome is kept, but is no score: `drop` the trajectory with it."""
        failed = outcome.kind is OutcomeKind.FAILED
        state, reward = (TrajectoryState.ENDED, None) if failed else (TrajectoryState.SCORED, outcome.reward)
        with self._file.transaction():
            changed = self._file.execute(
                "UPDATE trajectory SET state = ?, reward = ?, outcome = ? WHERE id = ? AND state = ?",
                (state, reward, outcome_text(outcome), trajectory_id, TrajectoryState.ENDED),
            )
            assert changed.rowcount == 1, f"trajectory {trajectory_id} has not ended, or is scored already"

    def drop(self, trajectory_ids: Iterable[int], reason: DropReason, iteration: int) -> list[int]:
        """Also drops, with reason `group`, what is left of groups with fewer than two living members.

        Returns all ids dropped by this call."""
        with self._file.transaction():
            dropped = self._drop(trajectory_ids, reason, iteration)
            alone = self._file.rows(
                "SELECT id FROM trajectory WHERE state != 'dropped' AND group_id IN "
                "(SELECT group_id FROM trajectory WHERE id IN (SELECT value FROM json_each(?))) "
                "GROUP BY group_id HAVING count(*) < 2",
                (json.dumps(dropped),),
            )
            return dropped + self._drop([i for (i,) in alone], DropReason.GROUP, iteration)

    def record_batch(self, iteration: int, group_ids: Sequence[int]) -> None:
        """The ordered batch of an iteration, before it is trained; its trajectories are trained from here on. Durable."""
        with self._file.transaction(durable=True):
            rows = [(iteration, ordinal, group_id) for ordinal, group_id in enumerate(group_ids)]
            self._file.executemany("INSERT INTO batch VALUES (?, ?, ?, 0)", rows)
            living = "FROM trajectory WHERE state != 'dropped' AND group_id IN (SELECT group_id FROM batch WHERE iteration = ?)"
            unscored = self._file.rows(f"SELECT id {living} AND state != 'scored'", (iteration,))
            assert not unscored, f"unscored trajectories in a batch: {unscored}"
            self._file.execute(f"UPDATE trajectory SET state = 'trained' WHERE id IN (SELECT id {living})", (iteration,))

    def begin_phase(self, iteration: int) -> bool:
        """False when a later iteration's phase has begun already: this one ended, without a batch, in an earlier start."""
        last = self._file.value("SELECT phase FROM meta")
        if last is not None and iteration < last:
            return False
        with self._file.transaction(durable=True):
            self._file.execute("UPDATE meta SET phase = ?", (iteration,))
        return True

    def bump_lineage(self) -> int:
        """At a resume whose replay is not bit-exact; segments opened from now on carry the new number, returned."""
        with self._file.transaction(durable=True):
            self._file.execute("UPDATE meta SET lineage = lineage + 1")
        return self.lineage

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def num_drawn(self) -> int:
        """Groups drawn, one prompt each."""
        return self._file.value("SELECT count(*) FROM grp")

    @property
    def lineage(self) -> int:
        return self._file.value("SELECT lineage FROM meta")

    @property
    def run_id(self) -> str:
        return self._file.value("SELECT run_id FROM meta")

    def open_groups(self) -> list[Group]:
        """With a living member that is open or unscored; oldest first."""
        return load_groups(self._file, "SELECT group_id FROM trajectory WHERE state IN ('open', 'ended')")

    def complete_groups(self) -> list[Group]:
        """All living members scored, in no batch; oldest first."""
        return load_groups(
            self._file,
            "SELECT group_id FROM trajectory WHERE state = 'scored' EXCEPT "
            "SELECT group_id FROM trajectory WHERE state IN ('open', 'ended')",
        )

    def batch(self, iteration: int) -> list[Group] | None:
        """In the recorded order; None when this iteration recorded none."""
        ids = [i for (i,) in self._file.rows("SELECT group_id FROM batch WHERE iteration = ? ORDER BY ordinal", (iteration,))]
        return self.groups(ids) if ids else None

    def last_batch_iteration(self) -> int | None:
        return self._file.value("SELECT max(iteration) FROM batch")

    def groups(self, group_ids: Sequence[int]) -> list[Group]:
        """In the order asked for, dropped members left out; unknown ids are left out."""
        found = {g.id: g for g in load_groups(self._file, "SELECT value FROM json_each(?)", (json.dumps(list(group_ids)),))}
        return [found[i] for i in group_ids if i in found]

    def trajectories(self, trajectory_ids: Sequence[int]) -> list[Trajectory]:
        """In the order asked for, dropped ones too; unknown ids are left out. A segment that is open now reads as `abort`."""
        where = "id IN (SELECT value FROM json_each(?))"
        found = {t.id: t for t in load_trajectories(self._file, where, (json.dumps(list(trajectory_ids)),))}
        return [found[i] for i in trajectory_ids if i in found]

    def statuses(self, group_id: int | None = None) -> list[Status]:
        """Of one group's trajectories, or of all."""
        rows = self._file.rows(
            "SELECT id, group_id, state, dropped_reason FROM trajectory WHERE ?1 IS NULL OR group_id = ?1 ORDER BY id",
            (group_id,),
        )
        return [Status(i, g, TrajectoryState(state), DropReason(why) if why else None) for i, g, state, why in rows]

    def generated_tokens(self, iteration: int) -> int:
        """Tokens the engines made in this iteration's phase."""
        return self._file.value("SELECT coalesce(sum(made), 0) FROM segment WHERE iteration = ?", (iteration,))

    def counts(self, iteration: int | None = None) -> dict[str, int]:
        """Trajectories `drawn`, `trained`, `waiting`, `dropped` so far; as they stood after `iteration` when given."""
        return conservation.counts(self._file, iteration)

    def mixed_version_share(self) -> float | None:
        """Share of the trained trajectories that hold tokens of two or more weight versions; None before the first."""
        return self._file.value(
            "SELECT avg(versions > 1) FROM (SELECT count(DISTINCT weight_version) AS versions FROM trajectory t "
            "LEFT JOIN segment s ON s.trajectory_id = t.id AND s.made > s.cut WHERE t.state = 'trained' GROUP BY t.id)"
        )

    def conservation(self) -> list[conservation.Term]:
        """The conservation table: each term counted from its own rows."""
        return conservation.terms(self._file)

    def check(self) -> None:
        """Reads the whole file. Raises BufferFileError naming every law that is broken, its table and the first rows."""
        conservation.check(self._file)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _state(self, trajectory_id: int) -> TrajectoryState:
        return TrajectoryState(self._file.value("SELECT state FROM trajectory WHERE id = ?", (trajectory_id,)))

    def _drop(self, trajectory_ids: Iterable[int], reason: DropReason, iteration: int) -> list[int]:
        dropped = []
        for i in trajectory_ids:
            changed = self._file.execute(
                "UPDATE trajectory SET state = 'dropped', dropped_reason = ?, dropped_at = ? "
                "WHERE id = ? AND state IN ('open', 'ended', 'scored')",
                (reason, iteration, i),
            )
            dropped += [i] * changed.rowcount
        return dropped

    def _recover(self) -> None:
        if self._file.value("SELECT 1 FROM segment WHERE ending IS NULL LIMIT 1"):
            with self._file.transaction():
                self._file.execute("UPDATE segment SET ending = ?, recovered = 1 WHERE ending IS NULL", (Ending.ABORT,))
