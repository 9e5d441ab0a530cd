"""Floating-point operations that a model's training needs by itself, and what a GPU could do: the two sides of MFU.

    MFU = operations of the step / (seconds x GPUs x peak)

Three times the forward pass (backward takes twice as much), nothing computed again, two operations a multiply-add. Rows are
packed tokens, a group's prompt once; the output layer counts for loss-bearing tokens only, since no other is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.model_config import ModelConfig
from megatron_rl.types import TrainingSequence

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}  # dense bfloat16, SXM, by NVIDIA's datasheets


def peak_tflops(device: str) -> float | None:
    """Of a GPU by its name; None where it is not known here."""
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in device), None)


def matrix_flops(model: ModelConfig, rows: float, loss_tokens: float) -> float:
    """Forward and backward through all matrices; attention's own products are left out."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.ffn_size)
    return 6.0 * (model.num_layers * layer * rows + model.vocab_size * model.hidden_size * loss_tokens)


def attention_flops(model: ModelConfig, pairs: float) -> float:
    """Forward and backward. pairs: of a row and a position that it sees."""
    return 6.0 * model.num_layers * 2 * model.num_heads * model.head_dim * pairs


def step_flops(sequences: Sequence[TrainingSequence], model: ModelConfig) -> float:
    """Of one step on whole responses, every token of which bears loss."""
    prompts = {s.group_id: len(s.prompt_ids) for s in sequences}
    own = [(len(s.prompt_ids), len(s.response_ids)) for s in sequences]
    rows = sum(prompts.values()) + sum(n - 1 for _, n in own)  # nothing follows a response's last token
    pairs = sum(p * p / 2 for p in prompts.values()) + sum(n * (p + n / 2) for p, n in own)
    return matrix_flops(model, rows, sum(n for _, n in own)) + attention_flops(model, pairs)
