"""Short processes forked from one that has paid the imports once: `Zygote` in a test, `python -m tests.zygote` behind it.

The imports of torch, Megatron-Core and transformers cost more than most jobs. The zygote starts no thread, so its forks are like
fresh processes and may fork again (the ranks of `tests/distributed`).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Zygote:
    def __init__(self, limit_s: int) -> None:
        """limit_s: a fork that lives longer is ended by SIGALRM."""
        self._limit_s = limit_s
        command = [sys.executable, "-W", "ignore", "-m", "tests.zygote"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, function: Callable[..., int | None], *arguments: object, log: Path) -> int:
        """Calls a function of a module that can be imported by its name, in a fork; returns the exit code: what the function
        returned (None is 0), 1 after an exception, minus the signal's number if one ended it. Arguments that are neither
        numbers, lists, dicts nor None come as text. What the fork prints, its traceback too, is in `log`."""
        assert self._process.stdin and self._process.stdout
        job = {
            "module": function.__module__,
            "name": function.__name__,
            "arguments": arguments,
            "log": log,
            "limit_s": self._limit_s,
        }
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote died"
        return int(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def run_job(job: dict[str, Any]) -> None:
    signal.alarm(job["limit_s"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = getattr(importlib.import_module(job["module"]), job["name"])(*job["arguments"]) or 0
    except SystemExit as e:  # how the command line ends
        code = int(e.code or 0)
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    for module in ("megatron_rl.cli", "megatron_rl.loop", "tests.training.material"):
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_job(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
