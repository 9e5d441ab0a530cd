"""The length reward of one group (paper 2.3.3): short right answers gain, long answers lose. A pure function."""

from __future__ import annotations

from collections.abc import Sequence


def length_rewards(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """One number in [-0.5, 0.5] for each of the k responses of one problem, to be weighted and added to their rewards.

    lengths [tokens] and correct: [k]. lambda = 0.5 - (length - shortest) / (longest - shortest), where shortest and
    longest are over all k, right or wrong; a right response gets lambda, a wrong one min(0, lambda); equal lengths get 0."""
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if shortest == longest:
        return [0.0 for _ in zip(lengths, correct, strict=True)]
    slopes = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [slope if is_right else min(0.0, slope) for slope, is_right in zip(slopes, correct, strict=True)]
