"""A Megatron-Core GPTModel for Llama, Qwen2 and Qwen3, cut for this rank's place in the parallel layout.

`build_model` gives this rank's chunks with unset weights: they come from a Hugging Face folder (`weights/hf.py`) or a
checkpoint (`checkpoint.py`), never from random numbers. Departures from Megatron's own model: no rotary embedding in the
model (`attention.py` applies it from explicit positions), an RMSNorm that works under sequence parallelism, and a last
stage that returns the normed hidden states, because `log_probs.py` never makes [tokens, vocabulary].
Needs Megatron's parallel state (`parallel.py`). Next: `attention.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config import TrainerConfig
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import cpu
from megatron_rl.training.attention import TreeAttention


def compute_dtype(config: TrainerConfig) -> torch.dtype:
    """`model.dtype`; `auto` is bfloat16 where it is fast: on a GPU, and on a CPU whose bfloat16 products oneDNN does."""
    if config.model.dtype == "auto":
        is_fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if is_fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]


class PolicyModel(GPTModel):
    """One chunk of the policy. Its last stage returns [tokens, 1, hidden] after the final norm (under sequence
    parallelism this rank's share of the tokens); other stages return what the next one needs."""

    model_config: ModelConfig  # what `weights/hf.py` cuts and joins its tensors by

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    @property
    def output_weight(self) -> torch.Tensor:
        """[padded vocabulary / TP, hidden]; on the last stage only. The embedding itself where they are tied."""
        assert self.post_process, "only the last pipeline stage has an output layer"
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's wrapper of the same class refuses sequence parallelism, where each rank sees only its tokens: the mark
    on the weight makes Megatron add up its gradient over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def build_model(config: TrainerConfig, model: ModelConfig) -> list[PolicyModel]:
    """This rank's chunks, first to last: one, or `training.virtual_pipeline` of them."""
    cpu.install()
    stages = config.training.virtual_pipeline
    return [_build_chunk(config, model, stage) for stage in (range(stages) if stages else [None])]


def padded_vocab_size(model: ModelConfig, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the vocabulary, made divisible. Padding rows never get probability."""
    return -(-model.vocab_size // tensor_parallel) * tensor_parallel


def _build_chunk(config: TrainerConfig, model: ModelConfig, stage: int | None) -> PolicyModel:
    transformer = transformer_config(config, model)
    here = {"ignore_virtual": False, "vp_stage": stage}
    chunk = PolicyModel(
        transformer,
        _block_spec(transformer, model, stage),
        vocab_size=padded_vocab_size(model, config.training.tensor_parallel),
        max_sequence_length=model.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**here),
        post_process=parallel_state.is_pipeline_last_stage(**here),
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="none",
        vp_stage=stage,
    )
    chunk.model_config = model
    _mark_sharded(chunk)
    return chunk.to(cpu.device())


def _mark_sharded(chunk: PolicyModel) -> None:
    """Megatron marks weights as cut over tensor-parallel ranks only where it initialises them at random. Unmarked, they
    count once instead of once a rank, and the gradient norm, which clipping divides by, comes out too small."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _block_spec(transformer: TransformerConfig, model: ModelConfig, stage: int | None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TreeAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(transformer, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def transformer_config(config: TrainerConfig, model: ModelConfig) -> TransformerConfig:
    """Megatron's configuration of this model under this layout. Settings a newer Megatron dropped are left out."""
    settings = _shape(model) | _layout(config) | _plain_kernels() | _schedule(config)
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{name: value for name, value in settings.items() if name in known})


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "qk_layernorm": model.qk_norm,
        "add_qkv_bias": model.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout(config: TrainerConfig) -> dict[str, Any]:
    t = config.training
    dtype = compute_dtype(config)
    return {
        "tensor_model_parallel_size": t.tensor_parallel,
        "pipeline_model_parallel_size": t.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": t.virtual_pipeline,
        "context_parallel_size": t.context_parallel,
        "sequence_parallel": t.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "recompute_granularity": "full" if t.recompute else None,
        "recompute_method": "uniform" if t.recompute else None,
        "recompute_num_layers": 1 if t.recompute else None,
    }


def _plain_kernels() -> dict[str, Any]:
    """No fused kernels that need CUDA extensions, and no random initialisation: every weight is loaded."""
    return {
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }


def _sum_gradients(chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's reduction over data, tensor and pipeline ranks, without its division by the number of tokens."""
    finalize_model_grads(chunks, num_tokens=None, **kwargs)


def _schedule(config: TrainerConfig) -> dict[str, Any]:
    """Pipeline and gradient rules. Micro-batches differ in length; gradients are summed and never divided, because the
    loss's weights already hold the global denominator."""
    interleaved = config.training.virtual_pipeline is not None
    return {
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # Megatron asks for it with variable lengths, experts or not
        "overlap_p2p_comm": interleaved and config.training.overlap_p2p_comm,
        "batch_p2p_comm": not interleaved,
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _sum_gradients,
    }
