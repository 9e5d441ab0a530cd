"""Peak memory of a step over 32k packed tokens, in a process of its own."""

import json
import subprocess
import sys

from tests.training.material import make_model

MIB = 1 << 20
NUM_TOKENS = 32 * 1024
VOCABULARY = 4 * 1024

STEP = f"""
import json, resource, sys
import numpy as np
from megatron_rl.algorithms import MirrorDescent
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import parallel
from megatron_rl.training.trainer import Trainer
from tests.training.material import make_config, one_sequence

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

config = make_config(sys.argv[1], training={{"max_tokens_per_micro_batch": {NUM_TOKENS}, "log_prob_chunk": 512}})
parallel.initialize(config)
trainer = Trainer(config, ModelConfig.from_folder(config.model.folder))
trainer.load_hf(config.model.folder)
before = trainer.step(trainer.distribute([[one_sequence(64, 64, {VOCABULARY})]]), MirrorDescent(0.1), None), peak_kib()
after = trainer.step(trainer.distribute([[one_sequence(1024, {NUM_TOKENS - 1024} + 1, {VOCABULARY})]]), MirrorDescent(0.1), None)
print(json.dumps([after["tokens/packed"], after["num_micro_batches"], (peak_kib() - before[1]) * 1024]))
"""


def test_a_step_over_32k_tokens_holds_no_square_mask_and_no_logits(tmp_path):
    """A [tokens, tokens] mask alone is 1 GiB as bool and 4 GiB as float32; [tokens, vocabulary] is 512 MiB as float32."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    folder = make_model(tmp_path, vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=NUM_TOKENS, **heads)
    command = [sys.executable, "-W", "ignore", "-c", STEP, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    num_packed, num_micro_batches, grown_bytes = json.loads(done.stdout.splitlines()[-1])
    assert (num_packed, num_micro_batches) == (NUM_TOKENS, 1)
    assert grown_bytes < 300 * MIB, f"{grown_bytes / MIB:.0f} MiB"
