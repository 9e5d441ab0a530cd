"""Rewards: rule-based terms, their composition under deadlines, and the length reward. Next: `terms.py`, `scorer.py`.

Refuses to turn our own failure into a reward: a term that fails twice is reported as failed, never as 0.
Light on purpose: worker processes import this package, so nothing here imports torch or Megatron-Core.
"""

from megatron_rl.rewards.length import length_rewards

__all__ = ["length_rewards"]
