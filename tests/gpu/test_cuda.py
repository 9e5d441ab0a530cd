"""The same engine, trainer and loop on a GPU. Skipped without CUDA; run with `python -m pytest tests/gpu`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.quickstart.make_model import make_model
from megatron_rl.config import EmbeddedConfig
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.engines.base import Chunk, Request, Sampling
from megatron_rl.rollout.engines.embedded.engine import EmbeddedEngine
from tests.resume.recipe import write_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def answers(folder: Path, device: str) -> dict[int, tuple[list[int], np.ndarray]]:
    """Tokens and log-probs of eight sampled responses to two prompts."""
    engine = EmbeddedEngine.from_folder(
        folder, config=EmbeddedConfig(kv_bytes=1 << 24), dtype=torch.float32, device=torch.device(device), name=device
    )
    prompts = [np.arange(10, 30, dtype=np.int32), np.arange(40, 75, dtype=np.int32)]
    requests = [Request(i, prompts[i % 2], 24, Sampling(seed=1), 0, f"p{i % 2}") for i in range(8)]

    async def generate() -> list[Chunk]:
        chunks = [chunk async for chunk in engine.generate(requests)]
        await engine.close()
        return chunks

    found: dict[int, tuple[list[int], np.ndarray]] = {i: ([], np.zeros(0, np.float32)) for i in range(8)}
    for chunk in asyncio.run(generate()):
        tokens, log_probs = found[chunk.trajectory_id]
        found[chunk.trajectory_id] = (tokens + chunk.token_ids.tolist(), np.concatenate([log_probs, chunk.log_probs]))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_cuda_engine_samples_what_the_cpu_engine_samples(family: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", family=family, hidden=64, layers=2, seed=3)
    torch.backends.cuda.matmul.allow_tf32 = False
    cpu, cuda = answers(tmp_path / "model", "cpu"), answers(tmp_path / "model", "cuda")
    for i in cpu:
        assert cpu[i][0] == cuda[i][0], i
        np.testing.assert_allclose(cpu[i][1], cuda[i][1], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_loop_trains_on_a_gpu_and_engine_agrees_with_trainer(dtype: str, tmp_path: Path) -> None:
    config = write_recipe(tmp_path, iterations=4)
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "megatron_rl", "train", str(config), f"run.folder={folder}", f"model.dtype={dtype}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert len(trained) >= 3
    bound = 1e-4 if dtype == "float32" else 0.1
    assert all(row["mismatch/logp_abs_mean"] < bound for row in trained)
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    buffer.check()
    buffer.close()
