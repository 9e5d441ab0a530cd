"""Tokens per second of the embedded engine against `transformers.generate`, both sampling in float32 on two threads.

64 requests at once in groups of 8 that share a prompt of 75 tokens; response lengths are forced (end of text is ignored on
both sides): log-normal, median 48, sigma 1, at most 512, seed 0. The peer runs all 64 in one batch, and sorted by length
in batches of 16; its better time counts. Its log-probs are not asked for, ours are computed. Repeats alternate.

    python benchmarks/embedded_engine.py [--model FOLDER] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from result_file import Row, write_result
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_rl.config import EmbeddedConfig
from megatron_rl.rollout.engines.base import Request, Sampling
from megatron_rl.rollout.engines.embedded import EmbeddedEngine

NUM_REQUESTS, GROUP_SIZE, PROMPT_TOKENS, THREADS = 64, 8, 75, 2


def lengths() -> np.ndarray:
    """int [requests]: forced response lengths"""
    drawn = np.random.default_rng(0).lognormal(np.log(48), 1.0, NUM_REQUESTS)
    return np.clip(np.round(drawn), 1, 512).astype(int)


def prompts(vocab_size: int) -> np.ndarray:
    """int [requests, PROMPT_TOKENS]: equal within a group"""
    drawn = np.random.default_rng(1).integers(3, vocab_size, (NUM_REQUESTS // GROUP_SIZE, PROMPT_TOKENS))
    return np.repeat(drawn, GROUP_SIZE, axis=0)


async def run_ours(engine: EmbeddedEngine, contexts: np.ndarray, seed: int) -> float:
    """Seconds until every request has its tokens."""
    requests = [
        Request(seed * NUM_REQUESTS + i, context.astype(np.int32), int(n), Sampling(seed=seed), 0, f"{seed} {i // GROUP_SIZE}")
        for i, (context, n) in enumerate(zip(contexts, lengths(), strict=True))
    ]
    start = time.perf_counter()
    num_tokens = 0
    async for chunk in engine.generate(requests):
        num_tokens += len(chunk.token_ids)
    seconds = time.perf_counter() - start
    assert num_tokens == lengths().sum(), "every request gets its forced length"
    return seconds


def run_peer(model: LlamaForCausalLM, contexts: np.ndarray, batch_size: int) -> float:
    """Seconds of all batches, sorted by length. A batch runs as long as its longest member."""
    order = np.argsort(lengths(), kind="stable")
    start = time.perf_counter()
    for first in range(0, NUM_REQUESTS, batch_size):
        members = order[first : first + batch_size]
        batch = torch.from_numpy(contexts[members])
        longest = int(lengths()[members].max())
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
        out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=longest, **options)
        assert out.shape[1] == PROMPT_TOKENS + longest
    return time.perf_counter() - start


def random_model(folder: Path) -> Path:
    """SmolLM2-135M's shape with random weights: the speed does not depend on their values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure(folder: Path, repeats: int) -> tuple[list[float], dict[int, list[float]]]:
    """Seconds of our repeats, and of the peer's by batch size. The first round of each side is not counted."""
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    engine = EmbeddedEngine.from_folder(folder, config=EmbeddedConfig(max_running=NUM_REQUESTS), **options)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    contexts = prompts(peer.config.vocab_size)
    ours: list[float] = []
    theirs: dict[int, list[float]] = {16: [], NUM_REQUESTS: []}

    async def rounds() -> None:
        for seed in range(repeats + 1):
            ours.append(await run_ours(engine, contexts, seed))
            for batch_size, seconds in theirs.items():
                seconds.append(run_peer(peer, contexts, batch_size))
        await engine.close()

    asyncio.run(rounds())
    return ours[1:], {batch_size: seconds[1:] for batch_size, seconds in theirs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default random weights of SmolLM2-135M's shape")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or random_model(Path(scratch))
        ours, theirs = measure(folder, arguments.repeats)
    num_tokens = int(lengths().sum())
    best = min(theirs, key=lambda batch_size: statistics.median(theirs[batch_size]))
    our_speed = num_tokens / statistics.median(ours)
    peer_speed = num_tokens / statistics.median(theirs[best])
    row = Row(
        case=f"{NUM_REQUESTS} requests, groups of {GROUP_SIZE}, {num_tokens} tokens, float32, "
        + (f"model {folder.name}" if arguments.model else "random weights of SmolLM2-135M's shape"),
        unit="tokens/s",
        ours=round(our_speed, 1),
        peer=round(peer_speed, 1),
        peer_name=f"transformers.generate, batches of {best} sorted by length",
        limit=None,
        ratio_to_peer=round(our_speed / peer_speed, 2),
        ratio_to_limit=None,
        spread={
            "ours": (round(num_tokens / max(ours), 1), round(num_tokens / min(ours), 1)),
            "peer": (round(num_tokens / max(theirs[best]), 1), round(num_tokens / min(theirs[best]), 1)),
        },
    )
    path = write_result("embedded_engine", [row], ceilings={}, packages=["torch", "transformers", "numpy"])
    print(f"ours {row.ours} tokens/s, peer {row.peer} ({row.peer_name}), ratio {row.ratio_to_peer}; {path}")


if __name__ == "__main__":
    main()
