"""What must hold between the rows of a replay buffer, and the table that shows it.

Trajectories: drawn = trained + waiting + dropped (by reason).
Tokens: kept = made by the engines - cut after a repetition, for every segment. A segment that a kill left open counts what
its engine had made at the last commit; its open chunk, at most `rollout.commit_tokens` or `rollout.commit_s`, is lost.

Each term is counted from its own rows and none by subtraction, so that a lost or altered row shows as a difference. It
only reads; repairing a file is left to a person.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.errors import BufferFileError
from megatron_rl.rollout.buffer_file import TABLES, BufferFile
from megatron_rl.types import DropReason

WAITING = "state IN ('open', 'ended', 'scored')"


@dataclass(frozen=True)
class Term:
    """One row of the conservation table."""

    name: str
    unit: str
    count: int


@dataclass(frozen=True)
class Law:
    """`broken` selects the rows (their ids first) that break it."""

    table: str
    says: str
    broken: str


LAWS = (
    Law("meta", "there is one row", "SELECT count(*) FROM meta HAVING count(*) != 1"),
    Law("prompt", "every prompt was drawn", "SELECT id FROM prompt WHERE id NOT IN (SELECT prompt_id FROM grp)"),
    Law("prompt", "every group's prompt is there", "SELECT prompt_id FROM grp WHERE prompt_id NOT IN (SELECT id FROM prompt)"),
    Law(
        "grp",
        "groups are numbered 0, 1, 2, ...",
        "SELECT g.id FROM grp g WHERE g.id > 0 AND NOT EXISTS (SELECT 1 FROM grp WHERE id = g.id - 1)",
    ),
    Law("grp", "every trajectory's group is there", "SELECT id FROM trajectory WHERE group_id NOT IN (SELECT id FROM grp)"),
    Law(
        "trajectory",
        "a group has group_size trajectories, numbered from group_id * group_size",
        "SELECT g.id FROM grp g LEFT JOIN trajectory t ON t.group_id = g.id GROUP BY g.id "
        "HAVING count(t.id) != g.group_size OR min(t.id) != g.id * g.group_size OR max(t.id) != (g.id + 1) * g.group_size - 1",
    ),
    Law(
        "trajectory",
        "drawn = trained + waiting + dropped",
        "SELECT id FROM trajectory WHERE state NOT IN ('open', 'ended', 'scored', 'trained', 'dropped')",
    ),
    Law(
        "trajectory",
        "a dropped trajectory, and no other, has a reason and an iteration",
        "SELECT id FROM trajectory WHERE (state = 'dropped') != (dropped_reason IS NOT NULL) "
        "OR (dropped_reason IS NULL) != (dropped_at IS NULL)",
    ),
    Law(
        "trajectory",
        "a scored or trained trajectory has a reward, its outcome's",
        "SELECT id FROM trajectory WHERE (state IN ('scored', 'trained') AND reward IS NULL) "
        "OR (state IN ('open', 'ended') AND reward IS NOT NULL) "
        "OR (reward IS NOT NULL AND reward IS NOT CAST(json_extract(outcome, '$.reward') AS REAL))",
    ),
    Law(
        "trajectory",
        "a group has no, or at least two, living members",
        "SELECT group_id FROM trajectory WHERE state != 'dropped' GROUP BY group_id HAVING count(*) < 2",
    ),
    Law(
        "segment",
        "every segment ever opened is there",
        "SELECT seq FROM sqlite_sequence WHERE name = 'segment' AND seq != (SELECT count(*) FROM segment)",
    ),
    Law(
        "segment",
        "every chunk's segment is there",
        "SELECT segment_id FROM chunk WHERE segment_id NOT IN (SELECT id FROM segment)",
    ),
    Law(
        "segment",
        "a trajectory's segments are numbered 0, 1, 2, ... in the order of their iterations, and its trajectory is there",
        "SELECT s.id FROM segment s LEFT JOIN trajectory t ON t.id = s.trajectory_id "
        "LEFT JOIN segment b ON b.trajectory_id = s.trajectory_id AND b.ordinal = s.ordinal - 1 "
        "WHERE t.id IS NULL OR (s.ordinal > 0 AND (b.id IS NULL OR b.iteration > s.iteration "
        "OR b.weight_version > s.weight_version OR b.ending IS NULL OR b.ending IN ('stop', 'length', 'repeat')))",
    ),
    Law(
        "segment",
        "a trajectory is open until its last segment ends it",
        "SELECT t.id FROM trajectory t LEFT JOIN segment s ON s.trajectory_id = t.id GROUP BY t.id HAVING t.state != 'dropped' "
        "AND (t.state = 'open') = (coalesce(sum(s.ending IN ('stop', 'length', 'repeat')), 0) > 0)",
    ),
    Law(
        "chunk",
        "tokens kept = made by the engine - cut, for every closed or recovered segment",
        "SELECT s.id FROM segment s LEFT JOIN chunk c ON c.segment_id = s.id GROUP BY s.id "
        "HAVING coalesce(sum(length(c.tokens)), 0) != 4 * (s.made - s.cut)",
    ),
    Law(
        "chunk",
        "a segment's chunks follow one another, with a log-prob and a KV version for every token",
        "SELECT c.segment_id FROM chunk c WHERE length(c.log_probs) != length(c.tokens) "
        "OR length(c.kv_versions) != length(c.tokens) OR c.offset != "
        "(SELECT coalesce(sum(length(b.tokens)), 0) / 4 FROM chunk b WHERE b.segment_id = c.segment_id AND b.offset < c.offset)",
    ),
    Law(
        "batch",
        "a batch's groups are there, numbered 0, 1, 2, ..., and trained",
        "SELECT b.iteration FROM batch b LEFT JOIN trajectory t ON t.group_id = b.group_id AND t.state = 'trained' "
        "GROUP BY b.iteration, b.ordinal HAVING count(t.id) = 0 OR (b.ordinal > 0 AND NOT EXISTS "
        "(SELECT 1 FROM batch a WHERE a.iteration = b.iteration AND a.ordinal = b.ordinal - 1))",
    ),
    Law(
        "batch",
        "trajectories are trained exactly where their group is in a batch",
        "SELECT id FROM trajectory WHERE state != 'dropped' "
        "AND (state = 'trained') != (group_id IN (SELECT group_id FROM batch))",
    ),
)


def counts(file: BufferFile, iteration: int | None) -> dict[str, int]:
    """Trajectories by what became of them up to `iteration` (None: now); each counted from its own rows."""
    bound = {"i": iteration}
    trained = "SELECT group_id FROM batch WHERE :i IS NULL OR iteration <= :i"
    dropped = "state = 'dropped' AND (:i IS NULL OR dropped_at <= :i)"
    by_then = "group_id IN (SELECT id FROM grp WHERE :i IS NULL OR drawn_at <= :i)"
    return {
        "drawn": file.value("SELECT coalesce(sum(group_size), 0) FROM grp WHERE :i IS NULL OR drawn_at <= :i", bound),
        "trained": file.value(
            f"SELECT count(*) FROM trajectory WHERE state = 'trained' AND group_id IN ({trained})",
            bound,
        ),
        "waiting": file.value(
            f"SELECT count(*) FROM trajectory WHERE {by_then} AND NOT ({dropped}) "
            f"AND NOT (state = 'trained' AND group_id IN ({trained}))",
            bound,
        ),
        "dropped": file.value(f"SELECT count(*) FROM trajectory WHERE {dropped}", bound),
    }


def terms(file: BufferFile) -> list[Term]:
    """The conservation table of the whole run."""

    def trajectories(condition: str) -> int:
        return file.value(f"SELECT count(*) FROM trajectory WHERE {condition}")

    return [
        Term("drawn", "trajectories", file.value("SELECT coalesce(sum(group_size), 0) FROM grp")),
        Term(
            "trained",
            "trajectories",
            file.value("SELECT count(*) FROM batch b JOIN trajectory t ON t.group_id = b.group_id AND t.dropped_reason IS NULL"),
        ),
        Term("waiting", "trajectories", trajectories(WAITING)),
        *(Term(f"dropped: {r}", "trajectories", trajectories(f"dropped_reason = '{r}'")) for r in DropReason),
        Term("made by engines", "tokens", file.value("SELECT coalesce(sum(made), 0) FROM segment")),
        Term("cut after repetition", "tokens", file.value("SELECT coalesce(sum(cut), 0) FROM segment")),
        Term("kept", "tokens", file.value("SELECT coalesce(sum(length(tokens)), 0) / 4 FROM chunk")),
        Term("cut short by a kill", "segments", file.value("SELECT count(*) FROM segment WHERE recovered")),
    ]


def check(file: BufferFile) -> None:
    """Raises BufferFileError naming every broken law, its table and the first rows that break it."""
    found = [text for (text,) in file.rows("PRAGMA integrity_check(3)") if text != "ok"]
    broken = [f"file: {text}" for text in found]
    for table, columns in TABLES.items():
        rows = file.rows(f"SELECT rowid FROM {table} WHERE crc != row_crc({', '.join(columns)}) LIMIT 3")
        if rows:
            broken.append(f"table {table}: a row's checksum is that of its columns: not in rows {_first(rows)}")
    for law in LAWS:
        rows = file.rows(f"{law.broken} LIMIT 3")
        if rows:
            broken.append(f"table {law.table}: {law.says}: broken at {_first(rows)}")
    broken += _unbalanced(terms(file))
    if broken:
        raise BufferFileError(
            f"{file.path}: breaks the rules of conservation: {'; '.join(broken)}. The file was altered or damaged from "
            "outside: restore a copy, or set buffer.path to a new file"
        )


def _unbalanced(rows: list[Term]) -> list[str]:
    count = {row.name: row.count for row in rows}
    dropped = sum(count[f"dropped: {r}"] for r in DropReason)
    broken = []
    if count["drawn"] != count["trained"] + count["waiting"] + dropped:
        broken.append(
            f"drawn = trained + waiting + dropped: {count['drawn']} != {count['trained']} + {count['waiting']} + {dropped}"
        )
    if count["kept"] != count["made by engines"] - count["cut after repetition"]:
        broken.append(
            f"kept = made - cut tokens: {count['kept']} != {count['made by engines']} - {count['cut after repetition']}"
        )
    return broken


def _first(rows: list[tuple]) -> str:
    return ", ".join(str(row[0]) for row in rows)
