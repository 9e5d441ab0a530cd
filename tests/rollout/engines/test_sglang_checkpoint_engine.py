"""Weights by checkpoint-engine: a stand-in for its parameter servers, threads for the trainer's ranks, fakes that read."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import fake_parameter_server
import pytest
import torch
from engine_scenarios import collect, prompt, request, run
from sglang_scenarios import fake_server

from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.rollout.engines import sglang_checkpoint_engine
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import load_weights
from megatron_rl.rollout.engines.sglang_checkpoint_engine import connect
from megatron_rl.weights.handles import alone

BUCKET = 1 << 13  # small enough that a publish takes several


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-tied")


class Ranks:
    """Threads that stand for the trainer's ranks."""

    def __init__(self, count: int) -> None:
        self._values: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=20)

    def gather_all(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def transports(self) -> list[Any]:
        made: list[Any] = [None] * len(self._values)

        def make(rank: int) -> None:
            made[rank] = fake_parameter_server.connect(rank, len(made), "", partial(self.gather_all, rank), 20.0)

        threads = [threading.Thread(target=make, args=(rank,)) for rank in range(len(made))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return made


def scaled(folder, factor):
    return [[(name, tensor * factor)] for name, tensor in read_folder(folder)]


def holds(fake, folder, factor):
    return all(torch.equal(fake.weights[name], tensor * factor) for name, tensor in read_folder(folder))


async def publish(transports, engines, buckets, version):
    """On all ranks; the errors by name that rank 0 sees."""
    others = [
        asyncio.to_thread(lambda t=t: asyncio.run(load_weights([], buckets, version, t, bucket_bytes=BUCKET)))
        for t in transports[1:]
    ]
    tasks = [asyncio.create_task(other) for other in others]
    # rank 0 waits for the others in its own thread, where the fakes live: they are served by another
    failed = await load_weights(engines, buckets, version, transports[0], bucket_bytes=BUCKET)
    await asyncio.gather(*tasks)
    return failed


def test_each_rank_sends_a_share_and_a_gpu_whose_server_takes_no_part_is_stood_in_for(folder):
    async def scenario():
        transports = Ranks(2).transports()
        async with AsyncExitStack() as stack:
            servers = []
            for gpu in range(2):
                served = fake_server(
                    folder,
                    before=lambda fake, gpu=gpu: setattr(fake, "gpus", [gpu]),
                    transport=transports[0],
                    name=f"sglang-{gpu}",
                )
                servers.append(await stack.enter_async_context(served))
            engines = [served.engine for served in servers]
            assert await publish(transports, engines, scaled(folder, 1.0), 0) == {}
            assert all(holds(served.fake, folder, 1.0) for served in servers)
            held = [transport._server.held for transport in transports]
            assert not held[0].keys() & held[1].keys() and held[0].keys() | held[1].keys() == dict(read_folder(folder)).keys()
            sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held]
            assert max(sizes) - min(sizes) <= max(tensor.nbytes for _, tensor in read_folder(folder))
            assert await publish(transports, engines[1:], scaled(folder, 1.1), 1) == {}  # as after a death
            assert holds(servers[0].fake, folder, 1.0) and holds(servers[1].fake, folder, 1.1)
            assert await publish(transports, engines, scaled(folder, 1.2), 2) == {}
            assert all(holds(served.fake, folder, 1.2) and served.engine.weight_version == 2 for served in servers)
            await collect(engines[1], [request(0, prompt(0, 6), 4, weight_version=2)])

    run(scenario())


def test_a_server_that_cannot_load_is_reported_and_what_comes_next_reaches_it(folder):
    async def scenario():
        transport = Ranks(1).transports()[0]
        async with fake_server(folder, transport=transport, name="sglang-0", verify_weights=False) as served:
            name, tensor = sorted(read_folder(folder))[0]
            others = [(n, t.clone()) for n, t in read_folder(folder) if n != name]
            flat = [[(name, tensor.view(-1))], *[[other] for other in others]]
            failed = await publish([transport], [served.engine], flat, 1)
            assert f"{name}: loaded [{tensor.numel()}], the parameter has" in str(failed["sglang-0"])
            assert served.engine.weight_version == -1
            assert await publish([transport], [served.engine], scaled(folder, 1.3), 1) == {} and holds(served.fake, folder, 1.3)

    run(scenario())


def test_a_server_that_dies_in_an_update_is_one_error_that_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr(sglang_checkpoint_engine, "_REASON_S", 0.1)

    async def scenario():
        transport = Ranks(1).transports()[0]
        before = lambda fake: setattr(fake, "dies_in_update", 1)  # noqa: E731
        async with fake_server(folder, before=before, transport=transport, name="sglang-0", verify_weights=False) as served:
            with pytest.raises(EngineError, match=r"did not end on all ranks \(.*sglang-0.*resume the run.*=false puts up with"):
                await publish([transport], [served.engine], scaled(folder, 1.0), 1)

    run(scenario())


def test_a_server_on_a_gpu_without_a_rank_fails_alone(folder):
    async def scenario():
        transport = Ranks(1).transports()[0]
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(
                    fake_server(folder, before=lambda f, g=gpus: setattr(f, "gpus", g), transport=transport, name=f"sglang-{i}")
                )
                for i, gpus in enumerate(([0], [1], [0]))
            ]
            failed = await publish([transport], [served.engine for served in servers], scaled(folder, 1.0), 0)
            assert sorted(failed) == ["sglang-1", "sglang-2"]
            assert "needs a trainer's rank and no other server, which GPU 1 is without" in str(failed["sglang-1"])
            assert holds(servers[0].fake, folder, 1.0) and servers[0].engine.weight_version == 0

    run(scenario())


def test_without_the_package_there_is_one_error_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "checkpoint_engine.ps", None)
    with pytest.raises(ConfigError, match=r"checkpoint_engine=true: .* pip install checkpoint-engine==0\.4\.2"):
        connect(0, 1, "127.0.0.1", alone, 1.0)
