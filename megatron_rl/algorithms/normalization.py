"""What one sequence weighs in the loss: the denominators that published objectives divide by. A pure function.

It needs whole groups and all groups of an optimizer step, so it runs before packing; the trainer only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Normalization(StrEnum):
    """Groups count the same in all but the last; G groups, k members, T loss tokens of a sequence."""

    SEQUENCE = "sequence"  # 1 / (G k): the sum over a response (k1.5, equation 3)
    RESPONSE_TOKENS = "response_tokens"  # 1 / (G k T): the mean over each response (GRPO)
    CONSTANT = "constant"  # 1 / (G k L), L the longest response allowed: no bias to short or long ones (Dr. GRPO)
    GROUP_TOKENS = "group_tokens"  # 1 / (G sum of the group's T): the mean over a group's tokens (K2.5)
    BATCH_TOKENS = "batch_tokens"  # 1 / (sum of all T): the mean over the step's tokens (DAPO, CISPO)


def sequence_weights(num_tokens: Sequence[Sequence[int]], normalization: Normalization, *, max_tokens: int) -> list[float]:
    """One weight a sequence, flat, in order. num_tokens: loss tokens of each member of each group of one optimizer step."""
    num_groups, total = len(num_tokens), max(1, sum(map(sum, num_tokens)))
    weights = []
    for members in num_tokens:
        in_group = max(1, sum(members))
        for tokens in members:
            one_of_all = 1 / (num_groups * len(members))
            weights.append(
                {
                    Normalization.SEQUENCE: one_of_all,
                    Normalization.RESPONSE_TOKENS: one_of_all / max(1, tokens),
                    Normalization.CONSTANT: one_of_all / max_tokens,
                    Normalization.GROUP_TOKENS: 1 / (num_groups * in_group),
                    Normalization.BATCH_TOKENS: 1 / total,
                }[normalization]
            )
    return weights
