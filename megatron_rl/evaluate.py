"""Score a model folder on a fixed set of prompts: the same command before and after a run.

Correctness only (1 at a full score, else 0), with a bootstrap interval over prompts. Training never draws the held-out
split; `data/sources.py` keeps the two apart by question text.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rl.config import Config
from megatron_rl.data.sources import load_prompts
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError, RewardError
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Request, Sampling
from megatron_rl.rollout.engines.embedded.engine import EmbeddedEngine
from megatron_rl.training.model import compute_dtype
from megatron_rl.types import Ending, OutcomeKind, Prompt

BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Evaluation:
    model: str
    split: str
    n: int  # prompts
    samples: int  # responses a prompt
    greedy: bool
    temperature: float
    mean: float  # mean correctness
    low: float  # 95 % bootstrap interval over prompts
    high: float
    mean_tokens: float  # of a response


def evaluate(config: Config, model_folder: Path, *, split: str = "held_out", greedy: bool = True, samples: int = 1) -> dict:
    """Answer every prompt of `split` (`held_out` or `train`) `samples` times; returns the fields of Evaluation.

    Raises DataError when the split is empty, RewardError when a response could not be scored."""
    tokenizer = ChatTokenizer.from_folder(model_folder)
    prompts = getattr(load_prompts(config.data, tokenizer), split)
    if not prompts:
        raise DataError(f"split {split!r} is empty; set data.held_out to the number of prompts to keep out of training")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    engine = EmbeddedEngine.from_folder(
        model_folder, config=config.rollout.embedded, dtype=compute_dtype(config), device=device, name="evaluation"
    )
    temperature = 0.0 if greedy else config.rollout.temperature
    correct, tokens = asyncio.run(_answer(config, engine, tokenizer, prompts, samples, temperature))
    low, high = bootstrap_interval(correct.mean(axis=1), seed=config.run.seed)
    return asdict(
        Evaluation(
            model=str(model_folder),
            split=split,
            n=len(prompts),
            samples=samples,
            greedy=greedy,
            temperature=temperature,
            mean=float(correct.mean()),
            low=low,
            high=high,
            mean_tokens=float(tokens.mean()),
        )
    )


def bootstrap_interval(values: np.ndarray, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [prompts], resampling prompts with replacement."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (BOOTSTRAP_DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


async def _answer(
    config: Config,
    engine: EmbeddedEngine,
    tokenizer: ChatTokenizer,
    prompts: tuple[Prompt, ...],
    samples: int,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(correct, response tokens), both [prompts, samples]."""
    scorer = Scorer(config.rewards, config.rollout.repetition.penalty)
    sampling = Sampling(temperature=temperature, seed=config.run.seed, stop_token_ids=tokenizer.stop_token_ids)
    limit = config.rollout.max_response_tokens
    requests = [
        Request(i * samples + j, prompt.token_ids, limit, sampling, engine.weight_version, prompt.id)
        for i, prompt in enumerate(prompts)
        for j in range(samples)
    ]
    made: dict[int, list[np.ndarray]] = {r.trajectory_id: [] for r in requests}
    endings: dict[int, Ending] = {}
    async for chunk in engine.generate(requests):
        made[chunk.trajectory_id].append(chunk.token_ids)
        if chunk.ending:
            endings[chunk.trajectory_id] = chunk.ending
    responses = {i: np.concatenate(parts) for i, parts in made.items()}
    outcomes = await asyncio.gather(
        *(scorer.score(prompts[i // samples], tokenizer.decode(ids), endings[i]) for i, ids in responses.items())
    )
    await scorer.close()
    await engine.close()
    for outcome in outcomes:
        if outcome.kind is OutcomeKind.FAILED:
            raise RewardError(f"an evaluated response could not be scored: {outcome.detail}")
    shape = (len(prompts), samples)
    correct = np.array([o.correct for o in outcomes], dtype=np.float64).reshape(shape)
    return correct, np.array([len(ids) for ids in responses.values()]).reshape(shape)
