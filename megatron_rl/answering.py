"""Answer a fixed set of prompts several times and score every response: what evaluation, curation and long2short share.

No buffer, no budgets: each response is generated in one go. Sampling noise is a function of the seed and a request's id, so
callers that share an engine choose ids that never meet (`EVALUATION_IDS`). Refuses responses that cannot be scored. How
many requests an engine works on at a time is its own business; whoever wants fewer answers a part of the prompts at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_rl.config import Config
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import RewardError
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Engine, Request, Sampling
from megatron_rl.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_rl.training.model import compute_dtype
from megatron_rl.types import Ending, OutcomeKind, Prompt

T = TypeVar("T")

EVALUATION_IDS = 1 << 40  # first request id of evaluations during training: no run draws so many trajectories


@dataclass(frozen=True)
class Response:
    text: str
    num_tokens: int
    is_correct: bool
    ending: Ending


def folder_engine(config: Config, folder: Path, name: str) -> EmbeddedEngine:
    """An engine with the weights of a model folder. Raises DataError for a folder that cannot be used."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return EmbeddedEngine.from_folder(
        folder, config=config.rollout.embedded, dtype=compute_dtype(config), device=device, name=name
    )


def sampling_at(config: Config, tokenizer: ChatTokenizer, temperature: float) -> Sampling:
    """As `rollout.top_p`, `top_k` and `min_p` say, at this temperature; at 0 the best token, whatever they say."""
    r = config.rollout
    return Sampling(temperature, r.top_p, r.top_k, r.min_p, seed=config.run.seed, stop_token_ids=tokenizer.stop_token_ids)


async def answer(
    engines: Sequence[Engine],
    tokenizer: ChatTokenizer,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    sampling: Sampling,
    max_tokens: int,
    first_id: int = 0,
) -> list[list[Response]]:
    """`samples` responses to each prompt, in order. Prompts are dealt out to the engines in turn; what they begin with in
    common, a system message and worked turns, is computed once on each.

    Request ids are first_id + (prompt index) * samples + j. Raises EngineError for an engine that fails, RewardError when a
    response cannot be scored. Cancelled, it leaves no request running."""
    found: dict[int, tuple[np.ndarray, Ending]] = {}

    async def generate(engine: Engine, mine: Sequence[int]) -> None:
        ids = [(i, first_id + i * samples + j) for i in mine for j in range(samples)]
        parts: dict[int, list[np.ndarray]] = {request_id: [] for _, request_id in ids}
        requests = [
            Request(request_id, prompts[i].token_ids, max_tokens, sampling, engine.weight_version, kv_key=f"answers {first_id}")
            for i, request_id in ids
        ]
        async for chunk in engine.generate(requests):
            parts[chunk.trajectory_id].append(chunk.token_ids)
            if chunk.ending:
                found[chunk.trajectory_id] = (np.concatenate(parts[chunk.trajectory_id]), chunk.ending)

    deals = [(engine, range(n, len(prompts), len(engines))) for n, engine in enumerate(engines)]
    await side_by_side(generate(engine, mine) for engine, mine in deals if mine)

    async def scored(prompt: Prompt, request_id: int) -> Response:
        ids, ending = found[request_id]
        text = tokenizer.decode(ids)
        outcome = await scorer.score(prompt, text, ending)
        if outcome.kind is OutcomeKind.FAILED:
            raise RewardError(f"a response to prompt {prompt.id} could not be scored: {outcome.detail}")
        return Response(text, len(ids), outcome.correct, ending)

    every = [(prompt, first_id + i * samples + j) for i, prompt in enumerate(prompts) for j in range(samples)]
    flat = await side_by_side(scored(prompt, request_id) for prompt, request_id in every)
    return [list(flat[i * samples : (i + 1) * samples]) for i in range(len(prompts))]


async def side_by_side(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first error, or a cancellation, ends the rest before it is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_order(work: Iterator[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T, None]:
    """The results in the order of `work`, at most `limit` of which run at a time; the next begins when any has ended.

    The first error is raised at once. Closed, it ends what runs."""
    tasks: deque[asyncio.Task[T]] = deque()
    try:
        while True:
            num_running = sum(not task.done() for task in tasks)
            tasks.extend(asyncio.create_task(one) for one in islice(work, limit - num_running))
            running = [task for task in tasks if not task.done()]
            if not running:  # then all are yielded: the first one of `tasks` was not done
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            while tasks and tasks[0].done():
                yield tasks.popleft().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
