"""Which ranks generate with an embedded engine, and how rank 0 reaches them. SGLang's counterpart: `serving_sglang.py`.

Each serving rank holds one full copy of the model in its own process. Rank 0 calls its own engine directly and the
others over a socket (`rollout/engines/remote.py`), which a thread of the other rank serves while its main thread waits
for orders. Weights never travel over that socket: publishing is collective and every serving rank copies the same buckets.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.config import Config
from megatron_rl.errors import EngineError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_rl.rollout.engines.remote import RemoteEngine, serve
from megatron_rl.rollout.kv_store import KeepKV
from megatron_rl.training import cpu
from megatron_rl.training.model import compute_dtype
from megatron_rl.training.parallel import Launch

T = TypeVar("T")


class Serving(Protocol):
    """The engines of a run, on every rank."""

    engines: list[Engine]  # all of them, on rank 0 only

    @property
    def phase_seconds(self) -> dict[str, float]:
        """What taking turns on the GPU cost last time: `release` and `resume` of the engines' memory, `onload` and `offload` of
        the trainer's [s]. Empty where no turns are taken."""
        ...

    @property
    def phase_memory(self) -> dict[str, int]:
        """Metrics: the GPU's memory after each of these [bytes]. Empty without a GPU that is shared."""
        ...

    def release(self) -> None:
        """Lend the engines' memory to the training phase (paper 2.6.3); `load_weights` takes it back."""
        ...

    def load_weights(self, export: Callable[[], Iterator[list[tuple[str, torch.Tensor]]]], version: int) -> None:
        """Collective through the buckets that `export` gives, so iterated in this thread: a rank without an engine drains them.
        Taken again where an engine has to be started again meanwhile. On rank 0 it returns when every engine has reached
        `version`."""
        ...

    def mend(self, export: Callable[[], Iterator[list[tuple[str, torch.Tensor]]]], version: int) -> None:
        """Bring back the engines that are gone and give them `version`. Collective, as `load_weights` is; no request runs."""
        ...

    def readable_weights(self) -> AbstractContextManager[None]:
        """Inside, between phases, the trainer's weights can be saved or exported, wherever they wait. Collective."""
        ...

    def leave_kv(self, *, for_next_start: bool) -> None:
        """Before the process ends: kept KV into files, or away with it where the run is over."""
        ...

    def close(self) -> None: ...


class EmbeddedServing:
    """See `Serving`. `local` is this rank's engine, if it serves. Collective to build and to load."""

    def __init__(self, config: Config, model: ModelConfig, launch: Launch, runner: asyncio.Runner, *, identity: str) -> None:
        """identity: run and lineage, on rank 0; what KV that outlives a process is bound to."""
        self._runner = runner
        self.local: EmbeddedEngine | None = None
        self._server: _ServerThread | None = None
        hosts = _gathered(socket.gethostname())
        identity = _gathered(identity)[0]
        if launch.rank in serving_ranks(config, _gathered(_is_replica_head())):
            self.local = embedded_engine(config, model, name=f"embedded-{launch.rank}", identity=identity)
            if launch.rank != 0:
                self._server = _ServerThread(self.local, "127.0.0.1" if len(set(hosts)) == 1 else hosts[launch.rank])
        addresses = _gathered(self._server.address if self._server else None)
        self._remote: list[RemoteEngine] = []
        if launch.rank == 0:
            silence_s = config.rollout.request_timeout_s
            found = [address for address in addresses if address is not None]
            self._remote = [runner.run(RemoteEngine.connect(*address, silence_s=silence_s)) for address in found]
        self.engines: list[Engine] = [*([self.local] if self.local else []), *self._remote]

    @property
    def phase_seconds(self) -> dict[str, float]:
        return {}  # its memory comes and goes within one process, in no time

    @property
    def phase_memory(self) -> dict[str, int]:
        return {}

    def readable_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        """KV that the policy keeps is on the host by now."""
        if self.local:
            self._runner.run(self.local.release_memory(("weights", "kv_cache")))

    def load_weights(self, export: Callable[[], Iterator[list[tuple[str, torch.Tensor]]]], version: int) -> None:
        if self.local:
            self._runner.run(self.local.load_weights(export(), version))
            self._runner.run(self.local.resume_memory(("weights", "kv_cache")))
        else:
            for _ in export():
                pass
        for engine in self._remote:
            self._runner.run(engine.load_weights((), version))

    def mend(self, export: Callable[[], Iterator[list[tuple[str, torch.Tensor]]]], version: int) -> None:
        """Nothing: an engine lives as long as its rank."""

    def leave_kv(self, *, for_next_start: bool) -> None:
        if self.local:
            self._runner.run(self.local.spill_kv() if for_next_start else self.local.forget_kv())

    def close(self) -> None:
        for engine in self._remote:
            self._runner.run(engine.close())
        if self._server:
            self._server.close()
        if self.local:
            self._runner.run(self.local.close())


def serving_ranks(config: Config, is_replica_head: Sequence[bool]) -> list[int]:
    """`rollout.embedded.ranks` ranks, by default one for each data-parallel replica: its first rank. More are taken in order."""
    heads = [rank for rank, head in enumerate(is_replica_head) if head]
    others = [rank for rank, head in enumerate(is_replica_head) if not head]
    return (heads + others)[: config.rollout.embedded.ranks or len(heads)]


def embedded_engine(config: Config, model: ModelConfig, *, name: str, identity: str) -> EmbeddedEngine:
    """An engine on this rank's device, without weights yet."""
    rollout = config.rollout
    keep = KeepKV(rollout.max_kv_age, rollout.kv_store, config.kv_folder / name) if rollout.kv_policy == "keep" else None
    return EmbeddedEngine(
        model,
        config=rollout.embedded,
        dtype=compute_dtype(config),
        device=cpu.device(),
        name=name,
        keep=keep,
        identity=identity,
        silence_s=rollout.request_timeout_s,
    )


class _ServerThread:
    """Serves one engine from an event loop of its own until closed."""

    def __init__(self, engine: EmbeddedEngine, host: str) -> None:
        self._started: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(engine, host),), daemon=True)
        self._thread.start()
        self.address = (host, self._started.result())

    async def _serve(self, engine: EmbeddedEngine, host: str) -> None:
        try:
            server = await serve(engine, host=host, port=0)
        except EngineError as e:
            self._started.set_exception(e)  # raised where the rank waits for the address
            return
        self._started.set_result(server.port)
        await self._stop.wait()
        await server.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


def _is_replica_head() -> bool:
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
    )


def _gathered(value: T) -> list[T]:
    """Collective: every rank's value."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
