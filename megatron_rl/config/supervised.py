"""The configurations of `megatron-rl sft` and `megatron-rl long2short dpo`, and the rules between their settings.

Both train a list of stages, each with its context length and learning rates, as the paper's SFT does (2.5.2). What they
share with reinforcement learning: `shared.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_rl.config.checks import check_shape, check_training
from megatron_rl.config.shared import (
    ExportConfig,
    Fraction,
    MegatronConfig,
    MetricsConfig,
    ModelSection,
    Positive,
    RunFolderConfig,
    Section,
    setting,
)
from megatron_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.model_config import ModelConfig

TooLong = Literal["error", "drop"]
_TOO_LONG = "an example longer than every stage's context: error stops and names it, drop leaves it out and counts it"


class StepsConfig(RunFolderConfig):
    checkpoint_every: Positive = setting(100, "optimizer steps between checkpoints; the last is always saved [steps]", ours=True)


class StageConfig(Section):
    context_tokens: Positive | None = setting(
        None, "longest example of the stage; longer ones wait for a later stage; default the model's context [tokens]"
    )
    epochs: Positive = setting(1, "passes over the data (paper 2.5.2)")
    lr_start: float = setting(2e-5, "learning rate after the warm-up (paper 2.5.2)", gt=0)
    lr_end: float = setting(2e-6, "learning rate at the end of the stage, reached by a cosine (paper 2.5.2)", ge=0)
    warmup: Fraction = setting(0.03, "share of the stage's steps in which the rate rises from 0 to lr_start", ours=True)


class SFTSection(Section):
    path: Path = setting(doc="JSONL file; a line holds `messages`, or `prompt` and `response`")
    stages: tuple[StageConfig, ...] = setting(
        (StageConfig(),),
        "each with context_tokens, epochs, lr_start, lr_end, warmup; the paper's: "
        "[{context_tokens: 32768}, {context_tokens: 131072, lr_start: 1e-5, lr_end: 1e-6}]",
    )
    batch_tokens: Positive = setting(
        65536, "tokens of one optimizer step; one longer example makes its own step [tokens]", ours=True
    )
    too_long: TooLong = setting("error", _TOO_LONG, ours=True)


class DPOSection(StageConfig):
    path: Path = setting(doc="JSONL file; a line holds `messages` or `prompt`, `chosen` and `rejected`")
    beta: float = setting(0.1, "weight of the log-ratio to the initial model", gt=0, ours=True)
    pairs_per_step: Positive = setting(32, "pairs of one optimizer step", ours=True)
    lr_start: float = setting(1e-6, "learning rate after the warm-up", gt=0, ours=True)
    lr_end: float = setting(1e-7, "learning rate at the end, reached by a cosine", ge=0, ours=True)
    too_long: TooLong = setting("error", _TOO_LONG, ours=True)


class SupervisedConfig(Section):
    run: StepsConfig = setting(doc="the run")
    model: ModelSection = setting(doc="the model that is trained")
    training: MegatronConfig = setting(MegatronConfig(), "Megatron-Core training")
    weights: ExportConfig = setting(ExportConfig(), "exporting weights")
    report: MetricsConfig = setting(MetricsConfig(), "metrics")
    kind: ClassVar[str]

    @property
    def keeps_moments(self) -> bool:
        return True

    @property
    def initial_lr(self) -> float:
        return self.stages[0].lr_start

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        raise NotImplementedError

    @property
    def fixed(self) -> tuple[str, ...]:
        """What the order of the data and the schedule depend on; it may not change between two starts of a run."""
        raise NotImplementedError


class SFTConfig(SupervisedConfig):
    sft: SFTSection = setting(doc="supervised fine-tuning")
    kind: ClassVar[str] = "sft"

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        return self.sft.stages

    @property
    def fixed(self) -> tuple[str, ...]:
        return ("run.seed", "model.folder", "sft")


class DPOConfig(SupervisedConfig):
    dpo: DPOSection = setting(doc="preference pairs (paper 2.4)")
    kind: ClassVar[str] = "dpo"

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        return (self.dpo,)

    @property
    def fixed(self) -> tuple[str, ...]:
        return ("run.seed", "model.folder", "dpo")


def check_supervised(c: SupervisedConfig) -> None:
    """The rules that need neither ranks nor model."""
    check_training(c.training)
    if not c.stages:
        raise ConfigError("sft.stages=[]: at least one stage is needed; leave it out for one epoch over everything")
    contexts = [stage.context_tokens for stage in c.stages]
    if len(contexts) > 1 and contexts != sorted(contexts, key=_longest_last):
        raise ConfigError(f"sft.stages: context_tokens {contexts} fall; a stage may not be shorter than the one before it")


def _longest_last(context: Any) -> float:
    return float("inf") if context is None else context


def check_supervised_model(c: SupervisedConfig, model: ModelConfig) -> None:
    """The rules that need the model's shape."""
    check_shape(c.training, model)
    for stage in c.stages:
        if (stage.context_tokens or 0) > model.max_positions:
            raise ConfigError(
                f"context_tokens={stage.context_tokens}: more than the model's context of {model.max_positions}; lower it"
            )
