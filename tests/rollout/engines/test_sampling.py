"""Noise and truncation of the embedded engine's sampler against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.rollout.engines.base import Sampling
from megatron_rl.rollout.engines.embedded.sampling import BLOCK, Draw, perturbed, sample


def logits_of(seed: int, rows: int, vocabulary: int, spread: float) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    vocabulary=st.integers(1, 5 * BLOCK),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    data=st.data(),
)
def test_pruned_search_finds_the_largest_perturbed_logit(seed, vocabulary, spread, data):
    logits = logits_of(seed % 1000, 6, vocabulary, spread)
    temperatures = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=6, max_size=6))
    draws = [Draw(Sampling(temperature=t, seed=seed), 10 + i, 7 * i) for i, t in enumerate(temperatures)]
    tokens, log_probs = sample(logits, draws)
    for row, draw, token, log_prob in zip(logits, draws, tokens, log_probs, strict=True):
        expected = (row / draw.sampling.temperature).log_softmax(0)
        assert token == perturbed(expected, draw).argmax()
        assert log_prob == pytest.approx(expected[token].item(), abs=1e-6)


def test_a_row_draws_the_same_token_in_any_batch():
    logits = logits_of(0, 12, 500, 2.0)
    draws = [Draw(Sampling(temperature=(0.0, 0.7, 1.0)[i % 3], seed=i % 2), i, 40 - i) for i in range(12)]
    together = sample(logits, draws)[0]
    order = np.random.default_rng(0).permutation(12)
    shuffled = sample(logits[torch.from_numpy(order)], [draws[i] for i in order])[0]
    alone = [sample(logits[i : i + 1], [draws[i]])[0][0] for i in range(12)]
    assert shuffled.tolist() == together[order].tolist()
    assert alone == together.tolist()


def test_seed_trajectory_and_position_each_change_the_draws():
    logits = torch.zeros(200, 1000)

    def drawn(make):
        return sample(logits, [make(i) for i in range(200)])[0]

    one = drawn(lambda i: Draw(Sampling(seed=1), 5, i))
    for other in (lambda i: Draw(Sampling(seed=2), 5, i), lambda i: Draw(Sampling(seed=1), 6, i)):
        assert (one == drawn(other)).sum() < 10
    assert len(set(one.tolist())) > 150


@pytest.mark.parametrize("axis", ["position", "trajectory", "seed"])
def test_frequencies_follow_the_softmax(axis):
    """Chi-square over a vocabulary of more than two blocks, counters running along one argument."""
    vocabulary, num_draws = 2 * BLOCK + 9, 12_000
    log_probs = logits_of(3, 1, vocabulary, 1.0).log_softmax(-1)
    make = {
        "position": lambda i: Draw(Sampling(seed=11), 3, i),
        "trajectory": lambda i: Draw(Sampling(seed=11), i, 3),
        "seed": lambda i: Draw(Sampling(seed=i), 11, 3),
    }[axis]
    tokens, _ = sample(log_probs.expand(num_draws, -1), [make(i) for i in range(num_draws)])
    expected = log_probs[0].double().exp().numpy() * num_draws
    counts = np.bincount(tokens, minlength=vocabulary)
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = vocabulary - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_noise_is_gumbel_and_independent_within_a_block():
    """Moments of the standard Gumbel distribution, and no correlation between neighbours, for all tokens of three blocks."""
    noise = torch.stack([perturbed(torch.zeros(3 * BLOCK), Draw(Sampling(seed=5), 8, i)) for i in range(2000)]).numpy()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.04
    correlation = np.corrcoef(noise.T)
    off_diagonal = correlation[~np.eye(3 * BLOCK, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5.5 / math.sqrt(2000)


def plainly_truncated(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """The tokens top-k, then top-p, then min-p leave in, in sorted Python."""
    probabilities = np.exp(logits / sampling.temperature - np.logaddexp.reduce(logits / sampling.temperature))
    order = sorted(range(len(logits)), key=lambda i: (-probabilities[i], i))
    kept = order[: sampling.top_k] if sampling.top_k else list(order)
    total, reached, nucleus = sum(probabilities[i] for i in kept), 0.0, []
    for i in kept:
        if reached < sampling.top_p or sampling.top_p == 1:
            nucleus.append(i)
        reached += probabilities[i] / total
    return {i for i in nucleus if probabilities[i] >= sampling.min_p * probabilities[order[0]]}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.77, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.04, 0.3]),
    temperature=st.sampled_from([0.6, 1.0, 1.5]),
)
def test_truncation_keeps_what_the_plain_definition_keeps(seed, top_k, top_p, min_p, temperature):
    logits = logits_of(seed, 1, 40, 2.0)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    allowed = plainly_truncated(logits[0].double().numpy(), sampling)
    draws = [Draw(sampling, 1, position) for position in range(100)]
    tokens, log_probs = sample(logits.expand(100, -1), draws)
    full = (logits[0] / temperature).log_softmax(0)
    assert set(tokens.tolist()) <= allowed
    assert np.allclose(log_probs, full[torch.from_numpy(tokens).long()].numpy(), atol=1e-6)
    untruncated = [int(perturbed(full, draw).argmax()) for draw in draws]
    assert [t for t in untruncated if t in allowed] == [t for t, u in zip(tokens, untruncated, strict=True) if u in allowed]


def test_zero_temperature_takes_the_best_token_and_its_log_prob_at_temperature_one():
    logits = logits_of(1, 5, 200, 3.0)
    tokens, log_probs = sample(logits, [Draw(Sampling(temperature=0, seed=i), i, i) for i in range(5)])
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert np.allclose(log_probs, logits.log_softmax(-1).amax(-1).numpy(), atol=1e-6)
