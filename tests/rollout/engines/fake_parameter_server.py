"""The parameter server of checkpoint-engine 0.4.2 as its callers and readers see it, on a CPU.

What is like the original, because it bites: it needs a reader on every rank's GPU and waits for it without end, dead or alive; a
reader's failure ends the update on all ranks, but with the last bucket nobody looks at it; one checkpoint at a time has the
shared pool, whose sizes are those of the first; the function that asks servers to read is called in a thread, on every rank.
Its sockets are `multiprocessing`'s in place of ZMQ's, and tensors travel through them in place of a handle.
"""

from __future__ import annotations

import io
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch

from megatron_rl.rollout.engines.sglang_checkpoint_engine import Ask, CheckpointEngine
from megatron_rl.weights.handles import GatherAll

Tensors = dict[str, torch.Tensor]


def uuid(gpu: int) -> str:
    return f"GPU-fake-{gpu}"


def connect(rank: int, num_ranks: int, host: str, gather_all: GatherAll, timeout_s: float) -> CheckpointEngine:
    """As `sglang_checkpoint_engine.connect`."""
    name = gather_all(secrets.token_hex(4))[0]
    server = FakeParameterServer(name, rank, num_ranks, gather_all)
    return CheckpointEngine(server, stand_in, gather_all, rank=rank, timeout_s=timeout_s)


class FakeParameterServer:
    def __init__(self, name: str, rank: int, num_ranks: int, gather_all: GatherAll) -> None:
        self._name, self._rank, self._num_ranks, self._gather_all = name, rank, num_ranks, gather_all
        self.held: Tensors = {}
        self._user: str | None = None
        self._pool_bytes: list[int] = []
        self._owners: list[int] = []
        self._counter = 0

    def register_checkpoint(self, checkpoint_name: str, *, named_tensors: Tensors, use_shared_memory_pool: bool) -> None:
        assert use_shared_memory_pool and self._user is None, f"checkpoint {self._user} is already using shared memory pool"
        sizes = [named_tensors[name].nbytes for name in sorted(named_tensors)]
        assert self._pool_bytes in ([], sizes), "shared_pin_memory size should be equal"
        self._user, self._pool_bytes = checkpoint_name, sizes
        self.held = {name: tensor.clone() for name, tensor in named_tensors.items()}

    def unregister_checkpoint(self, checkpoint_name: str) -> None:
        assert self._user == checkpoint_name
        self._user = None

    def gather_metas(self, checkpoint_name: str) -> None:
        holds = self._gather_all(self._user == checkpoint_name)
        self._owners = [rank for rank, is_owner in enumerate(holds) if is_owner]

    def update(self, checkpoint_name: str, req_func: Ask) -> None:
        paths = [(uuid(rank), f"\0mrl-{self._name}-{rank}-{self._counter}") for rank in range(self._num_ranks)]
        self._counter += 1
        with Listener(paths[self._rank][1], "AF_UNIX") as listener:
            self._gather_all(None)  # everyone listens: ZMQ's sockets may be connected to before
            asking = threading.Thread(target=req_func, args=(paths,), daemon=True)
            asking.start()
            with listener.accept() as reader:
                try:
                    self._send(reader)
                except EOFError:
                    threading.Event().wait()
                finally:
                    asking.join()

    def _send(self, reader: Connection) -> None:
        reader.send(b"handle")
        for owner in self._owners:
            for half in range(2):
                bucket = self._gather_all(_dumped(self.held, half) if owner == self._rank else None)[owner]
                if any(self._gather_all(reader.recv())):
                    reader.send(RuntimeError("Some workers failed to update weights"))
                    raise RuntimeError("Failed to update weights due to remote errors")
                reader.send(bucket)
        for _ in range(2):
            reader.recv()
            reader.send(None)
        reader.recv()


def read(paths: Sequence[str], take: Callable[[Tensors], str]) -> None:
    """All ranks of one server. take: what is wrong with tensors, if anything. Raises RuntimeError if the update broke off."""
    with ExitStack() as stack:
        senders: list[Any] = [stack.enter_context(Client(path, "AF_UNIX")) for path in paths]
        problem = ""
        ends = 0
        first = [sender.recv() for sender in senders]
        assert set(first) == {b"handle"}
        while ends < 2:
            for sender in senders:
                sender.send(problem)
            told = [sender.recv() for sender in senders]
            if isinstance(told[0], RuntimeError):
                raise RuntimeError(problem or str(told[0]))
            assert told.count(told[0]) == len(told), "ranks of one server read other tensors"
            ends += told[0] is None
            problem = take(torch.load(io.BytesIO(told[0]), weights_only=True)) if told[0] is not None else ""
        for sender in senders:
            sender.send("")


def stand_in(path: str) -> None:
    with Client(path, "AF_UNIX") as sender:
        sender.recv()
        ends = 0
        while ends < 2:
            sender.send("")
            told = sender.recv()
            if isinstance(told, RuntimeError):
                return
            ends += told is None
        sender.send("")


def _dumped(tensors: Tensors, half: int) -> bytes:
    file = io.BytesIO()
    torch.save(dict(sorted(tensors.items())[half::2]), file)
    return file.getvalue()
