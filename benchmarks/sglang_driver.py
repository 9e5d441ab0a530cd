"""Tokens per second of SGLang driven by us over HTTP, against `sglang.Engine.generate` called directly with the same requests.

256 requests of 64 random prompt tokens, each of exactly 512 tokens (temperature 1, log-probs on both sides): the model is given
without its end-of-text token. One server after the other on the same GPU, with the same settings; each is warmed up with whole
batches first. Ours streams its answers and the peer does not: an iteration needs them as they come. A claim of at least 0.95 for
all requests in one call; beside it, not claimed, the calls of 8 that the scheduler makes for its groups, calls of one, and one
call streamed at half as many pieces. What is printed of every batch says where its seconds went: first tokens, ends, and the
prefill batches that the server's log tells of. Unattended:

    python benchmarks/sglang_driver.py --model FOLDER [--repeats 5] [--seconds 200] [--out DIR]
    python benchmarks/sglang_driver.py --small --out DIR              # no numbers worth reading: on a CPU
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import Clock, attempt, command_line, show
from result_file import Row, write_result
from served_model import RECIPE, SILENCE_S, Setup, open_server, prepare

from megatron_rl import config as configuration
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Request, Sampling
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_server import sglang_program
from megatron_rl.rollout.engines.sglang_transport import IPC

PEER_S = 75.0  # what the peer takes to start and to be measured


@dataclass(frozen=True)
class Workload:
    requests: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> np.ndarray:
        """int32 [requests, prompt_tokens]: fresh ones for every batch, so that no cache serves them."""
        shape = (self.requests, self.prompt_tokens)
        return np.random.default_rng(seed).integers(min(100, vocab_size // 2), vocab_size, shape).astype(np.int32)


FULL, SMALL = Workload(256, 64, 512), Workload(16, 8, 24)


@dataclass(frozen=True)
class Case:
    name: str
    call_size: int | None  # requests in a call; None: all
    pieces: float = 1.0  # of an answer, against rollout.sglang.stream_interval's default


CASES = (Case("one call", None), Case("calls of 8", 8), Case("calls of 1", 1), Case("one call, half the pieces", None, 0.5))


@dataclass
class Batch:
    """What a batch took: seconds since its start, of each request's first and last chunk."""

    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_chunks: int = 0
    own_s: float = 0.0  # of them this process computed

    @property
    def rate(self) -> float:
        return self.num_tokens / max(self.last.values())

    def told(self) -> str:
        first, last = self.first.values(), self.last.values()
        return (
            f"{self.num_tokens} tokens in {max(last):.3f} s, {self.rate:.0f} tokens/s; first tokens {min(first):.3f} to "
            f"{max(first):.3f} s, ends {min(last):.3f} to {max(last):.3f} s; {self.num_chunks} chunks, "
            f"{self.own_s:.3f} s of our CPU"
        )


async def ours(engine: SGLangEngine, prompts: np.ndarray, new_tokens: int, call_size: int | None) -> Batch:
    requests = [Request(i, ids, new_tokens, Sampling(), 0, str(i)) for i, ids in enumerate(prompts)]
    batch, start, computed = Batch(), time.perf_counter(), time.process_time()

    async def one_call(asked: Sequence[Request]) -> None:
        async for chunk in engine.generate(asked):
            now = time.perf_counter() - start
            batch.first.setdefault(chunk.trajectory_id, now)
            batch.last[chunk.trajectory_id] = now
            batch.num_tokens += len(chunk.token_ids)
            batch.num_chunks += 1

    size = call_size or len(requests)
    await asyncio.gather(*(one_call(requests[i : i + size]) for i in range(0, len(requests), size)))
    batch.own_s = time.process_time() - computed
    return batch


@asynccontextmanager
async def engines(setup: Setup, url: str) -> AsyncIterator[dict[Case, SGLangEngine]]:
    """One a case, at the same server."""
    made: dict[Case, SGLangEngine] = {}
    default = setup.config.rollout.sglang
    try:
        for case in CASES:
            config = default.model_copy(update={"stream_interval": round(default.stream_interval / case.pieces)})
            engine = await SGLangEngine.connect(
                url, setup.model, config, name="sglang-0", silence_s=SILENCE_S, transport=setup.transport
            )
            engine.weight_version = 0
            made[case] = engine
        yield made
    finally:
        for engine in made.values():
            await engine.close()


async def all_ours(setup: Setup, work: Workload, repeats: int, clock: Clock) -> dict[Case, list[Batch]]:
    found: dict[Case, list[Batch]] = {case: [] for case in CASES}
    async with open_server(setup) as (_, client), engines(setup, client.url) as by_case:
        clock.tell("our server is up")
        log = setup.config.run.folder / "log" / "sglang-0.log"
        for i in range(repeats + 1):
            for case, engine in by_case.items():
                if i > 1 and clock.left < PEER_S:
                    clock.tell(f"{case.name}: no time for repeat {i}")
                    continue
                length = log.stat().st_size
                prompts = work.prompts(setup.model.vocab_size, 10 * i + CASES.index(case))
                batch = await ours(engine, prompts, work.new_tokens, case.call_size)
                print(f"  {case.name}, {f'repeat {i}' if i else 'warm-up'}: {batch.told()}{prefills(log, length)}", flush=True)
                found[case] += [batch] if i else []
    return found


