"""The sampling temperature of an iteration: constant, or falling from exploration to exploitation (K2, arXiv 2507.20534, 3.2).

K2 decays it over training and gives no numbers; the linear form is ours. A segment keeps the temperature it was sampled at, and a
trajectory may hold several: the trainer computes every log-prob, current and reference, at its own token's temperature
(`training/log_probs.py`), so that a token's log-ratio compares what the two weights would do where it was drawn.
"""

from __future__ import annotations

from megatron_rl.config import RolloutConfig


def temperature(config: RolloutConfig, iteration: int) -> float:
    """`rollout.temperature` in iteration 0, `temperature_decay.end` from `temperature_decay.iterations` on."""
    decay = config.temperature_decay
    if decay.end is None:
        return config.temperature
    passed = min(1.0, iteration / decay.iterations)
    return config.temperature + (decay.end - config.temperature) * passed
