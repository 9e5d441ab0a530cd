"""Forks the ranks of a test and watches them: when one fails the others, who would wait for it, are ended."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

from torch.distributed import TCPStore


class Meeting:
    """Where the ranks of one launch find each other, as torchrun would have told them.

    Rank 0 holds the store and the kernel chooses its port, so that two launches on one machine cannot want the same: a port
    that is looked up first and opened later may be another's by then."""

    def __init__(self, rank: int, told: list[SimpleQueue[int]]) -> None:
        self.rank, self._told, self._stores = rank, told, []
        names, numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), (rank, rank, len(told), len(told))
        os.environ |= dict(zip(names, map(str, numbers), strict=True))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def prepare(self) -> None:
        """Before each `parallel.initialize`, on every rank: a store without a past."""
        if self.rank == 0:
            self._stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            for queue in self._told[1:]:
                queue.put(self._stores[-1].port)
        port = self._stores[-1].port if self.rank == 0 else self._told[self.rank].get()
        os.environ["MASTER_PORT"] = str(port)


def run_ranks(target: Callable[..., None], num_ranks: int, *arguments: Any) -> int:
    """`target(meeting, *arguments)` in a forked process for each rank; returns the largest exit code. Call it before any thread
    is started."""
    fork = multiprocessing.get_context("fork")
    told = [fork.SimpleQueue() for _ in range(num_ranks)]
    ranks = [fork.Process(target=_run_rank, args=(target, rank, told, arguments)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        for process in ranks:
            process.join(0.2)
        if any(process.exitcode not in (None, 0) for process in ranks):
            for process in ranks:
                process.terminate()
    return max(abs(process.exitcode or 0) for process in ranks)


def _run_rank(target: Callable[..., None], rank: int, told: list[SimpleQueue[int]], arguments: tuple[Any, ...]) -> None:
    target(Meeting(rank, told), *arguments)
