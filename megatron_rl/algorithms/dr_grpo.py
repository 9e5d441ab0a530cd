"""Dr. GRPO (arXiv 2503.20783): GRPO (`grpo.py`) without its two biases, to easy and hard questions and to short responses,

A_j = r_j - mean(group),     the sum over a response's tokens over a constant, the longest response allowed.
"""

from __future__ import annotations

from megatron_rl.algorithms.advantages import centred
from megatron_rl.algorithms.clipped_ratio import ClippedRatio, ratio_bounds
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm
from megatron_rl.config import AlgorithmConfig


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(centred, Normalization.CONSTANT, ClippedRatio(*ratio_bounds(config, 0.2, 0.2)))
