"""`megatron-rl long2short dpo`: preference pairs that `reject` wrote, trained by DPO against the model as it was at the start.

Reference log-probs are computed once for each step's batch, from the model folder's weights, before the first step of every
start; a pair is never split among micro-batches. The loss: `algorithms/dpo.py`. How it runs: `supervised/run.py`.
"""

from __future__ import annotations

from functools import partial

from megatron_rl.algorithms.dpo import DPO
from megatron_rl.config import DPOConfig
from megatron_rl.data.conversations import read_pairs
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.model_config import ModelConfig
from megatron_rl.supervised.course import Course, Item, make_course, sequence
from megatron_rl.supervised.run import Method, train


def dpo(config: DPOConfig) -> int:
    """Train to the end, or to a SIGTERM. Returns the exit code."""
    objective = DPO(config.dpo.beta)
    method = Method(objective, partial(load_course, config), needs_reference=True, whole_groups=objective.needs_whole_groups)
    return train(config, method)


def load_course(config: DPOConfig, model: ModelConfig) -> Course:
    """Raises DataError for a file or line that cannot be used."""
    tokenizer = ChatTokenizer.from_folder(config.model.folder)
    pairs = read_pairs(config.dpo.path, tokenizer, "dpo.path")
    items = [
        Item(
            pair.chosen.where,
            (
                sequence(pair.chosen, group_id=i, trajectory_id=2 * i, advantage=1.0, is_supervised=False),
                sequence(pair.rejected, group_id=i, trajectory_id=2 * i + 1, advantage=-1.0, is_supervised=False),
            ),
        )
        for i, pair in enumerate(pairs)
    ]
    return make_course(
        config,
        model,
        items,
        too_long=config.dpo.too_long,
        sizes=lambda _: 1,
        batch_size=config.dpo.pairs_per_step,
        denominator=lambda pairs: float(len(pairs)),
    )
