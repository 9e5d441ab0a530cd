"""Rank 0's orders to the other ranks between collectives.

In the rollout phase only rank 0 conducts; the others wait here on a socket, with a deadline, and never in a collective.
Rank 0 hosts the store, so its death is seen at once. One rank alone needs no socket.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_rl.errors import EngineError


@dataclass(frozen=True)
class Order:
    """What all ranks do next, together."""

    iteration: int
    mend: bool = False  # bring back the engines that are gone, then take the next order
    train: bool = False  # a batch is ready: train on it and publish
    save: bool = False  # write a checkpoint at this boundary
    stop: bool = False  # leave the loop


class Orders:
    """One stream of orders from rank 0 to all ranks, read in the order they were given."""

    def __init__(self, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        """`host` is the address of rank 0 that all ranks reach. Collective when there are several ranks."""
        self._rank, self._timeout, self._count = rank, timedelta(seconds=timeout_s), 0
        self._store = self._connect(host) if world_size > 1 else None

    def _connect(self, host: str) -> dist.TCPStore:
        served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self._rank == 0 else None
        port = [served.port if served else 0]
        dist.broadcast_object_list(port, src=0)
        return served or dist.TCPStore(host, port[0], is_master=False, timeout=self._timeout)

    def give(self, order: Order) -> Order:
        """Rank 0 only."""
        if self._store is not None:
            self._store.set(f"order/{self._count}", json.dumps(asdict(order)))
        self._count += 1
        return order

    def take(self) -> Order:
        """The other ranks; raises EngineError when rank 0 stays silent past the deadline or is gone."""
        assert self._store is not None, "one rank alone gives its own orders"
        key = f"order/{self._count}"
        try:
            self._store.wait([key], self._timeout)
            text = self._store.get(key)
        except dist.DistNetworkError as e:
            raise EngineError(f"rank {self._rank}: rank 0 is gone; see its log for the cause") from e
        except dist.DistStoreError as e:
            raise EngineError(
                f"rank {self._rank}: no order from rank 0 within {self._timeout.total_seconds():.0f} s, which "
                "rollout.phase_timeout_s allows; see rank 0's log for what it waits for, or raise the setting"
            ) from e
        self._count += 1
        return Order(**json.loads(text))
