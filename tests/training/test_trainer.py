"""One rank's trainer against a dense computation with transformers, `algorithms.mirror_descent` and torch's AdamW."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.errors import MegatronRLError
from megatron_rl.rollout.selection import with_advantage
from megatron_rl.weights import hf
from tests.training.material import dense_log_probs, dense_steps, exported, flat, gradients, make_config, make_groups, make_model

TAU = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen3"))


def halves(groups):
    """Two optimizer steps; a step's weights hold its own number of groups."""
    return [[dataclasses.replace(s, weight=2 * s.weight) for s in flat(part)] for part in (groups[:2], groups[2:])]


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_two_steps_equal_mirror_descent_on_a_dense_model(family, tied, tmp_path, make_trainer):
    folder = make_model(tmp_path, family, tied=tied)
    config = make_config(folder, training={"max_tokens_per_micro_batch": 25})
    minibatches = halves(make_groups())
    losses, norms, _, after = dense_steps(folder, minibatches, config, TAU)
    trainer = make_trainer(config)
    batch = trainer.distribute(minibatches)
    assert all(len(packs) > 1 for packs in batch.minibatches)
    metrics = trainer.step(batch, MirrorDescent(TAU), trainer.log_probs(batch))
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert metrics["log_ratio/abs_mean"] > 0.01, "tau must act in the second step for this test to mean anything"
    found = exported(trainer)
    assert set(found) == set(after)
    for name, value in after.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_equal_a_dense_models(folder, make_trainer):
    config = make_config(folder, training={"max_tokens_per_micro_batch": 25})
    sequences = flat(make_groups())
    _, _, wanted, _ = dense_steps(folder, [sequences], config, TAU)
    trainer = make_trainer(config)
    trainer.step(trainer.distribute([sequences]), MirrorDescent(TAU), None)
    found = gradients(trainer)
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, value in wanted.items():  # what is left after the step is the clipped gradient
        torch.testing.assert_close(
            found[name], value / norm.clamp(min=1), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("all_level", [False, True])
def test_leaving_out_what_has_no_advantage_changes_no_gradient(all_level, folder, make_trainer):
    level = [dataclasses.replace(s, advantage=0.0) if all_level or s.group_id % 2 else s for s in flat(make_groups())]
    kept = with_advantage(level)
    assert 0 < len(kept) < len(level)
    outcomes = []
    for sequences in (level, kept):
        trainer = make_trainer(make_config(folder, training={"max_tokens_per_micro_batch": 25}))
        metrics = trainer.step(trainer.distribute([sequences]), MirrorDescent(TAU), None)
        outcomes.append((metrics, gradients(trainer)))
    (whole, wanted), (less, found) = outcomes
    assert less["tokens/trained"] < whole["tokens/trained"]
    assert less["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5) and (whole["grad_norm"] > 0) != all_level
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_log_probs_are_those_of_the_dense_model(folder, make_trainer):
    config = make_config(folder, training={"max_tokens_per_micro_batch": 40})
    sequences = flat(make_groups(longest=30))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = make_trainer(config)
    batch = trainer.distribute([sequences])
    seen = 0
    for pack, found in zip(batch.minibatches[0], trainer.log_probs(batch)[0], strict=True):
        for i, trajectory in enumerate(pack.trajectory_ids):
            own = sequences[trajectory]
            with torch.no_grad():
                expected = dense_log_probs(model, own)[torch.from_numpy(own.loss_mask)]
            torch.testing.assert_close(found[torch.from_numpy(pack.sequence_ids) == i], expected, rtol=0, atol=1e-5)
            seen += len(expected)
    assert seen == sum(int(s.loss_mask.sum()) for s in sequences) == batch.num_trained_tokens


@pytest.mark.parametrize(
    "training",
    [
        {"max_tokens_per_micro_batch": 1},
        {"max_tokens_per_micro_batch": 30},
        {"share_prompts": False},
        {"recompute": True},
        {"log_prob_chunk": 1},
        {"distributed_optimizer": True, "max_tokens_per_micro_batch": 50},
    ],
)
def test_how_the_work_is_cut_changes_nothing(training, folder, make_trainer):
    minibatches = halves(make_groups())
    outcomes = []
    for settings in ({"max_tokens_per_micro_batch": 4096}, training):
        trainer = make_trainer(make_config(folder, training=settings))
        batch = trainer.distribute(minibatches)
        metrics = trainer.step(batch, MirrorDescent(TAU), trainer.log_probs(batch))
        outcomes.append((metrics, exported(trainer)))
    (whole, weights), (cut, cut_weights) = outcomes
    for key in ("loss", "grad_norm", "entropy/mean", "log_ratio/abs_mean", "mismatch/logp_abs_mean", "drift/logp_abs_mean"):
        assert cut[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
    assert cut["tokens/trained"] == whole["tokens/trained"]
    for name, value in weights.items():
        torch.testing.assert_close(cut_weights[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_epochs_train_the_same_minibatches_again(folder, make_trainer):
    minibatches = halves(make_groups())
    once = make_trainer(make_config(folder))
    batch = once.distribute(minibatches)
    reference = once.log_probs(batch)
    once.step(batch, MirrorDescent(TAU), reference, epochs=2)
    spelled_out = make_trainer(make_config(folder))
    batch = spelled_out.distribute([*minibatches, *minibatches])
    spelled_out.step(batch, MirrorDescent(TAU), spelled_out.log_probs(batch))
    for (name, a), b in zip(exported(once).items(), exported(spelled_out).values(), strict=True):
        assert torch.equal(a, b), name


def test_an_iteration_starts_from_an_optimizer_without_a_past(folder, make_trainer):
    """Same weights, other past: the first step of a used trainer equals a fresh one's; without the reset it would not."""
    config = make_config(folder)
    first, second = flat(make_groups(seed=1)), flat(make_groups(seed=2))
    used, fresh = make_trainer(config), make_trainer(config)
    used.step(used.distribute([first]), MirrorDescent(TAU), None)
    assert used.optimizer.moments == []
    used.load_hf(folder)
    used.step(used.distribute([second]), MirrorDescent(TAU), None)
    fresh.step(fresh.distribute([second]), MirrorDescent(TAU), None)
    for (name, a), b in zip(exported(used).items(), exported(fresh).values(), strict=True):
        assert torch.equal(a, b), name
    for group in used.optimizer._adam.param_groups:
        group["step"] = 7  # where apex and TransformerEngine count
    used.optimizer.reset()
    assert used.optimizer.moments == []
    assert all("step" not in group for group in used.optimizer._adam.param_groups)


def test_bfloat16_keeps_float32_main_weights_and_follows_the_float32_loss(folder, make_trainer):
    sequences = flat(make_groups())
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(make_config(folder, dtype=dtype, training={"optimizer": {"lr": 1e-5}}))
        before = {n: trainer.optimizer.main_weight(p).clone() for n, p in trainer.chunks[0].named_parameters()}
        metrics = trainer.step(trainer.distribute([sequences]), MirrorDescent(TAU), None)
        losses[dtype] = metrics["loss"]
    moved = [(trainer.optimizer.main_weight(p) - before[n]).abs().max() for n, p in trainer.chunks[0].named_parameters()]
    assert all(0 < m < 2e-5 for m in moved), "steps far below bfloat16's resolution must not be lost"
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)


@pytest.mark.parametrize("sharded", [False, True])
def test_main_weights_can_be_set_and_read_back(sharded, folder, make_trainer):
    trainer = make_trainer(make_config(folder, dtype="bfloat16", training={"distributed_optimizer": sharded}))
    for parameter in trainer.chunks[0].parameters():
        value = torch.randn(parameter.shape)
        trainer.optimizer.set_main_weight(parameter, value)
        assert torch.equal(trainer.optimizer.main_weight(parameter), value)
        assert torch.equal(parameter, value.bfloat16())


def test_mismatch_counts_tokens_of_the_newest_version_and_drift_the_older(folder, make_trainer):
    groups = make_groups()
    trainer = make_trainer(make_config(folder))
    batch = trainer.distribute([flat(groups)])
    exact = {}
    for pack, found in zip(batch.minibatches[0], trainer.log_probs(batch)[0], strict=True):
        for i, target in enumerate(found.tolist()):
            exact.setdefault(int(pack.trajectory_ids[pack.sequence_ids[i]]), []).append(target)

    def told(s):
        log_probs = s.behaviour_log_probs.copy()
        log_probs[s.loss_mask] = exact.get(s.trajectory_id, [])
        return dataclasses.replace(
            s, behaviour_log_probs=log_probs + np.where(s.weight_versions == 4, 0.25, -2.0).astype(np.float32)
        )

    shifted = [told(s) for s in flat(groups)]
    metrics = trainer.step(trainer.distribute([shifted]), MirrorDescent(TAU), None)
    assert metrics["mismatch/logp_abs_mean"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["drift/logp_abs_mean"] == pytest.approx(2.0, abs=1e-5)


def test_a_loss_that_is_not_finite_names_its_trajectories_and_changes_nothing(folder, make_trainer):
    trainer = make_trainer(make_config(folder, training={"max_tokens_per_micro_batch": 30}))
    sequences = flat(make_groups())
    guilty = next(s for s in sequences if s.loss_mask.any())
    poisoned = [dataclasses.replace(s, advantage=np.nan) if s is guilty else s for s in sequences]
    batch = trainer.distribute([poisoned])
    named = next(pack.trajectory_ids for pack in batch.minibatches[0] if guilty.trajectory_id in pack.trajectory_ids)
    assert len(named) < len(sequences)
    before = exported(trainer)
    with pytest.raises(MegatronRLError, match="loss is not finite") as caught:
        trainer.step(batch, MirrorDescent(TAU), None)
    assert str(sorted(int(t) for t in named)) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in exported(trainer).items())


def test_a_gradient_that_is_not_finite_is_refused(folder, make_trainer):
    trainer = make_trainer(make_config(folder))
    weight = trainer.chunks[0].decoder.layers[0].mlp.linear_fc2.weight
    weight.register_hook(lambda gradient: gradient * torch.inf)
    before = exported(trainer)
    with pytest.raises(MegatronRLError, match="gradient is not finite"):
        trainer.step(trainer.distribute([flat(make_groups())]), MirrorDescent(TAU), None)
    assert all(torch.equal(value, before[name]) for name, value in exported(trainer).items())


def test_padding_rows_of_the_vocabulary_get_no_probability(folder, make_trainer):
    """A vocabulary block larger than the vocabulary: huge weights in the padding leave the log-probs alone."""
    trainer = make_trainer(make_config(folder))
    batch = trainer.distribute([flat(make_groups())])
    expected = trainer.log_probs(batch)[0]
    chunk = trainer.chunks[0]
    padded = torch.cat([chunk.output_weight.detach(), torch.full((5, 32), 1e3)])
    chunk.embedding.word_embeddings.weight = torch.nn.Parameter(padded)
    for a, b in zip(trainer.log_probs(batch)[0], expected, strict=True):
        assert torch.equal(a, b)


def test_exported_buckets_are_the_model_folder_again(folder, make_trainer):
    trainer = make_trainer(make_config(folder))
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    found = {name: value for bucket in trainer.export_buckets(1 << 12) for name, value in bucket}
    assert set(found) == set(wanted) == set(dict(hf.export(trainer.chunks)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
