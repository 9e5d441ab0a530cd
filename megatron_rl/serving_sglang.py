"""The SGLang servers of a run: rank 0 starts or finds them, and is the only one that speaks to them.

Every rank takes part in a publish: gathering the weights is collective, and each rank of a server reads the memory of the
trainer's rank on its own GPU (`weights/handles.py`); only rank 0 delivers the buckets, to all servers at once. Colocated with a
memory saver, servers and trainer take turns on the GPU (paper 2.6.3), in this order:

    release kv_cache and weights -> onload the trainer -> train -> offload gradients and main weights
        -> resume weights -> deliver -> offload parameters -> resume kv_cache

so that weights of both sides and the KV cache are never there together with gradients. With servers given by URL the trainer
stays where it is, as it does with `rollout.sglang.colocated=false`: those we start then have the GPUs after the trainer's, and
weights are broadcast to them. With `rollout.sglang.checkpoint_engine` every rank delivers a share of the weights, by way of host
memory. A server of ours that dies anywhere in this order is put up with: training goes on without it, and where the order ends
it is started again, with the whole GPU free as at the start of the run, and published to in a second pass. While it generates, a
trainer of one rank brings it back at once; with several the rollout phase is interrupted for that (`mend`).
How the trainer's state moves: `training/phase_memory.py`. A server's life: `rollout/engines/`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines import sglang_checkpoint_engine
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.rollout.engines.sglang import SGLangEngine, load_weights
from megatron_rl.rollout.engines.sglang_compat import NCCLGroup, cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_kv import KeepOnServer
from megatron_rl.rollout.engines.sglang_server import ServerProcess, sglang_program
from megatron_rl.rollout.engines.sglang_supervisor import SupervisedEngine
from megatron_rl.rollout.engines.sglang_transport import IPC, Broadcast, Join, Transport
from megatron_rl.training.parallel import Launch, Messages
from megatron_rl.training.phase_memory import PARTS, PhaseMemory
from megatron_rl.weights.handles import GatherAll, Serialize, alone

Buckets = Iterable[Sequence[tuple[str, torch.Tensor]]]
TURNS = ("release", "onload", "offload", "resume")


class SGLangServing:
    """See `serving.Serving`."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        launch: Launch,
        runner: asyncio.Runner,
        *,
        export: Callable[[], Buckets] | None,
        memory: PhaseMemory | None,
        program: Sequence[str] | None = None,
        serialize: Callable[[], Serialize] = cuda_ipc_serializer,
        join: Join = NCCLGroup,
        parameters: Callable[..., Transport] = sglang_checkpoint_engine.connect,
    ) -> None:
        """export: the weights at any time, for a server that has to be started again; None where other ranks would have to
        take part. memory: the trainer's; None where it never goes away. program, serialize, join, parameters: what starts a
        server, and what its payloads, groups and parameter servers are made by, where it is not SGLang.

        Raises ConfigError where the machine has too few GPUs or lacks a package, EngineError for a server that cannot be had."""
        self._config, self._model, self._runner = config, model, runner
        self._export, self._memory = export, memory
        settings = config.rollout.sglang
        self._gather_all: GatherAll = alone
        if launch.world_size > 1:  # not over NCCL, whose waiting ranks keep their GPU busy while a server starts on it
            starts_s = (1 + settings.max_restarts) * settings.ready_timeout_s
            self._gather_all = Messages(config.training.collective_timeout_s + starts_s).gather_all
        limit_s = config.training.collective_timeout_s
        self._transport: Transport = Broadcast(join, limit_s)
        if settings.checkpoint_engine:
            self._transport = parameters(launch.rank, launch.world_size, launch.master_host, self._gather_all, limit_s)
        elif settings.colocated:
            self._transport = IPC(serialize, self._gather_all, rank=launch.rank)
        self.phase_seconds = dict.fromkeys(TURNS if memory else ("release", "resume"), 0.0)
        self.phase_memory: dict[str, int] = {}
        self._supervised: list[SupervisedEngine] = []
        self._given: list[SGLangEngine] = []
        self._num_exports = 0  # under way, of parameters that are here for them
        if memory:
            memory.offload(*PARTS)  # a server takes its share of what it finds free
            self._wait_for_all_ranks()
        if launch.rank == 0 and settings.urls:
            for i, url in enumerate(settings.urls):
                self._given.append(runner.run(self._connect(url, name=f"sglang-{i}")))
        elif launch.rank == 0:
            mended = self._exported if export else None
            first_gpu = _first_gpu(config, launch, torch.cuda.device_count())
            for i in range(settings.engines):
                name = f"sglang-{i}"
                server = ServerProcess(config, name=name, index=i, program=program or sglang_program(), first_gpu=first_gpu)
                connect = partial(self._connect, name=name, server=server)
                self._supervised.append(SupervisedEngine(server, connect, max_restarts=settings.max_restarts, export=mended))
            try:
                runner.run(_all(engine.start() for engine in self._supervised))
            except BaseException:
                self.close()
                raise
        self.engines: list[Engine] = [*self._supervised, *self._given]
        if memory:  # for the weights that the run begins with
            self._all_engines(lambda e: e.release_memory(("kv_cache",)))
            memory.onload("parameters", "main_weights")

    def release(self) -> None:
        if not self._config.rollout.sglang.takes_turns:
            return
        self.phase_seconds = dict.fromkeys(self.phase_seconds, 0.0)
        with self._turn("release", "released"):
            self._all_engines(lambda e: e.release_memory(("kv_cache", "weights")))
        if self._memory:
            with self._turn("onload", "onloaded"):
                self._memory.onload(*PARTS)

    def load_weights(self, export: Callable[[], Iterator[list[tuple[str, torch.Tensor]]]], version: int) -> None:
        if self._memory:
            with self._turn("offload", "trained"):
                self._memory.offload("gradients", "main_weights")
                self._wait_for_all_ranks()
        self._publish(export(), version)
        self.mend(export, version)

    def mend(self, export: Callable[[], Iterator[list[tuple[str, torch.Tensor]]]], version: int) -> None:
        while self._gather_all(any(engine.is_lost for engine in self._supervised))[0]:  # as rank 0 says
            self._start_again()
            self._publish(export(), version)

    def _publish(self, buckets: Iterator[list[tuple[str, torch.Tensor]]], version: int) -> None:
        """To the servers that lack `version`, from the trainer's parameters, which are off the GPU afterwards."""
        with self._turn("resume", "resumed"):
            self._all_engines(lambda e: e.resume_memory(("weights",)))
        if self._memory:
            self._memory.begin_copy("parameters")  # the link is idle meanwhile
        if self.engines or self._transport.reads_every_rank:
            self._runner.run(self._deliver(buckets, version))
        else:
            for _ in buckets:
                pass
        if self._memory:
            with self._turn("offload", "published"):
                self._memory.offload("parameters")
                self._wait_for_all_ranks()
        with self._turn("resume", "generating"):
            self._all_engines(lambda e: e.resume_memory(("kv_cache",)))

    async def _deliver(self, buckets: Iterator[list[tuple[str, torch.Tensor]]], version: int) -> None:
        lacking = [engine for engine in self._plain if engine.weight_version != version]
        bucket_bytes = self._config.rollout.sglang.bucket_bytes
        failed = await load_weights(lacking, buckets, version, self._transport, bucket_bytes=bucket_bytes)
        for engine in self._supervised:
            if engine.name in failed:
                await engine.lose(failed.pop(engine.name))
            engine.loaded(version)
        for error in failed.values():
            raise error

    def _start_again(self) -> None:
        """The servers that are gone, and the parameters back on the GPU for them."""
        with self._turn("resume", "restarted"):
            self._runner.run(_all(engine.revive() for engine in self._supervised))
            self._wait_for_all_ranks()
        if self._memory:
            self._all_engines(lambda e: e.release_memory(("kv_cache",)))
            self._memory.onload("parameters")

    def adopt_folder(self) -> None:
        """Call the model folder's weights, with which servers start, version 0, without loading anything."""
        self._runner.run(_all(engine.adopt(0) for engine in self._plain))
        for engine in self._supervised:
            engine.loaded(0)

    @contextmanager
    def readable_weights(self) -> Iterator[None]:
        """With the servers' KV cache out of the way, which is empty at such a time."""
        if self._memory is None or not self._memory.is_away("parameters"):
            yield
            return
        self._all_engines(lambda e: e.release_memory(("kv_cache",)))
        self._memory.onload("parameters", "main_weights")
        yield
        self._memory.offload("parameters", "main_weights", changed=False)
        self._wait_for_all_ranks()
        self._all_engines(lambda e: e.resume_memory(("kv_cache",)))

    def leave_kv(self, *, for_next_start: bool) -> None:
        """Nothing: what a server keeps ends with it."""

    def close(self) -> None:
        self._runner.run(self._transport.close())  # servers given by URL live on; one that is gone would be waited for later
        self._runner.run(_all([*(e.close() for e in self._supervised), *(e.close() for e in self._given)]))

    @property
    def _plain(self) -> list[SGLangEngine]:
        """Of now: a server started again has another."""
        return [*(supervised.engine for supervised in self._supervised), *self._given]

    @contextmanager
    def _exported(self) -> Iterator[Buckets]:
        """For a server started again, in a rollout phase or at its end. Its own KV cache is there, and the parameters have to
        fit beside it."""
        assert self._export is not None, "a supervised engine asks only where there is one"
        if self._memory is None or not (self._num_exports or self._memory.is_away("parameters")):
            yield self._export()
            return
        self._memory.onload("parameters")
        self._num_exports += 1  # several servers may have died
        try:
            yield self._export()
        finally:
            self._num_exports -= 1
            if not self._num_exports:
                self._memory.offload("parameters", changed=False)

    @contextmanager
    def _turn(self, name: str, state: str) -> Iterator[None]:
        """Counts its seconds, and notes the GPU's memory in the state it leads to."""
        start = time.perf_counter()
        yield
        self.phase_seconds[name] += time.perf_counter() - start
        if self._memory:
            found = self._memory.memory()
            self.phase_memory |= {f"memory/gpu_{kind}_{state}_bytes": value for kind, value in found.items()}

    def _all_engines(self, call: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
        """On rank 0, side by side; the other ranks wait until it is done."""
        if self._config.rollout.sglang.takes_turns:
            try:
                self._runner.run(_all(call(engine) for engine in self.engines))
            finally:
                if self._memory:
                    self._wait_for_all_ranks()

    def _wait_for_all_ranks(self) -> None:
        self._gather_all(None)

    async def _connect(self, url: str, *, name: str, server: ServerProcess | None = None) -> SGLangEngine:
        """server: the process that answers there, if it is ours."""
        rollout = self._config.rollout
        keep = KeepOnServer(server.plugin_folder, rollout.max_kv_age) if server and server.plugin_folder else None
        return await SGLangEngine.connect(
            url,
            self._model,
            rollout.sglang,
            name=name,
            silence_s=rollout.request_timeout_s,
            transport=self._transport,
            keep=keep,
        )


def _first_gpu(config: Config, launch: Launch, num_gpus: int) -> int:
    """Of the servers'. num_gpus: of this machine; 0 where they are not SGLang's.

    Raises ConfigError where they do not suffice."""
    s = config.rollout.sglang
    first = 0 if s.colocated else launch.local_world_size
    needed = first + s.engines * s.tensor_parallel
    if 0 < num_gpus < needed:
        beside = "" if s.colocated else f" beside {first} for the trainer's ranks (rollout.sglang.colocated=false)"
        raise ConfigError(
            f"rollout.sglang.engines={s.engines} of tensor_parallel={s.tensor_parallel}: need {needed - first} GPUs{beside}; "
            f"this machine shows {num_gpus}; lower one of them, or start fewer ranks"
        )
    return first


async def _all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them, side by side; the first error once all have ended."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
