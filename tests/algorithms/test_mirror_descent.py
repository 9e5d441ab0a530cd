"""Mirror descent against finite differences, against autograd of the paper's squared loss, and in its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms.mirror_descent import MirrorDescent, advantages, mirror_descent
from megatron_rl.algorithms.objective import ObjectiveInputs

LEVELS = ("sequence", "token")
BASELINES = ("mean", "log_z")


def batch(seed: int = 0, *, dtype: torch.dtype = torch.float64):
    """Three groups of 2, 3 and 4 members, unequal lengths, shuffled tokens, about a third of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    group_ids = torch.tensor([5, 5, 0, 0, 0, 9, 9, 9, 9])
    lengths = torch.randint(1, 12, (9,), generator=generator)
    sequence_ids = torch.repeat_interleave(torch.arange(9), lengths)[torch.randperm(int(lengths.sum()), generator=generator)]
    tokens = len(sequence_ids)
    log_probs = -torch.rand(tokens, generator=generator, dtype=dtype) * 3
    reference = log_probs + 0.2 * torch.randn(tokens, generator=generator, dtype=dtype)
    rewards = torch.rand(9, generator=generator, dtype=dtype)
    mask = torch.rand(tokens, generator=generator) > 0.35
    return log_probs.requires_grad_(), reference, sequence_ids, rewards, group_ids, mask


def gradient(loss: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, log_probs)[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_gradient_equals_finite_differences(level, baseline):
    log_probs, reference, sequence_ids, rewards, group_ids, mask = batch()

    def loss(values: torch.Tensor) -> torch.Tensor:
        options = {"tau": 0.7, "baseline": baseline, "level": level, "loss_mask": mask}
        return mirror_descent(values, reference, sequence_ids, rewards, group_ids, **options)[0]

    computed = gradient(loss(log_probs), log_probs)
    step = 1e-5
    for i in range(len(log_probs)):
        up, down = log_probs.detach().clone(), log_probs.detach().clone()
        up[i] += step
        down[i] -= step
        assert computed[i] == pytest.approx(float((loss(up) - loss(down)) / (2 * step)), abs=1e-8)
    assert (computed[~mask] == 0).all() and (computed[mask] != 0).any()


@pytest.mark.parametrize("tau", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_papers_squared_loss_has_the_gradient_times_two_tau(tau, baseline):
    log_probs, reference, sequence_ids, rewards, group_ids, mask = batch(1)
    loss, _ = mirror_descent(log_probs, reference, sequence_ids, rewards, group_ids, tau=tau, baseline=baseline, loss_mask=mask)
    squared = torch.zeros((), dtype=torch.float64)
    for group in group_ids.unique():
        members = (group_ids == group).nonzero().flatten()
        r, k = rewards[members], len(members)
        b = r.mean() if baseline == "mean" else tau * torch.log(torch.exp(r / tau).sum() / k)
        for j, member in enumerate(members):
            own = (sequence_ids == member) & mask
            rho = (log_probs[own] - reference[own]).sum()
            squared = squared + (r[j] - b - tau * rho) ** 2 / k / 3
    torch.testing.assert_close(gradient(squared, log_probs), 2 * tau * gradient(loss, log_probs), rtol=1e-6, atol=1e-8)


def test_equation_3_by_hand():
    # One group, rewards 1 and 0, baseline 1/2. Response 0: two tokens, rho = 0.3; response 1: one token, rho = -0.2.
    log_probs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.1, -2.2, -0.3], dtype=torch.float64)
    loss, metrics = mirror_descent(
        log_probs, reference, torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([4, 4]), tau=0.4
    )
    # (1/2) [ -0.5 * -3 + 0.2 * 0.09 ] + (1/2) [ 0.5 * -0.5 + 0.2 * 0.04 ]
    assert loss.item() == pytest.approx(0.5 * (1.5 + 0.018) + 0.5 * (-0.25 + 0.008))
    # -(1/2) (A - tau rho)
    assert gradient(loss, log_probs).tolist() == pytest.approx([-0.19, -0.19, 0.21])
    assert metrics["log_ratio/abs_max"] == pytest.approx(0.3) and metrics["log_ratio/mean"] == pytest.approx(0.05)


@pytest.mark.parametrize("level", LEVELS)
def test_tau_has_no_effect_while_the_policy_is_the_reference(level):
    log_probs, _, sequence_ids, rewards, group_ids, mask = batch(2)
    gradients = []
    for tau in (1e-3, 1.0, 1e3):
        options = {"tau": tau, "level": level, "loss_mask": mask}
        loss, _ = mirror_descent(log_probs, log_probs.detach(), sequence_ids, rewards, group_ids, **options)
        gradients.append(gradient(loss, log_probs))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])
    moved, _ = mirror_descent(log_probs, log_probs.detach() - 0.1, sequence_ids, rewards, group_ids, tau=1.0, loss_mask=mask)
    assert not torch.allclose(gradient(moved, log_probs), gradients[0])


def test_equal_rewards_leave_only_the_pull_to_the_reference():
    log_probs, reference, sequence_ids, _, group_ids, _ = batch(3)
    same = torch.full((9,), 0.5)
    at_reference, _ = mirror_descent(log_probs, log_probs.detach(), sequence_ids, same, group_ids, tau=0.5)
    assert (gradient(at_reference, log_probs) == 0).all()
    away, _ = mirror_descent(log_probs, reference, sequence_ids, same, group_ids, tau=0.5)
    assert (gradient(away, log_probs) != 0).any()