def prefills(log: Path, start: int) -> str:
    """The requests in each prefill batch that the server tells of since `start` [bytes]."""
    with log.open("rb") as file:
        file.seek(start)
        counts = re.findall(rb"Prefill batch.*?#new-seq: (\d+)", file.read())
    return f"; prefilled {' + '.join(map(bytes.decode, counts))}" if counts else ""


def all_theirs(setup: Setup, work: Workload, repeats: int, clock: Clock) -> list[Batch]:
    import sglang

    s = setup.config.rollout.sglang
    engine = sglang.Engine(
        model_path=str(setup.config.model.folder),
        dtype=setup.config.model.dtype,
        skip_tokenizer_init=True,
        attention_backend=s.attention_backend,
        sampling_backend=s.sampling_backend,
        mem_fraction_static=s.mem_fraction,
        enable_memory_saver=s.takes_turns,
        random_seed=setup.config.run.seed,
        **s.server_arguments,
    )
    clock.tell("the peer is up")
    params = {"max_new_tokens": work.new_tokens, "temperature": 1.0}
    found = []
    try:
        for i in range(repeats + 1):
            prompts = work.prompts(setup.model.vocab_size, 1000 + i).tolist()
            batch, start, computed = Batch(), time.perf_counter(), time.process_time()
            answers = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
            seconds = time.perf_counter() - start
            for k, answer in enumerate(answers):
                batch.first[k], batch.last[k] = seconds, seconds  # it gives everything at once
                batch.num_tokens += len(answer["meta_info"]["output_token_logprobs"])
            batch.num_chunks, batch.own_s = len(answers), time.process_time() - computed
            spent = [answer["meta_info"]["e2e_latency"] for answer in answers]
            name = f"repeat {i}" if i else "warm-up"
            print(f"  peer, {name}: {batch.told()}; its own latencies {min(spent):.3f} to {max(spent):.3f} s", flush=True)
            found += [batch] if i else []
            if i and clock.left < 10:
                break
    finally:
        engine.shutdown()
    return found


def endless(model: Path, folder: Path) -> Path:
    """The model, by links, without an end-of-text token: nothing ends a response before its time."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (folder / file.name).symlink_to(file.resolve())
    raw: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": None}, indent=1), encoding="utf-8")
    return folder


def given(model: Path, folder: Path) -> Setup:
    """The recipe of the demo on one GPU, whose model is `model`."""
    overrides = [f"model.folder={endless(model, folder / 'model')}", f"run.folder={folder / 'run'}"]
    config = configuration.load(RECIPE, overrides)
    shape, device = ModelConfig.from_folder(config.model.folder), torch.device("cuda", 0)
    return Setup(config, shape, device, sglang_program(), cuda_ipc_serializer, IPC(cuda_ipc_serializer), small=False)


def rows(mine: dict[Case, list[Batch]], theirs: list[Batch] | None, work: Workload, model: str) -> list[Row]:
    def spread(batches: list[Batch]) -> tuple[float, float]:
        return round(min(b.rate for b in batches)), round(max(b.rate for b in batches))

    def median(batches: list[Batch]) -> float:
        return round(statistics.median(b.rate for b in batches))

    peer = median(theirs) if theirs else None
    return [
        Row(
            case=f"{work.requests} requests x {work.new_tokens} tokens, {case.name}, model {model}",
            unit="tokens/s",
            ours=median(batches),
            peer=peer,
            peer_name="sglang.Engine.generate",
            limit=None,
            ratio_to_peer=round(median(batches) / peer, 3) if peer else None,
            ratio_to_limit=None,
            spread={"ours": spread(batches), **({"peer": spread(theirs)} if theirs else {})},
        )
        for case, batches in mine.items()
        if batches
    ]


def main() -> None:
    parser = command_line(__doc__, seconds=200, then="no further batch is started")
    parser.add_argument("--model", type=Path, help="folder of the model; not with --small")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not (options.small or options.model):
        parser.error("--model names the model's folder; --small needs none")
    clock, work = Clock.of(options.seconds), SMALL if options.small else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = prepare(folder, small=True, layers=2, overrides=[]) if options.small else given(options.model, folder)
        mine = asyncio.run(all_ours(setup, work, options.repeats, clock))
        theirs = attempt("sglang.Engine.generate", lambda: all_theirs(setup, work, options.repeats, clock), {})
    model = "tiny" if options.small else options.model.name
    found = rows(mine, theirs, work, model)
    show(found)
    packages = ["torch", "aiohttp"] if options.small else ["torch", "sglang", "aiohttp"]
    write_result("sglang_driver", found, ceilings={}, packages=packages, device=setup.device, folder=options.out)
    clock.tell("done")


if __name__ == "__main__":
    main()
