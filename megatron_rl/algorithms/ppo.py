"""PPO-clip (arXiv 1707.06347, equation 7), its bounds apart as in DAPO (arXiv 2503.14476): the mean over the step's tokens of

    -min( ratio_t A_j, clip(ratio_t, 1 - low, 1 + high) A_j ),     ratio_t = pi(y_t) / pi_i(y_t),     A_j = r_j - mean(group).

With `algorithm.importance_cap` behaviour and proximal policy are apart (`importance.py`). Departure: no value network.
"""

from __future__ import annotations

from megatron_rl.algorithms.advantages import centred
from megatron_rl.algorithms.clipped_ratio import ClippedRatio, ratio_bounds
from megatron_rl.algorithms.normalization import Normalization
from megatron_rl.algorithms.objective import Algorithm
from megatron_rl.config import AlgorithmConfig


def algorithm(config: AlgorithmConfig) -> Algorithm:
    return Algorithm(centred, Normalization.BATCH_TOKENS, ClippedRatio(*ratio_bounds(config, 0.2, 0.2)))
