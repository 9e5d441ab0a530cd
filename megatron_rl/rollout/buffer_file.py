"""The replay buffer's file: its schema, its one writer, and what SQLite says put into our words.

Durability: WAL with `synchronous=NORMAL`. Everything committed survives `kill -9` of the process; a power cut may lose
the commits since the last durable one (`BufferFile.transaction(durable=True)`), never the file's consistency. Every row
carries a checksum of its other columns, because SQLite checks no page it reads; temporary triggers keep it, so a row
altered by anything but this class is found by `conservation.py`. What the rows mean: `buffer.py`.
"""

from __future__ import annotations

import sqlite3
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_rl.errors import BufferFileError

SCHEMA_VERSION = 1

# Columns of every table but its checksum `crc`. Blobs are little-endian int32 or float32.
TABLES = {
    "meta": {
        "run_id": "TEXT NOT NULL",
        "schema": "INTEGER NOT NULL",
        "lineage": "INTEGER NOT NULL",
        "phase": "INTEGER",  # last iteration whose rollout phase began
    },
    "prompt": {
        "id": "TEXT PRIMARY KEY",
        "messages": "TEXT NOT NULL",
        "token_ids": "BLOB NOT NULL",
        "answer": "TEXT NOT NULL",
        "verifier": "TEXT NOT NULL",
        "tags": "TEXT NOT NULL",
        "difficulty": "REAL",
    },
    "grp": {
        "id": "INTEGER PRIMARY KEY",  # ordinal of the draw
        "prompt_id": "TEXT NOT NULL",
        "group_size": "INTEGER NOT NULL",
        "drawn_at": "INTEGER NOT NULL",  # iteration
    },
    "trajectory": {
        "id": "INTEGER PRIMARY KEY",  # group_id * group_size + index in the group
        "group_id": "INTEGER NOT NULL",
        "state": "TEXT NOT NULL",
        "reward": "REAL",
        "outcome": "TEXT",  # the whole Outcome
        "dropped_reason": "TEXT",
        "dropped_at": "INTEGER",  # iteration
    },
    "segment": {
        "id": "INTEGER PRIMARY KEY AUTOINCREMENT",
        "trajectory_id": "INTEGER NOT NULL",
        "ordinal": "INTEGER NOT NULL",
        "iteration": "INTEGER NOT NULL",
        "weight_version": "INTEGER NOT NULL",
        "lineage": "INTEGER NOT NULL",
        "temperature": "REAL NOT NULL",
        "engine": "TEXT NOT NULL",
        "ending": "TEXT",  # NULL while open
        "made": "INTEGER NOT NULL DEFAULT 0",  # tokens the engine says it made, as of the last commit
        "cut": "INTEGER NOT NULL DEFAULT 0",  # of them, not kept: made after the repetition detector had fired
        "recovered": "INTEGER NOT NULL DEFAULT 0",  # 1: found open at a start, so its open chunk is lost
    },
    "chunk": {
        "segment_id": "INTEGER NOT NULL",
        "offset": "INTEGER NOT NULL",  # in the segment [tokens]
        "tokens": "BLOB NOT NULL",
        "log_probs": "BLOB NOT NULL",
        "kv_versions": "BLOB NOT NULL",
        "from_policy": "INTEGER NOT NULL",  # 0: a tool's tokens, which carry no loss
    },
    "batch": {
        "iteration": "INTEGER NOT NULL",
        "ordinal": "INTEGER NOT NULL",
        "group_id": "INTEGER NOT NULL",
    },
}
INDEXES = (
    "CREATE INDEX trajectory_group ON trajectory(group_id)",
    "CREATE INDEX trajectory_state ON trajectory(state)",
    "CREATE UNIQUE INDEX segment_ordinal ON segment(trajectory_id, ordinal)",
    "CREATE INDEX segment_iteration ON segment(iteration)",
    "CREATE UNIQUE INDEX chunk_offset ON chunk(segment_id, offset)",
    "CREATE UNIQUE INDEX batch_ordinal ON batch(iteration, ordinal)",
    "CREATE UNIQUE INDEX batch_group ON batch(group_id)",
)


