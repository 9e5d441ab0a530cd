"""Whose memory each rank of a server reads its weights from: that of the trainer's rank on its own GPU.

    GPU 0   trainer rank 0 --handle--> server 0, rank 0        all ranks hold the same bucket, each on its own GPU;
    GPU 1   trainer rank 1 --handle--> server 0, rank 1        rank 0 speaks to the servers, so it collects the handles

A handle is opened once by one process, so there is one for each rank of each server. A server on a GPU without a trainer's rank
reads rank 0's memory over the link. `agree` also holds the ranks in step: no rank writes into a buffer again before rank 0 has
had the answers for what lay there. When buckets are packed and delivered: `transport.py`; how: `IPC` of
`rollout/engines/sglang_transport.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.weights.transport import FlatBucket

Serialize = Callable[[FlatBucket], str]
GatherAll = Callable[[Any], list[Any]]  # collective: every rank's value, on every rank


def alone(value: Any) -> list[Any]:
    """`GatherAll` of a trainer of one rank."""
    return [value]


class Handles:
    """Of one trainer rank, for one publish after the other; all it does is collective."""

    def __init__(self, make_serializer: Callable[[], Serialize], gather_all: GatherAll = alone, *, rank: int = 0) -> None:
        """make_serializer: makes what turns a bucket into a server's payload; called when it is first needed. gather_all: over
        the ranks on this machine's GPUs, rank r on GPU r."""
        self._make_serializer, self._gather_all, self._rank = make_serializer, gather_all, rank
        self._serialize: Serialize | None = None
        self._sources: list[int] = []  # the trainer rank of each server rank

    def agree(self, gpus: Sequence[int]) -> None:
        """Who gets the next bucket. gpus: of all ranks of these servers, in order; rank 0's count, the others' are ignored."""
        everywhere = self._gather_all(list(gpus))
        self._sources = [gpu if gpu < len(everywhere) else 0 for gpu in everywhere[0]]
        if self._serialize is None and self._rank in self._sources:
            self._serialize = self._make_serializer()

    def of(self, bucket: FlatBucket) -> list[str]:
        """A payload for each of the server ranks named in `agree`. Rank 0 waits itself until its own memory is written."""
        if self._rank != 0:
            bucket.wait_until_written()
        own = [self._serialize(bucket) for source in self._sources if source == self._rank] if self._serialize else []
        everywhere = [iter(payloads) for payloads in self._gather_all(own)]
        return [next(everywhere[source]) for source in self._sources]
