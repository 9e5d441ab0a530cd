"""Tokens per second of SGLang driven by us over HTTP, against `sglang.Engine.generate` called directly with the same requests.

256 requests of 64 random prompt tokens, forced to 512 tokens (temperature 1, log-probs on both sides). One server after the other
on the same GPU; each is warmed up with the whole batch once, then repeated. A claim of at least 0.95. Unattended:

    python benchmarks/sglang_driver.py --model FOLDER [--repeats 3] [--out DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from result_file import FOLDER, Row, write_result

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Engine, Request, Sampling
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_server import ServerProcess, sglang_program
from megatron_rl.rollout.engines.sglang_transport import IPC

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 256, 64, 512


def contexts(vocab_size: int, repeat: int) -> np.ndarray:
    """int32 [requests, PROMPT_TOKENS]: fresh ones for every repeat, so that no cache serves them."""
    return np.random.default_rng(repeat).integers(100, vocab_size, (NUM_REQUESTS, PROMPT_TOKENS)).astype(np.int32)


async def ours(engine: Engine, prompts: np.ndarray) -> float:
    """Tokens per second of one batch. A response that ended early counts with the tokens it has."""
    requests = [Request(i, ids, NEW_TOKENS, Sampling(), 0, str(i)) for i, ids in enumerate(prompts)]
    start, num_tokens = time.perf_counter(), 0
    async for chunk in engine.generate(requests):
        num_tokens += len(chunk.token_ids)
    return num_tokens / (time.perf_counter() - start)


async def all_ours(config: Config, repeats: int) -> list[float]:
    model = ModelConfig.from_folder(config.model.folder)
    server = ServerProcess(config, name="sglang-0", index=0, program=sglang_program())
    try:
        url = await server.start()
        connect = partial(SGLangEngine.connect, name="sglang-0", silence_s=120.0, transport=IPC(cuda_ipc_serializer))
        engine = await connect(url, model, config.rollout.sglang)
        await engine.adopt(0)
        speeds = [await ours(engine, contexts(model.vocab_size, i)) for i in range(repeats + 1)]
        await engine.close()
    finally:
        await server.stop()
    return speeds[1:]


def all_theirs(config: Config, repeats: int) -> list[float]:
    import sglang

    s = config.rollout.sglang
    engine = sglang.Engine(
        model_path=str(config.model.folder),
        skip_tokenizer_init=True,
        attention_backend=s.attention_backend,
        sampling_backend=s.sampling_backend,
        mem_fraction_static=s.mem_fraction,
        enable_memory_saver=s.memory_saver,
        **s.server_arguments,
    )
    vocab_size = ModelConfig.from_folder(config.model.folder).vocab_size
    speeds = []
    for i in range(repeats + 1):
        prompts = contexts(vocab_size, 100 + i).tolist()
        start = time.perf_counter()
        answers = engine.generate(
            input_ids=prompts, sampling_params={"max_new_tokens": NEW_TOKENS, "temperature": 1.0}, return_logprob=True
        )
        num_tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
        speeds.append(num_tokens / (time.perf_counter() - start))
    engine.shutdown()
    return speeds[1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    options = parser.parse_args()
    recipe = Path(__file__).parents[1] / "examples" / "smollm2_gpu" / "config.yaml"
    with tempfile.TemporaryDirectory() as folder:
        config = configuration.load(recipe, [f"model.folder={options.model}", f"run.folder={folder}"])
        mine = asyncio.run(all_ours(config, options.repeats))
    theirs = all_theirs(config, options.repeats)
    ratio = statistics.median(mine) / statistics.median(theirs)
    row = Row(
        f"{NUM_REQUESTS} requests x {NEW_TOKENS} tokens, model {options.model.name}",
        "tokens/s",
        statistics.median(mine),
        statistics.median(theirs),
        "sglang.Engine.generate",
        None,
        ratio,
        None,
        {"ours": (min(mine), max(mine)), "peer": (min(theirs), max(theirs))},
    )
    print(f"ours {row.ours:.0f}, sglang.Engine {row.peer:.0f} tokens/s, ratio {ratio:.3f}")
    packages, device = ["torch", "sglang", "aiohttp"], torch.device("cuda", 0)
    write_result("sglang_driver", [row], ceilings={}, packages=packages, device=device, folder=options.out)


if __name__ == "__main__":
    main()
