"""Weights through checkpoint-engine's ParameterServer, an optional package: by way of host memory to servers on shared GPUs.

    lend       bucket by bucket, each kept by the rank that holds the least         GPU, the rank's share of all weights
    complete   every rank: register_checkpoint (its share), gather_metas, update    GPU -> pinned host memory -> GPU -> all GPUs
               rank 0: POST /update_weights_from_ipc to each server                 whose ranks copy from their own GPU's buffer

There is one parameter server to a trainer's rank, over the trainer's own process group: it makes and ends none (`auto_pg`).
It needs a reader on every GPU. Where no server takes part, e.g. while only one started again is published to, the rank itself
answers in its place. It refuses servers on other GPUs. What it costs beside `IPC` of `sglang_transport.py`: the share on the
GPU, the same in pinned host memory for the whole run, and buffers that checkpoint-engine chooses (three of up to 8 GiB).
A server that dies during an update cannot be put up with: the parameter servers wait for it without end, and every rank with
them. So that ends the run, with one error; resuming it starts the servers again. What a server could not load of the last
bucket, checkpoint-engine does not look at: `rollout.sglang.verify_weights` does, at the first publish. Measured by
`benchmarks/publish_side_by_side.py`.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch

from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.rollout.engines.sglang_transport import Receiver, error_of, in_thread
from megatron_rl.weights.handles import GatherAll
from megatron_rl.weights.transport import ALIGNMENT, FlatBucket

VERSION = "0.4.2"
_NAME = "megatron_rl"  # of what is registered
_REASON_S = 5.0  # between a server's refusal and the end of an update that all workers break off
Paths = list[tuple[str, str]]  # of each trainer rank: its GPU's UUID, the socket where a server's rank on that GPU asks
Ask = Callable[[Paths], None]


class ParameterServer(Protocol):
    """One rank's, of the package. `gather_metas` and `update` are collective, and calls may raise a RuntimeError, an
    AssertionError or an OSError."""

    def register_checkpoint(
        self, checkpoint_name: str, *, named_tensors: dict[str, torch.Tensor], use_shared_memory_pool: bool
    ) -> None:
        """Copies them into pinned host memory; with the shared pool into the same as before, where their sizes are the same."""
        ...

    def unregister_checkpoint(self, checkpoint_name: str) -> None: ...

    def gather_metas(self, checkpoint_name: str) -> None: ...

    def update(self, checkpoint_name: str, req_func: Ask) -> None:
        """Returns when every reader has everything. It calls `req_func` in a thread, on every rank."""
        ...


class CheckpointEngine:
    """See `sglang_transport.Transport`."""

    alignment = ALIGNMENT
    lanes = 1
    reads_every_rank = True
    is_broken = False

    def __init__(
        self,
        server: ParameterServer,
        stand_in: Callable[[str], None],
        gather_all: GatherAll,
        *,
        rank: int,
        timeout_s: float,
    ) -> None:
        """stand_in: answers at a socket's path in place of a server's rank. gather_all: over the ranks, rank r on GPU r.
        timeout_s: longest wait for an update [s]."""
        self.in_use = asyncio.Lock()
        self.failed: dict[Receiver, EngineError] = {}
        self._server, self._stand_in, self._gather_all, self._rank = server, stand_in, gather_all, rank
        self._timeout_s = timeout_s
        self._receivers: list[Receiver] = []
        self._read: list[int] = []  # GPUs that servers read from, the same on every rank
        self._given: list[int] = []  # bytes by rank, since `open`
        self._kept: dict[str, torch.Tensor] = {}
        self._device = torch.device("cpu")
        self._calls: dict[Future[Any], Receiver] = {}
        self._refused: Future[None] = Future()  # done with the first server that refuses

    async def open(self, receivers: Sequence[Receiver]) -> None:
        self.failed, self._kept, self._receivers = {}, {}, []
        everywhere = self._gather_all([receiver.gpus for receiver in receivers])
        self._given, self._read = [0] * len(everywhere), []
        for i, gpus in enumerate(everywhere[0]):
            wrong = sorted(gpu for gpu in gpus if gpu >= len(everywhere) or gpu in self._read)
            if not wrong:
                self._read += gpus
            if self._rank == 0 and wrong:
                self.failed[receivers[i]] = EngineError(
                    f"engine {receivers[i].client.name}: has GPUs {list(gpus)}; with rollout.sglang.checkpoint_engine=true each "
                    f"needs a trainer's rank and no other server, which GPU {wrong[0]} is without; start more ranks, or unset it"
                )
            elif self._rank == 0:
                self._receivers.append(receivers[i])

    def lend(self, bucket: FlatBucket) -> None:
        """The rank's share is kept: what it lies in is written again."""
        if not self._read:
            return
        owner = self._given.index(min(self._given))
        self._given[owner] += bucket.data.numel()
        self._device = bucket.data.device
        if owner == self._rank:
            self._kept |= FlatBucket(bucket.data.clone(), bucket.pieces).tensors()

    def deliver(self, bucket: FlatBucket, lent: None) -> None:
        """Nothing: `complete` delivers all of them."""

    def answered(self) -> None:
        """Nothing: no rank's memory is read before `complete`."""

    async def complete(self) -> None:
        """Raises EngineError on every rank where the ranks cannot go on together."""
        if self._read:
            await asyncio.wrap_future(in_thread(self._complete))

    async def close(self) -> None:
        """Nothing: servers hold nothing of it."""

    # --- an update -----------------------------------------------------------------------------------------------------

    def _complete(self) -> None:
        is_owner = bool(self._kept)
        unheld = [problem for problem in self._gather_all(self._hold()) if problem]
        if unheld:
            raise EngineError(
                f"weights by checkpoint-engine: {unheld[0]}; a rank needs its share of the weights in pinned host memory: free "
                "some, or set rollout.sglang.checkpoint_engine=false"
            )
        self._calls, self._refused = {}, Future()
        updating = in_thread(self._update)
        either: list[Future[Any]] = [updating, self._refused]
        wait(either, self._timeout_s, FIRST_COMPLETED)
        if not updating.done():
            wait([updating], _REASON_S)
        if not updating.done():
            raise self._stuck(str(error_of(self._refused)) if self._refused.done() else "no answer")
        wait(self._calls, self._timeout_s)
        if is_owner:
            self._server.unregister_checkpoint(_NAME)
        self._judge(self._gather_all(updating.result()))

    def _hold(self) -> str | None:
        """What is wrong with it, if anything."""
        with self._on_device():
            if self._device.type == "cuda":
                torch.cuda.synchronize()  # it copies in threads and streams of its own
            try:
                if self._kept:
                    self._server.register_checkpoint(_NAME, named_tensors=self._kept, use_shared_memory_pool=True)
            except (RuntimeError, AssertionError) as e:
                return f"rank {self._rank} cannot register {self._given[self._rank]} bytes ({e})"
            self._kept = {}
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # it looks at what is free
        return None

    def _update(self) -> str | None:
        """How it failed, if so."""
        with self._on_device():
            try:
                self._server.gather_metas(_NAME)
                self._server.update(_NAME, self._ask)
            except (RuntimeError, AssertionError, OSError) as e:
                return f"{type(e).__name__}: {e}"
        return None

    def _ask(self, paths: Paths) -> None:
        """Returns at once: whoever is asked for it comes to the paths."""
        if self._rank not in self._read:
            in_thread(self._stand_in, paths[self._rank][1])
        for receiver in self._receivers:
            body = {"zmq_handles": dict(paths[gpu] for gpu in receiver.gpus), "flush_cache": False}
            call = in_thread(receiver.client.post_blocking, "/update_weights_from_ipc", body)
            self._calls[call] = receiver
            call.add_done_callback(self._note_refusal)

    def _note_refusal(self, call: Future[Any]) -> None:
        if (error := call.exception()) is not None:
            with suppress(InvalidStateError):  # not the first
                self._refused.set_exception(error)

    def _judge(self, problems: list[str | None]) -> None:
        """problems: of every rank's update."""
        broken = [problem for problem in problems if problem]
        if broken and len(broken) < len(problems):
            raise self._stuck(broken[0])
        for call, receiver in self._calls.items():
            error = error_of(call)
            if not call.done():
                error = EngineError(f"engine {receiver.client.name}: no answer {self._timeout_s:g} s after the update's end")
            if isinstance(error, EngineError):
                self.failed[receiver] = error
        if broken and not self.failed:
            self.failed = dict.fromkeys(self._receivers, EngineError(f"weights by checkpoint-engine: {broken[0]}"))

    def _stuck(self, why: str) -> EngineError:
        return EngineError(
            f"weights by checkpoint-engine: the update did not end on all ranks ({why}), waited up to "
            f"training.collective_timeout_s={self._timeout_s:g}; the ranks cannot be called back from it: resume the run, whose "
            "servers are started again then; see their logs. rollout.sglang.checkpoint_engine=false puts up with such a server"
        )

    def _on_device(self) -> Any:
        """A new thread begins on GPU 0."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def connect(rank: int, num_ranks: int, host: str, gather_all: GatherAll, timeout_s: float) -> CheckpointEngine:
    """Collective over all ranks of the trainer, whose process group is there. host: rank 0's address, as all ranks reach it.

    Raises ConfigError where the package is not installed."""
    try:
        from checkpoint_engine.ps import ParameterServer as PackagedServer
        from loguru import logger
    except ImportError as e:
        raise ConfigError(
            f"rollout.sglang.checkpoint_engine=true: the trainer cannot import checkpoint-engine ({e}); install it here and "
            f"where the servers run: pip install checkpoint-engine=={VERSION}, or leave the setting false"
        ) from e
    logger.configure(handlers=[{"sink": sys.stderr, "level": "ERROR"}])  # without its lines for every bucket
    port = gather_all(_free_port() if rank == 0 else 0)[0]
    with _rank_in_environment(rank):
        server = PackagedServer(
            rank=rank,
            world_size=num_ranks,
            auto_pg=False,  # or it would end Megatron's groups after an update
            master_addr=host,
            master_port=port,
        )
    return CheckpointEngine(server, stand_in, gather_all, rank=rank, timeout_s=timeout_s)


def stand_in(path: str) -> None:
    """Answer as a server's rank would, to the end of an update, and read nothing. In the process that owns the buffer."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.REP) as reply:
        reply.connect(path)
        _, told = pickle.loads(reply.recv())
        torch.UntypedStorage._release_ipc_counter_cuda(told[11], told[12])  # or the buffer would be kept for whoever opens it
        reply.send(b"")
        ends = 0
        while ends < 2:  # of the tensors, then of what follows them
            message = pickle.loads(reply.recv())
            if isinstance(message, Exception):
                return
            ends += message is None
            reply.send(b"")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@contextmanager
def _rank_in_environment(rank: int) -> Iterator[None]:
    """Rank 0 is looked up there, even if it is given."""
    before = os.environ.get("RANK")
    os.environ["RANK"] = str(rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RANK"]
        else:
            os.environ["RANK"] = before
