"""Score a model folder on a fixed set of prompts: the same command before and after a run.

Correctness only (1 at a full score, else 0): its mean, which is pass@1, unbiased pass@k and the majority vote, each with a
bootstrap interval over prompts. Training never draws the held-out split; `data/sources.py` keeps the two apart by question
text. Which sets there are: `data/evaluation_sets.py`; generating and scoring: `answering.py`; the numbers: `statistics.py`;
evaluation while training: `interval_evaluation.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_rl.answering import Response, answer, sampling_at
from megatron_rl.config import Config, RewardsConfig
from megatron_rl.data.evaluation_sets import check_room, load_set
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.folder_engines import folder_engines
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.statistics import bootstrap_interval, final_answer, majority_is_correct, pass_at_k


@dataclass(frozen=True)
class Score:
    """A mean over prompts with its 95 % bootstrap interval."""

    name: str  # pass@k, maj@k
    mean: float
    low: float
    high: float


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
    correct_tokens: float | None  # of a correct response; None where none is
    scores: tuple[Score, ...]  # pass@1, 2, 4, ... and maj@samples


@dataclass(frozen=True)
class Way:
    """How a set is answered."""

    greedy: bool
    samples: int = 1  # responses to each prompt


def evaluate(config: Config, model_folder: Path, *, split: str = "held_out", greedy: bool = True, samples: int = 1) -> dict:
    """Answer every prompt of `split` (a name as in `load_set`) `samples` times; returns the fields of Evaluation.

    Raises DataError when the set is empty, or a prompt has no answer or no room in the model's context; RewardError when a
    response could not be scored."""
    return evaluate_ways(config, model_folder, [Way(greedy, samples)], split=split)[0]


def evaluate_ways(config: Config, model_folder: Path, ways: Sequence[Way], *, split: str) -> list[dict]:
    """`evaluate` in several ways, one after the other on engines that are started once."""
    tokenizer = ChatTokenizer.from_folder(model_folder)
    questions = load_set(split, config, tokenizer)
    check_room(questions.prompts, split, model_folder)
    limit, seed = config.rollout.max_response_tokens, config.run.seed

    async def respond(engines: Sequence[Engine]) -> list[list[list[Response]]]:
        scorer = Scorer(questions.rewards, config.rollout.repetition.penalty)

        async def one_way(way: Way) -> list[list[Response]]:
            sampling = sampling_at(config, tokenizer, _temperature(config, way))
            return await answer(
                engines, tokenizer, scorer, questions.prompts, samples=way.samples, sampling=sampling, max_tokens=limit
            )

        try:
            return [await one_way(way) for way in ways]
        finally:
            await scorer.close()

    with asyncio.Runner() as runner, folder_engines(config, model_folder, runner, name="evaluation") as engines:
        found = runner.run(respond(engines))
    return [
        asdict(
            summary(
                responses,
                seed=seed,
                prefix=answer_prefix(questions.rewards),
                model=str(model_folder),
                split=questions.name,
                greedy=way.greedy,
                temperature=_temperature(config, way),
            )
        )
        for way, responses in zip(ways, found, strict=True)
    ]


def _temperature(config: Config, way: Way) -> float:
    return 0.0 if way.greedy else config.rollout.temperature


def summary(
    responses: Sequence[Sequence[Response]],
    *,
    seed: int,
    prefix: str | None,
    model: str,
    split: str,
    greedy: bool,
    temperature: float,
) -> Evaluation:
    """All numbers of an evaluation from the responses [prompts, samples]."""
    samples = len(responses[0])
    correct = np.array([[r.is_correct for r in row] for row in responses], dtype=np.float64)
    tokens = np.array([[r.num_tokens for r in row] for row in responses])

    def score(name: str, values: np.ndarray) -> Score:
        low, high = bootstrap_interval(values, seed=seed)
        return Score(name, float(values.mean()), low, high)

    ks = [k for k in (2**i for i in range(samples.bit_length())) if k < samples] + [samples]
    scores = [score(f"pass@{k}", np.array([pass_at_k(samples, int(row.sum()), k) for row in correct])) for k in dict.fromkeys(ks)]
    if samples > 1:
        votes = [
            majority_is_correct([final_answer(r.text, prefix) for r in row], [r.is_correct for r in row]) for row in responses
        ]
        scores.append(score(f"maj@{samples}", np.array(votes, dtype=np.float64)))
    return Evaluation(
        model=model,
        split=split,
        n=len(responses),
        samples=samples,
        greedy=greedy,
        temperature=temperature,
        mean=scores[0].mean,
        low=scores[0].low,
        high=scores[0].high,
        mean_tokens=float(tokens.mean()),
        correct_tokens=float(tokens[correct > 0].mean()) if correct.any() else None,
        scores=tuple(scores),
    )


def answer_prefix(rewards: RewardsConfig) -> str | None:
    """What the first term that reads a prefix looks for; a vote looks for the same."""
    return next((str(term.options["prefix"]) for term in rewards.terms if "prefix" in term.options), None)
