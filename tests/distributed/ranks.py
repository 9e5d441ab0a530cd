"""Forks the ranks of a test and watches them: when one fails the others, who would wait for it, are ended."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any


def run_ranks(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> int:
    """One forked process for each tuple of arguments; returns the largest exit code. Call it before any thread is started."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=target, args=own) for own in arguments]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        for process in ranks:
            process.join(0.2)
        if any(process.exitcode not in (None, 0) for process in ranks):
            for process in ranks:
                process.terminate()
    return max(abs(process.exitcode or 0) for process in ranks)
