"""Sections that every kind of run has, and what the trainer reads of any configuration.

Reinforcement learning: `sections.py`. Supervised fine-tuning and preference pairs: `supervised.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def setting(default: Any = ..., doc: str = "", *, ours: bool = False, **kwargs: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"ours": ours}, **kwargs)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class RunFolderConfig(Section):
    """What every kind of run has."""

    folder: Path = setting(doc="where the run lives: config, metrics, buffer, checkpoints, report, exported model")
    seed: int = setting(0, "seed of sampling noise, order of the data and initialisation", ours=True)
    keep_checkpoints: Positive = setting(2, "checkpoints kept on disk; older ones are deleted", ours=True)
    shutdown_s: Seconds = setting(25.0, "time SIGTERM leaves for committing tokens and saving [s]", ours=True)
    threads: int = setting(0, "torch threads of each rank on a CPU; 0 divides the cores among the ranks", ge=0, ours=True)


class ModelSection(Section):
    folder: Path = setting(doc="Hugging Face model folder: config.json, safetensors, tokenizer")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "compute dtype; main weights and gradients are float32; auto: bfloat16 where the hardware is fast at it, else float32",
        ours=True,
    )


class AdamConfig(Section):
    beta1: float = setting(0.9, "Adam beta1", ge=0, lt=1, ours=True)
    beta2: float = setting(0.95, "Adam beta2", ge=0, lt=1, ours=True)
    eps: float = setting(1e-8, "Adam epsilon", gt=0, ours=True)
    weight_decay: float = setting(0.0, "decoupled weight decay", ge=0, ours=True)
    clip_grad: float = setting(1.0, "largest gradient norm; 0 is off", ge=0, ours=True)


class MegatronConfig(Section):
    """Layout and memory: what any training through Megatron-Core has."""

    tensor_parallel: Positive = setting(1, "ranks that share each layer (TP)")
    pipeline_parallel: Positive = setting(1, "ranks in a row, each with some layers (PP)")
    virtual_pipeline: Positive | None = setting(None, "model chunks on each pipeline rank (VPP)")
    overlap_p2p_comm: bool = setting(True, "VPP: overlap pipeline sends with compute")
    context_parallel: Positive = setting(1, "ranks that share each micro-batch's tokens (CP)")
    sequence_parallel: bool = setting(False, "split activations between tensor-parallel regions over TP ranks (SP)")
    distributed_optimizer: bool = setting(False, "split optimizer state over data-parallel ranks")
    recompute: bool = setting(False, "recompute activations of every layer in backward")
    max_tokens_per_micro_batch: Positive = setting(
        4096, "packed tokens of one micro-batch; one longer trajectory makes its own [tokens]", ours=True
    )
    share_prompts: bool = setting(True, "compute a group's prompt once for its k responses")
    log_prob_chunk: Positive = setting(1024, "rows of [rows, vocabulary] in memory at once", ours=True)
    collective_timeout_s: Seconds = setting(600.0, "longest wait for another rank in a collective [s]", ours=True)
    optimizer: AdamConfig = setting(AdamConfig(), "Adam")


class ExportConfig(Section):
    bucket_bytes: int = setting(
        256 << 20, "full tensors gathered at once while publishing or exporting [bytes]", ge=1 << 10, ours=True
    )


class MetricsConfig(Section):
    tensorboard: bool = setting(True, "also write TensorBoard files if the package is installed", ours=True)


class TrainerConfig(Protocol):
    """What `training/` reads of any configuration."""

    @property
    def run(self) -> RunFolderConfig: ...
    @property
    def model(self) -> ModelSection: ...
    @property
    def training(self) -> MegatronConfig: ...

    @property
    def initial_lr(self) -> float: ...
    @property
    def keeps_moments(self) -> bool:
        """Whether Adam's moments outlive an iteration; then checkpoints hold them."""
        ...
