"""Which of a prompt's responses long2short trains on (paper 2.4). Pure functions, and the file they are written to.

Shortest rejection sampling: of n = 8 responses the shortest correct one goes into the SFT data. DPO: that one is chosen; rejected
are longer wrong ones, and correct ones at least 1.5 times as long.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.answering import Response, answer, folder_engine
from megatron_rl.config import Config
from megatron_rl.data.sources import load_prompts
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Sampling
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import Ending, Prompt

LONGER = 1.5  # paper 2.4


def shortest_correct(responses: Sequence[Response]) -> Response | None:
    """The first of the shortest ones; a response that was cut off is never correct here. None: nothing is right."""
    right = [r for r in responses if r.is_correct and r.ending is Ending.STOP]
    return min(right, key=lambda r: r.num_tokens, default=None)


def preference_pairs(responses: Sequence[Response], *, longer: float = LONGER) -> list[tuple[Response, Response]]:
    """(chosen, rejected), one pair for each rejected response; none where nothing is right."""
    chosen = shortest_correct(responses)
    if chosen is None:
        return []
    return [
        (chosen, r)
        for r in responses
        if (r.num_tokens >= longer * chosen.num_tokens if r.is_correct else r.num_tokens > chosen.num_tokens)
    ]


def write_selection(config: Config, model_folder: Path, target: Path, *, kind: str, samples: int) -> dict[str, int]:
    """Sample `samples` responses to every training prompt and write one JSON line for each selected one or pair.

    kind `sft`: {messages}, ending with the assistant's; `dpo`: {messages, chosen, rejected}. Returns counts.
    Raises DataError when no prompt yields a line: the file would be empty."""
    tokenizer = ChatTokenizer.from_folder(model_folder)
    prompts = load_prompts(config.data, tokenizer).train
    engine = folder_engine(config, model_folder, "long2short")
    r = config.rollout
    sampling = Sampling(r.temperature, r.top_p, r.top_k, r.min_p, seed=config.run.seed, stop_token_ids=tokenizer.stop_token_ids)

    async def respond() -> list[list[Response]]:
        scorer = Scorer(config.rewards, r.repetition.penalty)
        try:
            limit = r.max_response_tokens
            return await answer([engine], tokenizer, scorer, prompts, samples=samples, sampling=sampling, max_tokens=limit)
        finally:
            await scorer.close()
            await engine.close()

    lines = [line for prompt, row in zip(prompts, asyncio.run(respond()), strict=True) for line in _lines(kind, prompt, row)]
    if not lines:
        raise DataError(
            f"long2short: no response to the {len(prompts)} prompts could be used: none is right; take easier prompts, or "
            "raise --samples or rollout.max_response_tokens"
        )
    write_atomically(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {"prompts": len(prompts), "lines": len(lines)}


def _lines(kind: str, prompt: Prompt, responses: Sequence[Response]) -> list[dict[str, Any]]:
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if kind == "dpo":
        return [
            {
                "messages": messages,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "num_tokens": [chosen.num_tokens, rejected.num_tokens],
            }
            for chosen, rejected in preference_pairs(responses)
        ]
    best = shortest_correct(responses)
    if best is None:
        return []
    return [{"messages": [*messages, {"role": "assistant", "content": best.text}], "num_tokens": best.num_tokens}]
