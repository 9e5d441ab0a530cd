"""Short runs in forks of one process that has the imports behind it: `zygote.py`, seen from a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


class Zygote:
    def __init__(self) -> None:
        script = Path(__file__).with_name("zygote.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, config: Path, folder: Path, checkpoint_every: int, *overrides: str, kill: str | None = None) -> int:
        """Exit code of a run, negative for a signal; kill: one of the POINTS of `zygote.py`. Its log is FOLDER.log."""
        assert self.process.stdin and self.process.stdout
        given = [f"run.folder={folder}", f"run.checkpoint_every={checkpoint_every}", *overrides]
        job = {"config": str(config), "overrides": given, "kill": kill, "log": str(folder.with_suffix(".log"))}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the zygote died"
        return json.loads(answer)["code"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)
