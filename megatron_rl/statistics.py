"""What several responses to each of many prompts say: pass@k, majority vote, and how sure that is. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

from megatron_rl.rewards.exact import answer_after, normalised

BOOTSTRAP_DRAWS = 10_000


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that k of the n samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k).

    Unbiased for the chance that k fresh samples do (Chen et al., arXiv 2107.03374). 1 <= k <= n."""
    assert 1 <= k <= num_samples, "pass@k needs at least k samples"
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def final_answer(response: str, prefix: str | None = None) -> str | None:
    """What a vote counts: the last \\boxed{...}, else what follows the last `prefix`, else the last line; normalised.

    None where there is nothing."""
    start = response.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for i in range(begin - 1, len(response)):
            depth += {"{": 1, "}": -1}.get(response[i], 0)
            if depth == 0:
                return normalised(response[begin:i]) or None
        return None  # cut within the box
    if prefix is not None:
        found = answer_after(response, prefix)
        return normalised(found) if found else None
    lines = [line for line in response.splitlines() if line.strip()]
    return normalised(lines[-1]) if lines else None


def majority_is_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """maj@k of one prompt: whether the answer given most often is right; the earliest wins a tie. Responses without an
    answer have no vote. Of equal answers that were judged differently, the first counts."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # in order of first appearance
    return correct[list(answers).index(winner)]


def bootstrap_interval(values: np.ndarray, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [prompts], resampling prompts with replacement."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, (min(100, BOOTSTRAP_DRAWS), len(values))).mean(axis=1) for _ in range(BOOTSTRAP_DRAWS // 100)]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
