"""Questions from a JSONL file: one JSON object a line (its fields: `records.py`). Blank lines are skipped.

Refuses a broken line with file, line and column. Next: `sources.py`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megatron_rl.data.records import FIELDS, Record, parse_record
from megatron_rl.errors import DataError

log = logging.getLogger(__name__)


def read_jsonl(path: Path) -> list[Record]:
    """Raises DataError for a file that cannot be read, is empty, or has a line that is no question."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise DataError(f"data.path={path}: cannot read it: {e.strerror}") from e
    records: list[Record] = []
    ignored: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            raw, text = _parse_line(line, f"{path}, line {number}")
            records.append(parse_record(raw, _Place(f"{path}, line {number}", text)))
            ignored.update(raw.keys() - FIELDS if isinstance(raw, dict) else ())
    if not records:
        raise DataError(f"data.path={path}: there is no question in it; write one JSON object a line")
    if ignored:
        log.info("%s: fields that are not read: %s", path, ", ".join(sorted(ignored)))
    return records


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
