"""Processes that a benchmark starts, torchrun's among them: a log each, a deadline, and an end with all their children.

Imports nothing heavy: what starts processes whose imports take half a minute should not pay for its own first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from unattended import Clock

ROOT = Path(__file__).parents[1]
_END_S = 15.0  # between SIGTERM and SIGKILL


def torchrun(ranks: int, *program: str | Path) -> list[str]:
    """A command that starts `program` on so many ranks of this machine, which find each other at a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, *map(str, program)]


def num_gpus() -> int:
    """That a process started here would see; without torch, whose import takes longer than the answer."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([gpu for gpu in shown.split(",") if gpu.strip()])
    with suppress(FileNotFoundError):
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
        return sum(line.startswith("GPU ") for line in told.stdout.splitlines())
    return 0


def ended_ranks(script: str, folder: Path, counts: Iterable[int], clock: Clock, *, telling: str) -> Iterator[int]:
    """`script --rank-of folder` for each number of ranks, all started at once for the sake of their imports: each number as its
    ranks have ended, or were ended at the clock's end, and the lines with `telling`, or the last ones, were printed."""
    jobs = {n: Job(torchrun(n, script, "--rank-of", folder), folder / f"ranks{n}.log") for n in counts}
    for ranks, job in jobs.items():
        code = job.wait(clock.left)
        clock.tell(f"{ranks} rank(s): {'ended at the deadline' if code is None else f'exit code {code}'}")
        lines = job.log.read_text(errors="replace").splitlines()
        print("\n".join(line for line in lines if telling in line) if code == 0 else job.tail(60), flush=True)
        yield ranks


class Job:
    """One process in a group of its own, with the checkout on its path. What it prints is in `log`, or printed."""

    def __init__(self, command: Sequence[str], log: Path | None, environment: Mapping[str, str] | None = None) -> None:
        """environment: beside this process's."""
        self._log = log
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **(environment or {})}
        with log.open("wb") if log else nullcontext() as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **own}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> Path:
        assert self._log is not None, "what it prints is not kept"
        return self._log

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None where it had to be ended."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(seconds, 0.0))
        self.end()
        return None

    def end(self) -> None:
        """SIGTERM to it and its children, SIGKILL to what is left."""
        for sign, patience_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            until = time.monotonic() + patience_s
            while time.monotonic() < until and (self._process.poll() is None or self._has_children()):
                time.sleep(0.1)

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _has_children(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def ending(jobs: list[Job]) -> Iterator[list[Job]]:
    """None of them outlives the block, nor this process where it is ended by SIGTERM, as `timeout` does it."""

    def leave(*_: object) -> None:
        raise SystemExit("ended by SIGTERM")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield jobs
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if left := [job for job in jobs if job.code is None]:
            with ThreadPoolExecutor(len(left)) as pool:
                list(pool.map(Job.end, left))
        signal.signal(signal.SIGTERM, before)