def test_levels_agree_on_one_token_responses_and_differ_on_longer_ones():
    log_probs, reference = batch(4)[:2]
    one = {"rewards": torch.tensor([1.0, 0.0]), "group_ids": torch.tensor([0, 0]), "tau": 0.5}
    two_tokens = torch.arange(2)
    losses = [mirror_descent(log_probs[:2], reference[:2], two_tokens, level=level, **one)[0] for level in LEVELS]
    assert losses[0].item() == losses[1].item()
    four_tokens = torch.tensor([0, 0, 1, 1])
    losses = [mirror_descent(log_probs[:4], reference[:4], four_tokens, level=level, **one)[0] for level in LEVELS]
    assert losses[0].item() != pytest.approx(losses[1].item())


def test_every_group_weighs_the_same_whatever_its_size():
    log_probs, reference, sequence_ids, rewards, group_ids, mask = batch(5)
    whole, _ = mirror_descent(log_probs, reference, sequence_ids, rewards, group_ids, tau=0.3, loss_mask=mask)
    parts = []
    for group in group_ids.unique():
        members = (group_ids == group).nonzero().flatten()
        own = torch.isin(sequence_ids, members)
        local = torch.searchsorted(members, sequence_ids[own])
        part = (log_probs[own], reference[own], local, rewards[members], group_ids[members])
        parts.append(mirror_descent(*part, tau=0.3, loss_mask=mask[own])[0])
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_trainers_objective_equals_the_reference(level, baseline):
    """Coefficients and loss terms over loss tokens only, as the trainer hands them in, from two micro-batches."""
    log_probs, reference, sequence_ids, rewards, group_ids, mask = batch(6)
    tau = 0.6
    options = {"tau": tau, "baseline": baseline, "level": level, "loss_mask": mask}
    loss, _ = mirror_descent(log_probs, reference, sequence_ids, rewards, group_ids, **options)
    expected = gradient(loss, log_probs)
    values, advantage = log_probs.detach(), advantages(rewards, group_ids, baseline=baseline, tau=tau)
    ratios = torch.zeros(9, dtype=torch.float64).index_add(0, sequence_ids[mask], (values - reference)[mask])
    weights = torch.tensor([1 / (int((group_ids == group).sum()) * 3) for group in group_ids], dtype=torch.float64)
    objective = MirrorDescent(tau=tau, level=level)
    total, computed = 0.0, torch.zeros_like(values)
    for sequences in (torch.tensor([0, 2, 4, 6, 8]), torch.tensor([1, 3, 5, 7])):  # every group is split
        rows = (torch.isin(sequence_ids, sequences) & mask).nonzero().flatten()
        inputs = ObjectiveInputs(
            log_probs=values[rows],
            reference_log_probs=reference[rows],
            behaviour_log_probs=values[rows],
            entropies=torch.zeros(len(rows), dtype=torch.float64),
            sequence_ids=torch.searchsorted(sequences, sequence_ids[rows]),
            log_ratios=ratios[sequences],
            num_tokens=torch.bincount(sequence_ids[mask], minlength=9)[sequences],
            advantages=advantage[sequences],
            weights=weights[sequences],
            group_ids=group_ids[sequences],
            is_supervised=torch.zeros(len(sequences), dtype=torch.bool),
        )
        total += objective.loss(inputs).sum().item()
        computed[rows] = -inputs.weights[inputs.sequence_ids] * objective.coefficients(inputs)
    torch.testing.assert_close(computed, expected)
    assert total == pytest.approx(loss.item())


def test_log_z_lies_between_its_limits_mean_and_maximum():
    rewards, one_group = torch.tensor([0.0, 0.0, 1.0, 0.5]), torch.zeros(4, dtype=torch.int64)

    def baseline(tau: float) -> float:
        return float((rewards - advantages(rewards, one_group, baseline="log_z", tau=tau))[0])

    assert baseline(1e6) == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert baseline(1e-4) == pytest.approx(1.0, abs=1e-3)  # exp(1 / tau) alone would overflow
    assert baseline(0.5) == pytest.approx(0.5 * math.log((2 + math.e**2 + math.e) / 4), abs=1e-6)
    assert baseline(1e6) < baseline(1.0) < baseline(0.1) < baseline(1e-4)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2)), min_size=1, max_size=12), st.floats(0.01, 100))
def test_advantages_by_a_plain_loop(members, tau):
    groups, rewards = [group for group, _ in members], [reward for _, reward in members]
    for baseline in BASELINES:
        computed = advantages(torch.tensor(rewards), torch.tensor(groups), baseline=baseline, tau=tau)
        assert computed.dtype == torch.float32
        for i, group in enumerate(groups):
            own = [reward for g, reward in members if g == group]
            top = max(own)
            log_z = top + tau * math.log(sum(math.exp((reward - top) / tau) for reward in own) / len(own))
            b = sum(own) / len(own) if baseline == "mean" else log_z
            assert computed[i].item() == pytest.approx(rewards[i] - b, abs=2e-5)
