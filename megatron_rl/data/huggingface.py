"""Questions from a folder saved by Hugging Face `datasets` (`save_to_disk`); columns as the fields of `records.py`.

Reads local folders only. A folder of several splits gives its `train` split. Refuses when the package is not installed.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rl.data.records import Record, Where, parse_record
from megatron_rl.errors import DataError


def read_huggingface(path: Path) -> list[Record]:
    """Raises DataError for a missing package or folder, or a row that is no question."""
    try:
        from datasets import load_from_disk  # optional: only this source needs it
    except ImportError as e:
        raise DataError(
            "data.source=huggingface: the package `datasets` is not installed; `pip install datasets`, "
            "or write the questions as JSONL and set data.source=jsonl"
        ) from e
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError) as e:
        raise DataError(f"data.path={path}: not a folder saved by datasets: {e}") from e
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise DataError(f"data.path={path}: its splits are {', '.join(dataset)}; one must be called train")
        dataset = dataset["train"]
    return [parse_record(dict(row), _place(path, number)) for number, row in enumerate(dataset)]


def _place(path: Path, number: int) -> Where:
    return lambda field: f"{path}, row {number}"
