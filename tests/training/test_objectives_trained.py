"""Objectives other than mirror descent, two steps of the trainer, against the published loss on a dense model and AdamW."""

import dataclasses

import pytest
import torch

from megatron_rl.algorithms import make_algorithm
from megatron_rl.config import AlgorithmConfig
from tests.training.material import dense_log_probs, dense_loss, dense_steps, exported, flat, make_config, make_groups, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen3"))


def per_response(model, sequences, reference):
    """(advantage, weight, log-probs, reference, behaviour) of each response that carries loss, its loss tokens only."""
    for s, before in zip(sequences, reference, strict=True):
        mask = torch.from_numpy(s.loss_mask)
        if mask.any():
            now = dense_log_probs(model, s)[mask]
            yield s.advantage, s.weight, now, before[mask], torch.from_numpy(s.behaviour_log_probs)[mask]


def grpo_with_cap(model, sequences, reference, tau):
    total = 0
    for advantage, weight, now, before, behaviour in per_response(model, sequences, reference):
        ratio = (now - before).exp()
        term = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        total = total + weight * (term * (before - behaviour).exp().clamp(max=1.5)).sum()
    return total


def gspo(model, sequences, reference, tau):
    total = 0
    for advantage, weight, now, before, _ in per_response(model, sequences, reference):
        ratio = (now - before).mean().exp()
        total = total - weight * len(now) * torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.2) * advantage)
    return total


def k2(model, sequences, reference, tau):
    total = 0
    for advantage, weight, now, before, _ in per_response(model, sequences, reference):
        total = total + weight * (advantage - tau * (now - before).sum()) ** 2
    return total


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({"name": "grpo", "importance_cap": 1.5}, grpo_with_cap),
        ({"name": "gspo", "clip_low": 0.1, "clip_high": 0.2}, gspo),
        ({"name": "k2", "tau": 0.3}, k2),
    ],
    ids=["grpo", "gspo", "k2"],
)
def test_two_steps_follow_the_published_loss_on_a_dense_model(settings, published, folder, make_trainer):
    config = make_config(folder, training={"max_tokens_per_micro_batch": 25})
    groups = make_groups()
    minibatches = [[dataclasses.replace(s, weight=2 * s.weight) for s in flat(part)] for part in (groups[:2], groups[2:])]
    losses, norms, _, after = dense_steps(folder, minibatches, config, 0.3, published)
    trainer = make_trainer(config)
    batch = trainer.distribute(minibatches)
    metrics = trainer.step(batch, make_algorithm(AlgorithmConfig(**settings)).objective, trainer.log_probs(batch))
    assert metrics["log_ratio/abs_mean"] > 0.01
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    for name, value in exported(trainer).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_steps_with_a_ptx_term_follow_both_losses_on_a_dense_model(folder, make_trainer):
    """Mirror descent on the sampled sequences, cross entropy on the given ones, each with its own denominator."""
    config = make_config(folder, training={"max_tokens_per_micro_batch": 25})
    given = [
        dataclasses.replace(s, is_supervised=True, group_id=-s.trajectory_id - 1, trajectory_id=-s.trajectory_id - 1, weight=0.02)
        for s in flat(make_groups(seed=5, num_groups=2))
    ]
    groups = make_groups()
    minibatches = [
        [*(dataclasses.replace(s, weight=2 * s.weight) for s in flat(part)), *given[i::2]]
        for i, part in enumerate((groups[:2], groups[2:]))
    ]

    def both(model, sequences, reference, tau):
        sampled = [(s, r) for s, r in zip(sequences, reference, strict=True) if not s.is_supervised]
        total = dense_loss(model, [s for s, _ in sampled], [r for _, r in sampled], tau)
        for s in sequences:
            if s.is_supervised:
                total = total - s.weight * dense_log_probs(model, s)[torch.from_numpy(s.loss_mask)].sum()
        return total

    losses, norms, _, after = dense_steps(folder, minibatches, config, 0.3, both)
    trainer = make_trainer(config)
    batch = trainer.distribute(minibatches)
    objective = make_algorithm(AlgorithmConfig(tau=0.3, ptx={"weight": 1.0, "path": "given.jsonl"})).objective
    metrics = trainer.step(batch, objective, trainer.log_probs(batch))
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    assert metrics["supervised/nats_per_token"] > 1
    for name, value in exported(trainer).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")
    plain = trainer.step(trainer.distribute([flat(groups)]), objective, None)
    mixed = trainer.step(trainer.distribute([[*flat(groups), *given]]), objective, None)
    assert "supervised/nats_per_token" not in plain
    assert mixed["log_ratio/abs_mean"] == plain["log_ratio/abs_mean"] == 0
