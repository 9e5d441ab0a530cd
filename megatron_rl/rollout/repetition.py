"""Finds a response that has begun to repeat itself (paper 2.6.2), token by token, exactly.

The work is done in csrc/repetition/; the limits are checked here. What happens to such a response is decided in `scheduler.py`;
what it costs, in the rewards.
"""

from __future__ import annotations

from megatron_rl.errors import ConfigError
from megatron_rl.kernels.build import state

MAX_WINDOW = 2**31 - 1  # run lengths are int32


class RepetitionDetector(state.RepetitionDetector):
    """Fires where, for some p in 1..max_period and some r >= min_repeats with p * r >= min_tokens, the last p * r tokens
    are r copies of one block of length p.

    `push(token)` says whether the tokens so far end in a repetition. `push_many(token_ids)`, int32 [tokens], pushes until it
    fires and returns the index of that token, or None. `window`: the tokens that decide whether it fires; a new detector given
    the last `window` ones goes on like this one. A push costs a few steps for each of the last max_period tokens that equals
    the new one, at most one pass of vector code over all periods."""

    def __init__(self, max_period: int, min_repeats: int, min_tokens: int = 64) -> None:
        """Raises ConfigError for limits without a meaning."""
        found = f"rollout.repetition: max_period={max_period}, min_repeats={min_repeats}, min_tokens={min_tokens}"
        if max_period < 1 or min_repeats < 2 or min_tokens < 1:
            raise ConfigError(f"{found}: must be at least 1, 2 and 1")
        if max_period * min_repeats + max_period + min_tokens > MAX_WINDOW:
            raise ConfigError(f"{found}: a repetition of that many tokens is never met; lower them below 2**31 tokens in all")
        super().__init__(max_period, min_repeats, min_tokens)
