"""Objectives and baselines as pure functions of tensors. Next: `mirror_descent.py`."""

from megatron_rl.algorithms.mirror_descent import MirrorDescent, advantages, mirror_descent
from megatron_rl.algorithms.objective import Objective, ObjectiveInputs

__all__ = ["MirrorDescent", "Objective", "ObjectiveInputs", "advantages", "mirror_descent"]
