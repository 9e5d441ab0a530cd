"""The embedded engine: generation in plain torch, on a CPU or one GPU, in the trainer's own process.

Reading order: `engine.py` (protocol and thread), `runner.py` (one step), `scheduler.py` (who runs when, on which
pages), `model.py`, `kv_cache.py`, `linear.py` (the forward pass), `sampling.py`, `weights.py`, `snapshots.py`.
"""

from megatron_rl.rollout.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
