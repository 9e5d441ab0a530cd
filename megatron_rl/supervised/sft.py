"""`megatron-rl sft`: the cross entropy of the assistant's tokens, a mean over the tokens of each optimizer step.

The warm-up before reinforcement learning, and the vanilla SFT with its two stages (paper 2.2, 2.5.2). How it runs: `run.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_rl.algorithms.cross_entropy import CrossEntropy
from megatron_rl.config import SFTConfig
from megatron_rl.data.conversations import read_conversations
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.model_config import ModelConfig
from megatron_rl.supervised.course import Course, Item, make_course, sequence
from megatron_rl.supervised.run import Method, train


def sft(config: SFTConfig) -> int:
    """Train to the end of the last stage, or to a SIGTERM. Returns the exit code."""
    return train(config, Method(CrossEntropy(), partial(load_course, config)))


def load_course(config: SFTConfig, model: ModelConfig) -> Course:
    """Raises DataError for a file or line that cannot be used."""
    tokenizer = ChatTokenizer.from_folder(config.model.folder)
    examples = read_conversations(config.sft.path, tokenizer, "sft.path")
    items = [
        Item(e.where, (sequence(e, group_id=i, trajectory_id=i, advantage=1.0, is_supervised=True),))
        for i, e in enumerate(examples)
    ]
    return make_course(
        config,
        model,
        items,
        too_long=config.sft.too_long,
        sizes=lambda item: item.num_tokens,
        batch_size=config.sft.batch_tokens,
        denominator=num_loss_tokens,
    )


def num_loss_tokens(items: Sequence[Item]) -> float:
    return float(sum(int(s.loss_mask.sum()) for item in items for s in item.sequences))
