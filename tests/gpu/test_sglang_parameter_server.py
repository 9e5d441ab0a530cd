"""checkpoint-engine and SGLang themselves on one GPU. Skipped without CUDA, sglang and checkpoint_engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout" / "engines"))

from engine_scenarios import collect, prompt, request
from test_sglang import folder, run_long, start_server  # noqa: F401  the model's folder is a fixture

from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_checkpoint_engine import connect
from megatron_rl.weights.handles import alone
from megatron_rl.weights.transport import send

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or any(importlib.util.find_spec(name) is None for name in ("sglang", "checkpoint_engine")),
    reason="needs a CUDA device, sglang and checkpoint_engine",
)


@pytest.fixture
def transport():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield connect(0, 1, "127.0.0.1", alone, 60)
    assert dist.is_initialized(), "the trainer's group is the trainer's to end"
    dist.destroy_process_group()


def tensors(folder, factor):  # noqa: F811
    return [[(name, (tensor * factor).to("cuda:0", torch.bfloat16))] for name, tensor in read_folder(folder)]


def test_weights_reach_a_server_that_shares_the_gpu_and_without_one_no_memory_is_kept(folder, tmp_path, transport):  # noqa: F811
    config, server = start_server(folder, tmp_path, [])
    model = ModelConfig.from_folder(folder)

    async def publish(engine, version, factor):
        await engine.load_weights(tensors(folder, factor), version)
        found = await collect(engine, [request(0, prompt(0, 20), 30, weight_version=version)])
        return found[0].token_ids.tolist()

    async def scenario():
        options = {"name": "sglang-0", "silence_s": 60, "transport": transport}
        engine = await SGLangEngine.connect(server.url, model, config.rollout.sglang, **options)
        first = await publish(engine, 0, 1.0)  # held against what the server read itself
        assert await publish(engine, 1, 1.2) != first and await publish(engine, 2, 1.0) == first
        before = torch.cuda.memory_allocated()
        transport._receivers, transport._read = [], [1]  # as if one on another GPU were all: the rank answers itself
        await send(tensors(folder, 1.1), transport, bucket_bytes=1 << 20)
        await transport.complete()
        assert torch.cuda.memory_allocated() <= before, "a handle that nobody opened kept its buffer"
        assert await publish(engine, 3, 1.0) == first
        await engine.close()

    try:
        run_long(scenario())
    finally:
        run_long(server.stop())
