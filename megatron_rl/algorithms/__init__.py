"""Algorithms as pure functions of tensors: advantages over whole groups, a denominator, an objective per micro-batch.

Each published one is a file here with its formula, its source and `algorithm(config) -> Algorithm`. Adding one is such a file
and a line in `ALGORITHMS`. This module imports no tensors, so that settings are checked at once. Next: `objective.py`, then
`mirror_descent.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.algorithms.objective import Algorithm
    from megatron_rl.config import AlgorithmConfig

BOUNDS = ("clip_low", "clip_high")
ALGORITHMS: dict[str, tuple[str, ...]] = {  # file -> the settings of `algorithm` it reads that not all do
    "mirror_descent": ("baseline", "level", "importance_cap"),
    "k2": ("baseline", "importance_cap"),
    "k25": BOUNDS,
    "rest": ("rest_threshold", "importance_cap"),
    "rloo": ("importance_cap",),
    "ppo": (*BOUNDS, "importance_cap"),
    "grpo": (*BOUNDS, "importance_cap"),
    "dr_grpo": (*BOUNDS, "importance_cap"),
    "reinforce_pp": (*BOUNDS, "importance_cap"),
    "gspo": (*BOUNDS, "importance_cap"),
    "cispo": (*BOUNDS, "importance_cap"),
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` asks for, with the correction and the terms that are on.

    Raises ConfigError for a value that the algorithm cannot use."""
    from megatron_rl.algorithms.cross_entropy import WithPTX
    from megatron_rl.algorithms.importance import TruncatedImportance
    from megatron_rl.algorithms.objective import Algorithm
    from megatron_rl.algorithms.regularized import Regularized

    assert config.name in ALGORITHMS, f"{config.name}: the configuration refuses it"
    made: Algorithm = import_module(f"{__name__}.{config.name}").algorithm(config)
    objective = made.objective
    if config.importance_cap is not None:
        objective = TruncatedImportance(objective, config.importance_cap)
    if config.kl_weight or config.entropy_weight:
        objective = Regularized(objective, config.kl_weight, config.kl_estimator, config.entropy_weight)
    if config.ptx.weight:
        objective = WithPTX(objective)
    return Algorithm(made.advantages, made.normalization, objective)
