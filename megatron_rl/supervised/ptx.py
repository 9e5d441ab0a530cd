"""The PTX term (K2 3.2): given conversations beside the sampled ones in every optimizer step of reinforcement learning.

Which ones follows from the seed, the iteration and the step alone, so an iteration that is trained again after a resume is given
the same; where the data changed in between, `bind` refuses. Their weights hold the term's own denominator;
`algorithms/cross_entropy.py` gives them their coefficients.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_rl.config import Config
from megatron_rl.data.conversations import read_conversations
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.run_folder import write_atomically
from megatron_rl.supervised.course import digest, sequence
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
        self._path, self._weight, self._tokens, self._seed = settings.path, settings.weight, settings.tokens, config.run.seed
        self._sequences = [  # ids below those of groups and trajectories: -n is the n-th conversation
            sequence(e, group_id=-n, trajectory_id=-n, advantage=0.0, is_supervised=True) for n, e in enumerate(examples, start=1)
        ]

    def bind(self, run_folder: Path, *, replays: bool) -> None:
        """Note in the run folder what is drawn from. Raises DataError where it is other than at the last start and iterations
        since then are trained again (`replays`): they would not become what they were."""
        file = run_folder / "ptx.json"
        now = {"tokens": self._tokens, "digest": digest(self._sequences)}
        if replays and file.exists() and json.loads(file.read_text(encoding="utf-8")) != now:
            raise DataError(
                f"algorithm.ptx.path={self._path}, tokens={self._tokens}: gives other conversations than those that {run_folder} "
                "trained on since its last checkpoint, and these iterations are now trained again; restore both the setting and "
                "the file, and change them after a stop by SIGTERM, which saves"
            )
        write_atomically(file, json.dumps(now))

    def draw(self, iteration: int, step: int) -> list[TrainingSequence]:
        """Conversations of at least `algorithm.ptx.tokens` loss-bearing tokens, or all of them; weighed to a mean over tokens."""
        drawn, num_tokens = [], 0
        for i in np.random.default_rng((self._seed, iteration, step)).permutation(len(self._sequences)):
            drawn.append(self._sequences[i])
            num_tokens += int(drawn[-1].loss_mask.sum())
            if num_tokens >= self._tokens:
                break
        return [s.weighing(self._weight / num_tokens) for s in drawn]
