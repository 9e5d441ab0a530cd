"""What a benchmark that runs unattended is told and tells: its options, and the seconds that are left.

Imports nothing heavy: a program that only starts others and waits begins at once. Measuring: `gpu_timing.py`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
FAKE = "a tiny model and a fake server, on a CPU"


@dataclass
class Clock:
    """Seconds left of what the run may take; cases that would come too late are left out, aloud."""

    seconds: float
    started: float

    @staticmethod
    def of(seconds: float) -> Clock:
        return Clock(seconds, time.perf_counter())

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    def has_time_for(self, what: str, seconds: float) -> bool:
        if self.left < seconds:
            print(f"left out: {what} (needs {seconds:.0f} s, {max(self.left, 0):.0f} s left)", flush=True)
            return False
        self.tell(what)
        return True

    def tell(self, what: str) -> None:
        print(f"[{self.seconds - self.left:5.1f} s] {what}", flush=True)


def command_line(description: str | None, *, seconds: float, then: str, small: str = FAKE) -> argparse.ArgumentParser:
    """The options of every benchmark that runs unattended. then: what holds after `seconds`; small: what `--small` tries."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"after which {then}")
    parser.add_argument("--small", action="store_true", help=small)
    return parser
