"""A step over one long sequence, for `test_memory.py`, in a fork of the zygote."""

from __future__ import annotations

import json
import resource
from pathlib import Path

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import parallel
from megatron_rl.training.trainer import Trainer
from tests.training.material import make_config, one_sequence

NUM_TOKENS = 16 * 1024
VOCABULARY = 8 * 1024


def step(folder: str, found: str) -> None:
    """Writes packed tokens, micro-batches, and by how many bytes the long step raised the peak of a short one."""
    config = make_config(Path(folder), training={"max_tokens_per_micro_batch": NUM_TOKENS, "log_prob_chunk": 256})
    parallel.initialize(config)
    trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
    trainer.load_hf(config.model.folder)
    trainer.step(trainer.distribute([[one_sequence(64, 64, VOCABULARY)]]), MirrorDescent(0.1), None)
    before = peak_bytes()
    long = one_sequence(1024, NUM_TOKENS - 1024 + 1, VOCABULARY)
    stats = trainer.step(trainer.distribute([[long]]), MirrorDescent(0.1), None)
    Path(found).write_text(json.dumps([stats["tokens/packed"], stats["num_micro_batches"], peak_bytes() - before]))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
