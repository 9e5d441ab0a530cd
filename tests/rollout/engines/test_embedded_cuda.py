"""The embedded engine on a GPU against the same engine on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_scenarios import MODELS, collect, open_engine, prompt, request, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def generate(folder, device, dtype, requests):
    async def scenario():
        engine = open_engine(folder, device=torch.device(device), dtype=dtype, prefill_tokens=20)
        found = await collect(engine, requests)
        await engine.close()
        return found

    return run(scenario())


@pytest.mark.parametrize("name", MODELS)
def test_gpu_gives_the_tokens_and_log_probs_of_the_cpu(name, model_folder):
    requests = [request(i, prompt(i // 4, 17 + 5 * (i // 4)), 40, kv_key=str(i // 4), temperature=i % 2) for i in range(12)]
    cpu = generate(model_folder(name), "cpu", torch.float32, requests)
    gpu = generate(model_folder(name), "cuda", torch.float32, requests)
    same = [i for i in cpu if cpu[i].token_ids.tolist() == gpu[i].token_ids.tolist()]
    assert len(same) >= 11, "a near tie may part one of them"
    for i in same:
        np.testing.assert_allclose(gpu[i].log_probs, cpu[i].log_probs, atol=1e-4)


def test_bfloat16_on_the_gpu_stays_near_float32(model_folder):
    requests = [request(i, prompt(0, 30), 40, kv_key="g") for i in range(8)]
    gpu = generate(model_folder("qwen3-tied"), "cuda", torch.bfloat16, requests)
    cpu = generate(model_folder("qwen3-tied"), "cpu", torch.float32, requests)
    first = [abs(gpu[i].log_probs[0] - cpu[i].log_probs[0]) for i in cpu if gpu[i].token_ids[0] == cpu[i].token_ids[0]]
    assert len(first) >= 4 and max(first) < 0.3
