"""Algorithms as pure functions of tensors: advantages over whole groups, a denominator, an objective per micro-batch.

Adding one is a file with its objective, a line in `ALGORITHMS` and its name among the choices of `algorithm.name`.
Next: `objective.py`, then `mirror_descent.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron_rl.algorithms.advantages import best_only, centred, leave_one_out, standardized, whitened
from megatron_rl.algorithms.cispo import ClippedWeight
from megatron_rl.algorithms.clipped_ratio import ClippedRatio
from megatron_rl.algorithms.cross_entropy import CrossEntropy, WithPTX
from megatron_rl.algorithms.dpo import DPO
from megatron_rl.algorithms.gspo import SequenceRatio
from megatron_rl.algorithms.importance import TruncatedImportance
from megatron_rl.algorithms.masked_ratio import MaskedRatio
from megatron_rl.algorithms.mirror_descent import MirrorDescent, advantages, mirror_descent
from megatron_rl.algorithms.normalization import Normalization, sequence_weights
from megatron_rl.algorithms.objective import Algorithm, MeasuredObjective, Objective, ObjectiveInputs
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.algorithms.regularized import Regularized
from megatron_rl.algorithms.silence import silent_without_advantage
from megatron_rl.algorithms.squared_residual import SquaredResidual
from megatron_rl.config import AlgorithmConfig

N = Normalization
ALGORITHMS: dict[str, Callable[[AlgorithmConfig], Algorithm]] = {
    "mirror_descent": lambda c: Algorithm(_baseline(c), N.SEQUENCE, MirrorDescent(c.tau, c.level)),
    "k2": lambda c: Algorithm(_baseline(c), N.SEQUENCE, SquaredResidual(c.tau)),
    "k25": lambda c: Algorithm(centred, N.GROUP_TOKENS, MaskedRatio(c.tau, -_low(c, 1.0), _high(c, 1.0))),
    "rest": lambda c: Algorithm(partial(best_only, threshold=c.rest_threshold), N.SEQUENCE, PolicyGradient()),
    "rloo": lambda c: Algorithm(leave_one_out, N.SEQUENCE, PolicyGradient()),
    "ppo": lambda c: Algorithm(centred, N.BATCH_TOKENS, ClippedRatio(_low(c, 0.2), _high(c, 0.2))),
    "grpo": lambda c: Algorithm(standardized, N.RESPONSE_TOKENS, ClippedRatio(_low(c, 0.2), _high(c, 0.2))),
    "dr_grpo": lambda c: Algorithm(centred, N.CONSTANT, ClippedRatio(_low(c, 0.2), _high(c, 0.2))),
    "reinforce_pp": lambda c: Algorithm(whitened, N.BATCH_TOKENS, ClippedRatio(_low(c, 0.2), _high(c, 0.2))),
    "gspo": lambda c: Algorithm(standardized, N.RESPONSE_TOKENS, SequenceRatio(_low(c, 3e-4), _high(c, 4e-4))),
    "cispo": lambda c: Algorithm(standardized, N.BATCH_TOKENS, ClippedWeight(_low(c, 1.0), _high(c, 0.2))),
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` asks for, with the correction and the terms that are on."""
    made = ALGORITHMS[config.name](config)
    objective = made.objective
    if config.importance_cap is not None:
        objective = TruncatedImportance(objective, config.importance_cap)
    if config.kl_weight or config.entropy_weight:
        objective = Regularized(objective, config.kl_weight, config.kl_estimator, config.entropy_weight)
    if config.ptx.weight:
        objective = WithPTX(objective)
    return Algorithm(made.advantages, made.normalization, objective)


def _baseline(c: AlgorithmConfig) -> Callable[..., torch.Tensor]:
    return partial(advantages, baseline=c.baseline, tau=c.tau)


def _low(c: AlgorithmConfig, default: float) -> float:
    return default if c.clip_low is None else c.clip_low


def _high(c: AlgorithmConfig, default: float) -> float:
    return default if c.clip_high is None else c.clip_high


__all__ = [
    "ALGORITHMS",
    "DPO",
    "Algorithm",
    "CrossEntropy",
    "MeasuredObjective",
    "MirrorDescent",
    "Normalization",
    "Objective",
    "ObjectiveInputs",
    "WithPTX",
    "advantages",
    "make_algorithm",
    "mirror_descent",
    "sequence_weights",
    "silent_without_advantage",
]
