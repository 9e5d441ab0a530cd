"""The command line in a fork of the zygote."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_rl import cli
from megatron_rl.master import Master


def train(arguments: list[str], sigterm_after: int | None = None) -> None:
    """`megatron-rl train ARGUMENTS`; `sigterm_after`: the iteration after whose report the process is sent a SIGTERM."""
    report = Master.report_iteration

    def report_iteration(self: Master, iteration: int, *rest: Any) -> None:
        report(self, iteration, *rest)
        if iteration == sigterm_after:
            os.kill(os.getpid(), signal.SIGTERM)

    Master.report_iteration = report_iteration  # type: ignore[method-assign]
    sys.argv = ["megatron-rl", "train", *arguments]
    cli.main()
