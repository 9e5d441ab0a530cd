"""The SGLang servers of a run: rank 0 starts or finds them, and is the only one that speaks to them.

Every rank takes part in a publish, since gathering the weights is collective; only rank 0 delivers the buckets, to all servers
at once. With `rollout.sglang.memory_saver` servers and trainer take turns on the GPU (paper 2.6.3), in this order:

    release kv_cache and weights -> train -> resume weights -> deliver -> resume kv_cache

so that weights of both sides and the KV cache are never there together with gradients. A server's life: `rollout/engines/`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.rollout.engines.sglang import Serialize, SGLangEngine, load_weights
from megatron_rl.rollout.engines.sglang_compat import cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_server import ServerProcess, sglang_program
from megatron_rl.rollout.engines.sglang_supervisor import SupervisedEngine
from megatron_rl.training.parallel import Launch


class SGLangServing:
    """See `serving.Serving`."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        launch: Launch,
        runner: asyncio.Runner,
        *,
        export: Callable[[], Iterable[Sequence[tuple[str, torch.Tensor]]]] | None,
        program: Sequence[str] | None = None,
        serialize: Callable[[], Serialize] = cuda_ipc_serializer,
    ) -> None:
        """export: the weights at any time, for a server that has to be started again; None where other ranks would have to
        take part. program, serialize: what starts a server, and what its payloads are made by."""
        self._config, self._model, self._runner = config, model, runner
        self._serialize = serialize
        self._phase_seconds = {"release": 0.0, "resume": 0.0}
        self._supervised: list[SupervisedEngine] = []
        self._given: list[SGLangEngine] = []
        settings = config.rollout.sglang
        if launch.rank == 0 and settings.urls:
            for i, url in enumerate(settings.urls):
                self._given.append(runner.run(self._connect(url, name=f"sglang-{i}")))
        elif launch.rank == 0:
            for i in range(settings.engines):
                name = f"sglang-{i}"
                server = ServerProcess(config, name=name, index=i, program=program or sglang_program())
                connect = partial(self._connect, name=name)
                self._supervised.append(SupervisedEngine(server, connect, max_restarts=settings.max_restarts, export=export))
            try:
                runner.run(_all(engine.start() for engine in self._supervised))
            except BaseException:
                self.close()
                raise
        self.engines: list[Engine] = [*self._supervised, *self._given]

    def release(self) -> None:
        if self._config.rollout.sglang.memory_saver:
            start = time.perf_counter()
            self._runner.run(_all(e.health() for e in self._supervised))  # one that died since its last request is mended
            self._runner.run(_all(e.release_memory(("kv_cache", "weights")) for e in self._plain))
            self._phase_seconds["release"] = time.perf_counter() - start

    def load_weights(self, buckets: Iterator[list[tuple[str, torch.Tensor]]], version: int) -> None:
        if not self.engines:
            for _ in buckets:
                pass
            return
        seconds = -time.perf_counter()
        self._runner.run(_all(e.resume_memory(("weights",)) for e in self._plain))
        seconds += time.perf_counter()
        self._runner.run(load_weights(self._plain, buckets, version))
        for engine in self._supervised:
            engine.loaded(version)
        seconds -= time.perf_counter()
        self._runner.run(_all(e.resume_memory(("kv_cache",)) for e in self._plain))
        self._phase_seconds["resume"] = seconds + time.perf_counter()

    def adopt_folder(self) -> None:
        """Call the model folder's weights, with which servers start, version 0, without loading anything."""
        self._runner.run(_all(engine.adopt(0) for engine in self._plain))
        for engine in self._supervised:
            engine.loaded(0)

    @property
    def phase_seconds(self) -> dict[str, float]:
        """What the last turns on the GPU took: `release`, and `resume` without the weights' delivery [s]."""
        return dict(self._phase_seconds)

    def leave_kv(self, *, for_next_start: bool) -> None:
        """Nothing: a server's KV is not kept, see `capabilities`."""

    def close(self) -> None:
        self._runner.run(_all([*(e.close() for e in self._supervised), *(e.close() for e in self._given)]))

    @property
    def _plain(self) -> list[SGLangEngine]:
        """Of now: a server started again has another."""
        return [*(supervised.engine for supervised in self._supervised), *self._given]

    async def _connect(self, url: str, *, name: str) -> SGLangEngine:
        silence_s = self._config.rollout.request_timeout_s
        return await SGLangEngine.connect(
            url, self._model, self._config.rollout.sglang, name=name, silence_s=silence_s, serialize=self._serialize
        )


async def _all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them, side by side; the first error once all have ended."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
