"""Everything the report and `inspect` read from a run folder, in one frozen value; read-only, also while the run goes on.

Trajectories are counted without their tokens: a long run holds more tokens than memory. The few that are shown are loaded
by `samples.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.errors import DataError
from megatron_rl.report.evaluation import read_evaluation
from megatron_rl.report.metrics import Row, read_metrics
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.buffer_file import BufferFile
from megatron_rl.rollout.conservation import Term
from megatron_rl.run_folder import kind_of


@dataclass(frozen=True)
class Trained:
    """A trained trajectory, without its tokens."""

    trajectory_id: int
    iteration: int  # whose batch it was in
    reward: float
    correct: bool
    num_versions: int  # distinct weight versions among its segments
    num_tokens: int
    tags: dict[str, str]
    difficulty: float | None


@dataclass(frozen=True)
class RunData:
    folder: Path
    config: Config
    rows: list[Row]  # metrics, one an iteration
    terms: list[Term]  # conservation table
    trained: list[Trained]  # in the order of training
    endings: dict[int, dict[str, int]]  # iteration -> ending -> segments; `open` while it is generated
    evaluation: dict[str, dict[str, Any]]  # `before`, `after`: held-out results, where there are any


def read_run(folder: str | Path) -> RunData:
    """Raises DataError when `folder` is not a run's, BufferFileError when its buffer cannot be read."""
    folder = Path(folder)
    config = run_config(folder)
    with open_buffer(config) as buffer:
        terms = buffer.conservation()
    file = BufferFile(config.buffer_path, None, read_only=True)
    try:
        trained, endings = _trained(file), _endings(file)
    finally:
        file.close()
    return RunData(folder, config, read_metrics(folder), terms, trained, endings, read_evaluation(folder))


def run_config(folder: str | Path) -> Config:
    """The resolved configuration saved with the run, its folder being where it lies now."""
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{folder}: not a run folder (config.yaml is missing); give the run.folder of a started run")
    if (kind := kind_of(folder)) != Config.kind:
        raise DataError(f"{folder}: a run of kind {kind} has no trajectories; see its report.html and metrics.jsonl")
    return configuration.load(path, [f"run.folder={json.dumps(str(folder))}"])


@contextmanager
def open_buffer(config: Config) -> Iterator[ReplayBuffer]:
    """The run's buffer, for reading only; another process may write it meanwhile."""
    if not config.buffer_path.is_file():
        raise DataError(
            f"{config.buffer_path}: no replay buffer here; the run has not begun, or buffer.path is on another machine: "
            "read the run there"
        )
    buffer = ReplayBuffer(config.buffer_path, read_only=True)
    try:
        yield buffer
    finally:
        buffer.close()


def _trained(file: BufferFile) -> list[Trained]:
    rows = file.rows(
        "SELECT t.id, b.iteration, t.reward, json_extract(t.outcome, '$.correct'), count(DISTINCT s.weight_version), "
        "sum(s.made - s.cut), p.tags, p.difficulty "
        "FROM batch b JOIN grp g ON g.id = b.group_id JOIN prompt p ON p.id = g.prompt_id "
        "JOIN trajectory t ON t.group_id = b.group_id AND t.state = 'trained' "
        "JOIN segment s ON s.trajectory_id = t.id AND s.made > s.cut GROUP BY t.id ORDER BY b.iteration, b.ordinal, t.id"
    )
    tags: dict[str, dict[str, str]] = {}
    trained = []
    for i, iteration, reward, correct, versions, tokens, text, difficulty in rows:
        if text not in tags:
            tags[text] = {key: str(value) for key, value in json.loads(text).items()}
        trained.append(Trained(i, iteration, reward, bool(correct), versions, tokens, tags[text], difficulty))
    return trained


def _endings(file: BufferFile) -> dict[int, dict[str, int]]:
    endings: dict[int, dict[str, int]] = defaultdict(dict)
    for iteration, ending, count in file.rows(
        "SELECT iteration, coalesce(ending, 'open'), count(*) FROM segment GROUP BY iteration, ending ORDER BY iteration"
    ):
        endings[iteration][ending] = count
    return dict(endings)
