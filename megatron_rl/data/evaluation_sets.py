"""What a model is evaluated on, by name: the held-out split, a JSONL file with answers, or a ready-made set.

A file is read as `data.*` says (verifier, system message, worked turns); a ready-made set (`ready_made.py`) brings its own.
Refuses an empty set, and with `data/sources.py` one whose answers are missing. Answering and scoring: `megatron_rl/evaluate.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config import Config, DataConfig, RewardsConfig, RewardTerm
from megatron_rl.data.ready_made import PREFIX, SEED, SIZE, SYSTEM_MESSAGE, ready_made
from megatron_rl.data.sources import Encoder, PromptSet, load_prompts
from megatron_rl.errors import DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.types import Prompt

log = logging.getLogger(__name__)

SPLITS = ("held_out", "train")


@dataclass(frozen=True)
class EvaluationSet:
    name: str
    prompts: tuple[Prompt, ...]
    rewards: RewardsConfig  # its terms score the responses


def load_set(name: str, config: Config, tokenizer: Encoder, prompts: PromptSet | None = None) -> EvaluationSet:
    """name: held_out, train, a ready-made set, or a JSONL file; prompts: both splits, where they are loaded already.

    Raises DataError for an unknown name, questions that cannot be used, or missing answers."""
    if name in SPLITS:
        found = getattr(prompts or load_prompts(config.data, tokenizer, terms=config.rewards.names), name)
        result = EvaluationSet(name, found, config.rewards)
    elif name.endswith(".jsonl"):
        plain: dict[str, Any] = {"source": "jsonl", "path": Path(name), "held_out": 0, "task": None, "set": None}
        data = config.data.model_copy(update=plain)
        found = load_prompts(data, tokenizer, terms=config.rewards.names).train
        result = EvaluationSet(Path(name).stem, found, config.rewards)
    else:
        result = EvaluationSet(name, load_prompts(_ready_data(name, config), tokenizer).train, ready_made_rewards(config.rewards))
    if not result.prompts:
        raise DataError(f"set {name} is empty; set data.held_out to the number of prompts to keep out of training")
    if prompts and name != "train" and (shared := {p.id for p in prompts.train} & {p.id for p in result.prompts}):
        log.warning("%d of the %d prompts of %s are trained on too", len(shared), len(result.prompts), name)
    return result


def ready_made_rewards(rewards: RewardsConfig) -> RewardsConfig:
    """How the responses to any ready-made set are scored: by the task's own scorer, on what follows the prefix."""
    return rewards.model_copy(update={"terms": (RewardTerm(name="reasoning_gym", options={"prefix": PREFIX}),)})


def check_room(prompts: Sequence[Prompt], name: str, model_folder: Path) -> None:
    """Raises DataError for a prompt that leaves no room for a response in the model's context."""
    context = ModelConfig.from_folder(model_folder).max_positions
    if long := [p for p in prompts if len(p.token_ids) >= context]:
        raise DataError(
            f"set {name}: {len(long)} of its {len(prompts)} prompts leave no room for a response in the model's context of "
            f"{context} tokens (the first has {len(long[0].token_ids)} and begins {long[0].messages[-1].content[:40]!r}); "
            "shorten them or leave them out"
        )


def _ready_data(name: str, config: Config) -> DataConfig:
    ready_made(name)
    return DataConfig(
        source="reasoning_gym",
        set=name,
        size=SIZE,
        seed=SEED,
        system_message=SYSTEM_MESSAGE,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )
