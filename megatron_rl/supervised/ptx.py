"""The PTX term (K2 3.2): given conversations beside the sampled ones in every optimizer step of reinforcement learning.

Which ones follows from the seed, the iteration and the step alone, so an iteration that is trained again after a resume is given
the same. Their weights hold the term's own denominator; `algorithms/cross_entropy.py` gives them their coefficients.
"""

from __future__ import annotations

import numpy as np

from megatron_rl.config import Config
from megatron_rl.data.conversations import read_conversations
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.supervised.course import sequence
from megatron_rl.types import TrainingSequence


class PTX:
    def __init__(self, config: Config, tokenizer: ChatTokenizer, model: ModelConfig) -> None:
        """Raises DataError for a file or line that cannot be used, or a conversation longer than the model's context."""
        settings = config.algorithm.ptx
        assert settings.path is not None, "checked with the settings"
        examples = read_conversations(settings.path, tokenizer, "algorithm.ptx.path")
        for example in examples:
            if len(example.token_ids) > model.max_positions:
                raise DataError(
                    f"{example.where}: {len(example.token_ids)} tokens, more than the model's context of {model.max_positions}; "
                    "shorten or remove it"
                )
        self._weight, self._tokens, self._seed = settings.weight, settings.tokens, config.run.seed
        self._sequences = [  # ids below those of groups and trajectories: -n is the n-th conversation
            sequence(e, group_id=-n, trajectory_id=-n, advantage=0.0, is_supervised=True) for n, e in enumerate(examples, start=1)
        ]

    def draw(self, iteration: int, step: int) -> list[TrainingSequence]:
        """Conversations of at least `algorithm.ptx.tokens` loss-bearing tokens, or all of them; weighed to a mean over tokens."""
        drawn, num_tokens = [], 0
        for i in np.random.default_rng((self._seed, iteration, step)).permutation(len(self._sequences)):
            drawn.append(self._sequences[i])
            num_tokens += int(drawn[-1].loss_mask.sum())
            if num_tokens >= self._tokens:
                break
        return [s.weighing(self._weight / num_tokens) for s in drawn]
