"""The whole configuration: one YAML file, overrides `a.b=c`, every check that needs no model and no process group.

`load` reads, overrides, validates and freezes. The settings: `sections.py`; the rules between them: `checks.py`.
"""

from megatron_rl.config.checks import check_model, check_world
from megatron_rl.config.loading import dump, iter_settings, known_keys, load
from megatron_rl.config.sections import (
    AlgorithmConfig,
    BufferConfig,
    Config,
    DataConfig,
    EmbeddedConfig,
    EvaluationConfig,
    KVStoreConfig,
    LengthRewardConfig,
    ModelSection,
    OptimizerConfig,
    RepetitionConfig,
    ReportConfig,
    RewardsConfig,
    RewardTerm,
    RolloutConfig,
    RunConfig,
    SamplerConfig,
    SGLangConfig,
    ToggleConfig,
    TokenBudgetConfig,
    TrainingConfig,
    WeightsConfig,
    WorkedTurn,
)

__all__ = [
    "AlgorithmConfig",
    "BufferConfig",
    "Config",
    "DataConfig",
    "EmbeddedConfig",
    "EvaluationConfig",
    "KVStoreConfig",
    "LengthRewardConfig",
    "ModelSection",
    "OptimizerConfig",
    "RepetitionConfig",
    "ReportConfig",
    "RewardTerm",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "SamplerConfig",
    "ToggleConfig",
    "TokenBudgetConfig",
    "TrainingConfig",
    "WeightsConfig",
    "WorkedTurn",
    "check_model",
    "check_world",
    "dump",
    "iter_settings",
    "known_keys",
    "load",
]
