"""The metrics of a run: `metrics.jsonl`, one object an iteration, and the same numbers for TensorBoard.

A row is on disk before `write` returns; a kill can tear only the line being written, and `cut_back` removes it. Which
keys there are is the writer's business (`master.py`); who shows them: `progress.py` while it runs, `html.py` afterwards.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"

Row = dict[str, Any]  # `iteration`: int; the other values int, float, or None for "not finite"


class MetricsLog:
    """Writes the metrics of one run folder. `tensorboard`: also for TensorBoard, where the package is installed."""

    def __init__(self, folder: str | Path, tensorboard: bool) -> None:
        self._path = Path(folder) / FILE_NAME
        self._board_folder = Path(folder) / "tensorboard" if tensorboard else None
        self._board: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            log.info("report.tensorboard=true, but the package tensorboard is not installed: writing %s only", self._path)
            self._board_folder = None

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; it must hold `iteration`. JSON knows no NaN or infinity: those become null."""
        plain = {key: _plain(value) for key, value in row.items()}
        iteration = int(row["iteration"])
        data = (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._path.open("ab") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if self._board_folder is not None:
            self._write_board(iteration, plain)

    def cut_back(self, iteration: int) -> None:
        """Drop the rows of `iteration` and later, and a torn last line; the file is replaced in one step.

        TensorBoard is told to forget the same iterations. Raises DataError for a damaged line that is not the last."""
        self._close_board()
        if self._board_folder is not None:
            self._open_board(purge_step=iteration)
        if not self._path.exists():
            return
        kept = [line for line, row in _lines(self._path) if row["iteration"] < iteration]
        partial = self._path.with_name(f".{FILE_NAME}.partial")
        with partial.open("wb") as f:
            f.writelines(kept)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(self._path)

    def close(self) -> None:
        """Any number of times."""
        self._close_board()

    def _write_board(self, iteration: int, row: Row) -> None:
        if self._board is None:
            self._open_board(purge_step=None)
        for key, value in row.items():
            if key != "iteration" and value is not None:
                self._board.add_scalar(key, value, iteration)
        self._board.flush()

    def _open_board(self, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports torch; the other readers of this file need none

        self._board = SummaryWriter(str(self._board_folder), purge_step=purge_step)

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def read_metrics(folder: str | Path) -> list[Row]:
    """All rows in order; a line being written, or torn by a kill, is left out. No file: no rows.

    Raises DataError for a damaged line that is not the last."""
    path = Path(folder) / FILE_NAME
    return [row for _, row in _lines(path)] if path.exists() else []


def _lines(path: Path) -> list[tuple[bytes, Row]]:
    """(line with its newline, its row) of every whole line."""
    *whole, torn = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            found = isinstance(row, dict) and isinstance(row.get("iteration"), int)
        except ValueError:
            found = False
        if found:
            lines.append((line + b"\n", row))
        elif number < len(whole) or torn:
            raise DataError(f"{path}, line {number}: not a metrics row ({line[:60]!r}); remove the line and start again")
    return lines


def _plain(value: Any) -> int | float | None:
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None
