"""Short runs of the whole loop in forks of the zygote: `kill_points.py`, seen from a test."""

from __future__ import annotations

from pathlib import Path

from tests import zygote
from tests.resume.kill_points import train


class Zygote:
    def __init__(self, forks: zygote.Zygote) -> None:
        self._forks = forks

    def run(self, config: Path, folder: Path, checkpoint_every: int, *overrides: str, kill: str | None = None) -> int:
        """Exit code of a run, negative for a signal; kill: one of the POINTS of `kill_points.py`. Its log is FOLDER.log."""
        given = [f"run.folder={folder}", f"run.checkpoint_every={checkpoint_every}", *overrides]
        return self._forks.run(train, config, given, kill, log=folder.with_suffix(".log"))
