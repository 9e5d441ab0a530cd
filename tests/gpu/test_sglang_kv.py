"""KV over the training phase inside SGLang itself, with our plugin. Skipped without CUDA and sglang."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout" / "engines"))

from engine_scenarios import collect, prompt, request, run
from test_engine_protocol import (  # noqa: F401  collected here, with this file's fixtures
    test_kv_kept_over_a_training_phase_serves_its_own_trajectory_only_until_it_is_too_old,
)
from test_sglang import folder, run_long, start_server  # noqa: F401  the model's folder is a fixture

from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_kv import KeepOnServer
from megatron_rl.rollout.engines.sglang_transport import IPC

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("sglang") is None, reason="needs a CUDA device and sglang"
)
KEEP = ["rollout.kv_policy=keep", "rollout.kv_store.host_bytes=67108864", "rollout.sglang.verify_weights=false"]


class Engine(SGLangEngine):
    """Takes weights from the CPU in float32, as the shared test has them."""

    async def load_weights(self, buckets, version):
        on_gpu = [[(name, tensor.to("cuda", torch.bfloat16)) for name, tensor in bucket] for bucket in buckets]
        await super().load_weights(on_gpu, version)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):  # noqa: F811
    """One server with the plugin for all tests here; each connects anew."""
    config, process = start_server(folder, tmp_path_factory.mktemp("run"), KEEP)
    yield config, process
    run_long(process.stop())


@pytest.fixture
def opened(server):
    config, process = server

    @asynccontextmanager
    async def open_sglang(folder, *, kv_folder=None, max_age=1):  # noqa: F811
        engine = await Engine.connect(
            process.url,
            ModelConfig.from_folder(folder),
            config.rollout.sglang,
            name="sglang-0",
            silence_s=60,
            transport=IPC(cuda_ipc_serializer),
            keep=KeepOnServer(process.plugin_folder, max_age),
        )
        await engine.load_weights(weights(folder), 0)  # whatever an earlier test left
        yield engine, engine
        await engine.close()

    return open_sglang


@pytest.fixture
def opened_with_kept_kv(opened):
    return opened


def weights(folder, factor=1.0):  # noqa: F811
    tensors = [(name, tensor * factor) for name, tensor in read_folder(folder)]
    return [tensors[:3], tensors[3:]]


async def training_phase(engine, folder, version, trajectory_ids, factor=1.0):  # noqa: F811
    """Snapshots, and whether each is in place again after its pages were gone and weights came."""
    snapshots = await engine.snapshot_kv(trajectory_ids)
    await engine.release_memory(["kv_cache", "weights"])
    await engine.resume_memory(["weights"])
    await engine.load_weights(weights(folder, factor), version)
    await engine.resume_memory(["kv_cache"])
    return snapshots, await engine.restore_kv(snapshots)


def test_under_the_same_weights_kept_kv_goes_on_as_if_nothing_had_been(opened, folder):  # noqa: F811
    """Greedy; a group of four and one alone. The same split without a training phase has the same shapes."""

    async def halves(engine, first_version, between):
        contexts = {i: prompt(0, 40) if i < 4 else prompt(i, 90) for i in range(5)}
        versions = {"weight_version": first_version}
        first = await collect(
            engine, [request(i, c, 30, temperature=0.0, kv_key=key(i), **versions) for i, c in contexts.items()]
        )
        contexts = {i: [*c, *first[i].token_ids.tolist()] for i, c in contexts.items()}
        second_version = await between(contexts)
        versions = {"weight_version": second_version}
        second = await collect(
            engine, [request(i, c, 30, temperature=0.0, kv_key=key(i), **versions) for i, c in contexts.items()]
        )
        return contexts, second

    def key(trajectory_id):
        return "group" if trajectory_id < 4 else "alone"

    async def scenario():
        async with opened(folder) as (engine, _):

            async def nothing(contexts):
                return 0

            contexts, expected = await halves(engine, 0, nothing)
            await engine._flush()

            async def phase(contexts):
                snapshots, in_place = await training_phase(engine, folder, 1, sorted(contexts))
                assert in_place == [True] * 5
                assert [len(s.token_ids) for s in snapshots] == [len(contexts[s.trajectory_id]) - 1 for s in snapshots]
                return 1

            again, found = await halves(engine, 0, phase)
            assert again == contexts
            for i, chunk in found.items():
                assert chunk.cached_tokens == len(contexts[i]) - 1 and chunk.kv_versions.tolist() == [0] * 30
                assert chunk.token_ids.tolist() == expected[i].token_ids.tolist()
                np.testing.assert_allclose(chunk.log_probs, expected[i].log_probs, atol=2e-2)
            usage = await engine.kv_usage()
            assert usage.restore_failures == 0 and usage.snapshot_bytes > 0
            fresh = (await collect(engine, [request(9, contexts[0], 5, temperature=0.0, kv_key="group", weight_version=1)]))[9]
            assert (fresh.cached_tokens, fresh.kv_versions.tolist()) == (0, [1] * 5), "old KV serves nobody else"
            await engine.health()

    run(scenario())


def test_under_new_weights_kept_kv_is_really_used_and_a_second_phase_copies_only_what_is_new(opened, folder):  # noqa: F811
    async def scenario():
        async with opened(folder, max_age=2) as (engine, _):
            context = prompt(3, 100)
            first = (await collect(engine, [request(0, context, 20, temperature=0.0)]))[0]
            context += first.token_ids.tolist()
            _, in_place = await training_phase(engine, folder, 1, [0], factor=1.2)
            kept = (await collect(engine, [request(0, context, 8, temperature=0.0, weight_version=1)]))[0]
            fresh = (await collect(engine, [request(5, context, 8, temperature=0.0, weight_version=1)]))[5]
            assert in_place == [True] and kept.cached_tokens == 119 and fresh.cached_tokens == 0
            difference = abs(float(kept.log_probs[0] - fresh.log_probs[0]))
            assert difference > 0.02 or kept.token_ids[0] != fresh.token_ids[0], "other KV, other log-probs"
            before = (await engine.kv_usage()).snapshot_bytes
            context += kept.token_ids.tolist()
            _, in_place = await training_phase(engine, folder, 2, [0], factor=1.0)
            copied = (await engine.kv_usage()).snapshot_bytes - before
            third = (await collect(engine, [request(0, context, 8, temperature=0.0, weight_version=2)]))[0]
            assert in_place == [True] and third.cached_tokens == 127 and third.kv_versions.tolist() == [0] * 8
            assert copied * 119 == before * 8, "eight tokens more, of one size each"
            await engine.health()

    run(scenario())


def test_kept_kv_that_is_gone_when_it_is_asked_for_is_computed_again_and_the_server_lives_on(opened, folder):  # noqa: F811
    """After a flush that the engine has not heard of, which is what eviction of everything looks like."""

    async def scenario():
        async with opened(folder) as (engine, _):
            context = prompt(3, 100)
            first = (await collect(engine, [request(0, context, 20, temperature=0.0)]))[0]
            context += first.token_ids.tolist()
            await training_phase(engine, folder, 1, [0])
            await engine._client.post("/flush_cache", None)
            found = (await collect(engine, [request(0, context, 8, temperature=0.0, weight_version=1)]))[0]
            assert (found.cached_tokens, found.kv_versions.tolist()) == (0, [1] * 8)
            assert (await engine.kv_usage()).restore_failures == 1
            await asyncio.sleep(0.5)  # idle rounds: the server checks that no page is lost, and dies where one is
            await engine.health()

    run(scenario())
