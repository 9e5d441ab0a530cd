"""Peak memory of a step over 16k packed tokens, in a process of its own."""

import json

from tests.training.long_step import NUM_TOKENS, VOCABULARY, step
from tests.training.material import make_model

MIB = 1 << 20


def test_a_step_over_16k_tokens_holds_no_square_mask_and_no_logits(tmp_path, zygote):
    """A [tokens, tokens] mask alone is 256 MiB as bool, 1 GiB as float32; [tokens, vocabulary] is 512 MiB as float32."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    folder = make_model(tmp_path, vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=NUM_TOKENS, **heads)
    found, log = tmp_path / "found.json", tmp_path / "log"
    assert zygote.run(step, folder, found, log=log) == 0, log.read_text()
    num_packed, num_micro_batches, grown_bytes = json.loads(found.read_text())
    assert (num_packed, num_micro_batches) == (NUM_TOKENS, 1)
    assert grown_bytes < 200 * MIB, f"{grown_bytes / MIB:.0f} MiB"
