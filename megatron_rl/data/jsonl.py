"""Questions from a JSONL file: one JSON object a line (its fields: `records.py`). Blank lines are skipped.

Refuses a broken line with file, line and column. Next: `sources.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.data.records import FIELDS, Record, Where, parse_record
from megatron_rl.errors import DataError

log = logging.getLogger(__name__)


def read_jsonl(path: Path) -> list[Record]:
    """Raises DataError for a file that cannot be read, is empty, or has a line that is no question."""
    records: list[Record] = []
    ignored: set[str] = set()
    for raw, where in read_objects(path, "data.path"):
        records.append(parse_record(raw, where))
        ignored.update(raw.keys() - FIELDS if isinstance(raw, dict) else ())
    if not records:
        raise DataError(f"data.path={path}: there is no question in it; write one JSON object a line")
    if ignored:
        log.info("%s: fields that are not read: %s", path, ", ".join(sorted(ignored)))
    return records


def read_objects(path: Path, setting: str) -> Iterator[tuple[object, Where]]:
    """What each line holds, and where. Raises DataError for a file that cannot be read and a line that is not JSON."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise DataError(f"{setting}={path}: cannot read it: {e.strerror}") from e
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            raw, text = _parse_line(line, place)
            yield raw, _Place(place, text)


def _parse_line(line: bytes, place: str) -> tuple[object, str]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{place}, column {e.start + 1}: byte {line[e.start]:#04x} is not UTF-8; save the file as UTF-8") from e
    try:
        return json.loads(text), text
    except json.JSONDecodeError as e:
        found = repr(text[e.pos : e.pos + 20]) if e.pos < len(text) else "the end of the line"
        raise DataError(f"{place}, column {e.colno}: not valid JSON: {e.msg}, found {found}; correct the line") from e


class _Place:
    """Where a field stands in a line, for messages."""

    def __init__(self, line: str, text: str) -> None:
        self._line, self._text = line, text

    def __call__(self, name: str) -> str:
        column = self._text.find(json.dumps(name)) + 1 if name else 0
        return f"{self._line}, column {column or 1}"
