"""A trainer on one GPU and SGLang on another: weights by NCCL broadcast. Skipped without two CUDA devices and sglang."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout" / "engines"))

from engine_scenarios import collect, prompt, request
from test_sglang import ARGUMENTS, folder, run_long  # noqa: F401  the model's folder is a fixture

from megatron_rl import config as configuration
from megatron_rl import loop
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import NCCLGroup
from megatron_rl.rollout.engines.sglang_server import ServerProcess, sglang_program
from megatron_rl.rollout.engines.sglang_transport import Broadcast
from tests.resume.recipe import write_recipe

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or importlib.util.find_spec("sglang") is None, reason="needs two CUDA devices and sglang"
)
SETTINGS = ["rollout.engine=sglang", "rollout.sglang.colocated=false", "rollout.sglang.attention_backend=triton", ARGUMENTS]
SETTINGS += ["rollout.sglang.mem_fraction=0.6", "rollout.sglang.deterministic=true", "model.dtype=bfloat16"]
SETTINGS += ["rollout.sglang.ready_timeout_s=90"]


def test_a_run_trains_on_one_gpu_what_the_other_generates(folder, tmp_path):  # noqa: F811
    """In this process, which has the imports behind it."""
    settings = [f"run.folder={tmp_path / 'run'}", f"model.folder={folder}", *SETTINGS, "rollout.sglang.max_restarts=0"]
    assert loop.train(configuration.load(write_recipe(tmp_path, iterations=3), settings)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert trained and all(row["mismatch/logp_abs_mean"] < 0.05 for row in trained)
    assert all("time/onload_s" not in row for row in trained), "nobody makes room for the other"


@pytest.fixture
def one_rank():
    """What a trainer has before any group of ours."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_reach_the_other_gpu_and_a_server_started_again_joins_a_new_group(folder, tmp_path, one_rank):  # noqa: F811
    recipe = write_recipe(tmp_path, iterations=1)
    config = configuration.load(recipe, [f"run.folder={tmp_path / 'run'}", f"model.folder={folder}", *SETTINGS])
    server = ServerProcess(config, name="sglang-0", index=0, program=sglang_program(), first_gpu=1)
    model, transport = ModelConfig.from_folder(folder), Broadcast(NCCLGroup, 60)

    async def started():
        url = await server.start()
        return await SGLangEngine.connect(url, model, config.rollout.sglang, name="sglang-0", silence_s=60, transport=transport)

    async def publish(engine, version, factor):
        tensors = [(name, (tensor * factor).to("cuda:0", torch.bfloat16)) for name, tensor in read_folder(folder)]
        await engine.load_weights([tensors[:3], tensors[3:]], version)
        found = await collect(engine, [request(0, prompt(0, 20), 30, weight_version=version)])
        return found[0].token_ids.tolist()

    async def scenario():
        try:
            engine = await started()
            first = await publish(engine, 0, 1.0)  # held against what the server read itself
            assert await publish(engine, 1, 1.2) != first
            await server.stop()
            await engine.close()
            again = await started()
            assert await publish(again, 2, 1.0) == first
            await transport.close()
            await again.close()
        finally:
            await server.stop()

    run_long(scenario())
