"""The protocol's shared test body, and publishes, against SGLang itself. Skipped without CUDA and sglang."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout" / "engines"))

from engine_scenarios import collect, joined, prompt, request, run
from test_engine_protocol import (  # noqa: F401  collected here, with this file's fixtures
    test_a_consumer_that_leaves_takes_its_requests_with_it,
    test_abort_of_everything_ends_waiting_requests_too,
    test_requests_end_as_length_or_at_their_stop_token,
)

from examples.quickstart.make_model import make_model
from megatron_rl import config as configuration
from megatron_rl.errors import EngineError
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_server import ServerProcess, sglang_program
from megatron_rl.rollout.engines.sglang_transport import IPC
from megatron_rl.types import Ending
from tests.resume.recipe import write_recipe

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("sglang") is None, reason="needs a CUDA device and sglang"
)
ARGUMENTS = "rollout.sglang.server_arguments={grammar_backend: none, disable_cuda_graph: true, max_total_tokens: 20000}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sizes that GPU kernels take; 256 positions, as the shared tests expect."""
    path = tmp_path_factory.mktemp("model")
    options = {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512, "max_positions": 256}
    return make_model(path, family="llama", vocab_size=512, eos_token_id=None, **options)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """One server for all tests here; each connects anew."""
    config, process = start_server(folder, tmp_path_factory.mktemp("run"), [])
    yield config, process
    run_long(process.stop())


def start_server(folder, path, overrides):
    """(configuration, process); overrides: settings beside those of all tests here."""
    overrides = [
        *overrides,
        "rollout.engine=sglang",
        "rollout.sglang.attention_backend=triton",
        "rollout.sglang.mem_fraction=0.5",
        ARGUMENTS,
    ]
    overrides += ["rollout.sglang.deterministic=true", "rollout.sglang.stream_interval=4", "model.dtype=bfloat16"]
    config = configuration.load(
        write_recipe(path, iterations=1), [f"run.folder={path / 'run'}", f"model.folder={folder}", *overrides]
    )
    process = ServerProcess(config, name="sglang-0", index=0, program=sglang_program())
    run_long(process.start())
    return config, process


def run_long(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 400))


@pytest.fixture
def opened(server):
    config, process = server

    @asynccontextmanager
    async def open_sglang(folder, **options):
        model = ModelConfig.from_folder(folder)
        engine = await SGLangEngine.connect(
            process.url, model, config.rollout.sglang, name="sglang-0", silence_s=60, transport=IPC(cuda_ipc_serializer)
        )
        await engine.adopt(0)
        yield engine, engine
        await engine.close()

    return open_sglang


def test_requests_of_one_call_are_aborted_and_counted_each_for_itself(opened, folder):
    async def scenario():
        async with opened(folder) as (engine, _):
            parts = {i: [] for i in range(8)}
            async for chunk in engine.generate([request(i, prompt(i, 20 + i), 200 - 10 * i) for i in parts]):
                parts[chunk.trajectory_id].append(chunk)
                if chunk.trajectory_id == 3 and len(parts[3]) == 2:
                    await engine.abort([3])
            found = {i: joined(chunks) for i, chunks in parts.items()}
            assert found[3].ending is Ending.ABORT and 0 < len(found[3].token_ids) < 170
            assert all(f.ending is Ending.LENGTH and len(f.token_ids) == 200 - 10 * i for i, f in found.items() if i != 3)
            engine._context_tokens = 400  # more than the server has: it refuses one, and so all
            with pytest.raises(EngineError, match="trajectories 0, 1 .*refused: .*context length"):
                await collect(engine, [request(0, prompt(0, 20), 20), request(1, prompt(1, 300), 20)])
            assert len((await collect(engine, [request(0, prompt(0, 20), 20)]))[0].token_ids) == 20

    run(scenario())


def test_weights_arrive_by_ipc_between_release_and_resume_and_change_what_is_sampled(opened, folder):
    async def scenario():
        async with opened(folder) as (engine, _):
            before = (await collect(engine, [request(0, prompt(0, 20), 30)]))[0]
            for version, factor in ((1, 1.2), (2, 1.0)):
                await engine.release_memory(["kv_cache", "weights"])
                await engine.resume_memory(["weights"])
                tensors = [(name, (tensor * factor).to("cuda", torch.bfloat16)) for name, tensor in read_folder(folder)]
                await engine.load_weights([tensors[:3], tensors[3:]], version)
                await engine.resume_memory(["kv_cache"])
                after = (await collect(engine, [request(0, prompt(0, 20), 30, weight_version=version)]))[0]
                assert after.cached_tokens == 0
                assert (after.token_ids.tolist() == before.token_ids.tolist()) == (factor == 1.0)

    run(scenario())
