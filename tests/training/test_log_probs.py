"""Chunked log-probs against log_softmax and autograd over the whole [tokens, vocabulary]."""

import pytest
import torch

from megatron_rl.training.log_probs import Vocabulary, log_probs_and_entropy


@pytest.mark.parametrize("chunk_rows", [1, 7, 23, 1000])
@pytest.mark.parametrize("padding", [0, 5])
def test_values_and_gradients_equal_log_softmax(chunk_rows, padding):
    torch.manual_seed(0)
    n, size = 23, 50
    temperatures = torch.rand(n, dtype=torch.float64) + 0.5
    hidden = torch.randn(n, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(size + padding, 16, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, size, (n,)), torch.randn(n, dtype=torch.float64)
    ours, entropy = log_probs_and_entropy(hidden, weight, targets, temperatures, Vocabulary(size, None), chunk_rows)
    whole = torch.log_softmax(hidden @ weight[:size].T / temperatures[:, None], -1)
    expected = whole.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1), rtol=0, atol=1e-12)
    assert not entropy.requires_grad
    found = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert found[1][size:].count_nonzero() == 0


def test_bfloat16_hidden_states_get_a_float32_softmax():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 16).bfloat16(), torch.randn(300, 16).bfloat16(), torch.randint(0, 300, (9,))
    ours, _ = log_probs_and_entropy(hidden, weight, targets, torch.ones(9), Vocabulary(300, None), 4)
    expected = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_no_rows_give_zero_gradients_not_none():
    hidden, weight = torch.randn(0, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    ours, entropy = log_probs_and_entropy(
        hidden, weight, torch.zeros(0, dtype=torch.long), torch.ones(0), Vocabulary(30, None), 4
    )
    ours.sum().backward()
    assert ours.shape == entropy.shape == (0,) and weight.grad.count_nonzero() == 0 and hidden.grad.shape == (0, 16)


def test_huge_logits_stay_finite():
    hidden, weight = torch.full((2, 4), 1e4), torch.eye(4)[[0, 1, 2, 3, 0]] * torch.tensor([1, -1, 0.5, 1, 1])[:, None]
    ours, entropy = log_probs_and_entropy(hidden, weight, torch.tensor([1, 0]), torch.ones(2), Vocabulary(5, None), 4)
    assert torch.isfinite(ours).all() and torch.isfinite(entropy).all()