class BufferFile:
    """An open file: statements, transactions and the writer's lock. Raises BufferFileError wherever SQLite fails."""

    def __init__(self, path: str | Path, run_id: str | None, *, read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only
        self._lock: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None
        try:
            with self._translated():
                self._open(run_id)
        except BufferFileError:
            self.close()
            raise

    def execute(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        with self._translated():
            return self._connection.execute(sql, values)

    def rows(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple]:
        with self._translated():
            return self._connection.execute(sql, values).fetchall()

    def value(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """First column of the first row; None when there is no row."""
        rows = self.rows(sql, values)
        return rows[0][0] if rows else None

    def executemany(self, sql: str, values: Sequence[Sequence[Any]]) -> None:
        with self._translated():
            self._connection.executemany(sql, values)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All or nothing; one inside another joins it. `durable`: this and every earlier commit survive a power cut."""
        if self.read_only:
            raise BufferFileError(f"{self.path}: opened read-only; open it without read_only to write")
        if self._connection.in_transaction:
            yield
            return
        if durable:
            self.execute("PRAGMA synchronous=FULL")  # syncs the whole log at the next commit
        try:
            self.execute("BEGIN IMMEDIATE")
            yield
            self.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):  # the first error is the one to tell
                    self._connection.execute("ROLLBACK")
            if durable:
                self.execute("PRAGMA synchronous=NORMAL")

    def close(self) -> None:
        """Any number of times."""
        for connection in (self._db, self._lock):
            if connection is not None:
                connection.close()
        self._db = self._lock = None

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None, f"{self.path} is closed"
        return self._db

    def _open(self, run_id: str | None) -> None:
        mode = "ro" if self.read_only else "rwc"
        if not self.read_only:
            self._lock = self._locked()
        self._db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=10.0)
        self._db.create_function("row_crc", -1, row_crc, deterministic=True)
        found = {name for (name,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not self.read_only:
            self.execute("PRAGMA journal_mode=WAL")
            self.execute("PRAGMA synchronous=NORMAL")
            if not found:
                self._create(run_id or uuid.uuid4().hex)
                found = set(TABLES)
        self._identify(found, run_id)
        if not self.read_only:
            for trigger in _sealing_triggers():
                self.execute(trigger)

    def _locked(self) -> sqlite3.Connection:
        """A lock that dies with the process, is not inherited by forked workers, and also holds within this process:
        SQLite's own locking of a side file gives all three, flock and lockf two each."""
        lock = sqlite3.connect(f"{self.path}.lock", isolation_level=None, timeout=0.0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as e:
            lock.close()
            if getattr(e, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
                raise
            raise BufferFileError(
                f"{self.path}: already open for writing, here or in another process; one run writes a buffer at a time: "
                "end the other one, or give this run its own run.folder"
            ) from e
        return lock

    def _create(self, run_id: str) -> None:
        with self.transaction(durable=True):
            for table, columns in TABLES.items():
                body = ", ".join(f"{name} {kind}" for name, kind in columns.items())
                self.execute(f"CREATE TABLE {table} ({body}, crc INTEGER NOT NULL DEFAULT 0)")
            for index in INDEXES:
                self.execute(index)
            values = (run_id, SCHEMA_VERSION, 0, None)
            self.execute("INSERT INTO meta VALUES (?, ?, ?, ?, ?)", (*values, row_crc(*values)))

    def _identify(self, found: set[str], run_id: str | None) -> None:
        if "meta" not in found:
            raise BufferFileError(f"{self.path}: an SQLite file, but not a replay buffer; set buffer.path to another file")
        rows = self.rows("SELECT run_id, schema FROM meta")
        if len(rows) != 1:
            raise BufferFileError(f"{self.path}: damaged: table meta has {len(rows)} rows, the rule is 1; {_RESTORE}")
        owner, schema = rows[0]
        if schema != SCHEMA_VERSION:
            remedy = "a newer megatron_rl wrote it: update" if schema > SCHEMA_VERSION else "an older one wrote it: downgrade"
            raise BufferFileError(
                f"{self.path}: has schema {schema}, this megatron_rl reads {SCHEMA_VERSION}; {remedy} megatron_rl, "
                "or set buffer.path to another file"
            )
        missing = sorted(set(TABLES) - found)
        if missing:
            raise BufferFileError(f"{self.path}: damaged: table {', '.join(missing)} is missing; {_RESTORE}")
        if run_id is not None and owner != run_id:
            raise BufferFileError(
                f"{self.path}: belongs to run {owner}, this is run {run_id}; a buffer serves one run: set buffer.path to "
                "another file, or run.folder to the folder of its run"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as e:
            raise BufferFileError(f"{self.path}: {_explain(e)}") from e


_RESTORE = "restore a copy, salvage it with `sqlite3 FILE .recover`, or set buffer.path to a new file"


def _explain(e: sqlite3.DatabaseError) -> str:
    code = getattr(e, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return "the disk is full; everything committed is kept: free some space and start the run again"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"damaged, or not a replay buffer ({e}); {_RESTORE}"
    if code == sqlite3.SQLITE_IOERR:
        return (
            f"the disk refuses reads or writes ({e}); everything committed is kept: check free space, file size limits and the "
            "device, then start the run again"
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY):
        return f"cannot be opened ({e}); buffer.path must name a file in an existing folder that this user may write"
    return f"SQLite failed ({e}); the last transaction is undone and everything before it is kept"


def row_crc(*values: str | float | bytes | None) -> int:
    """Checksum of a row's columns, each with its length, so that no byte can move from one to the next."""
    crc = 0
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode()
        crc = zlib.crc32(data, zlib.crc32(len(data).to_bytes(8, "little"), crc))
    return crc


def _sealing_triggers() -> Iterator[str]:
    for table, columns in TABLES.items():
        names = ", ".join(columns)
        for event in ("INSERT", f"UPDATE OF {names}"):
            yield (
                f"CREATE TEMP TRIGGER seal_{table}_{event[:6]} AFTER {event} ON main.{table} BEGIN "
                f"UPDATE {table} SET crc = row_crc({names}) WHERE rowid = NEW.rowid; END"
            )
