"""`megatron-rl long2short dpo` on one rank, against autograd of the published loss on a dense model and torch's AdamW."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from megatron_rl.config import DPOConfig, load_supervised
from megatron_rl.long2short.dpo import dpo, load_course
from megatron_rl.model_config import ModelConfig
from megatron_rl.supervised.run import Run
from megatron_rl.training.packing import plan
from tests.supervised.recipes import dense_course, token_log_probs, write_recipe

BETA = 0.3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    draw = random.Random(0)
    lines = [
        {"prompt": f"{i}+{i}", "chosen": "y" * draw.randint(1, 9), "rejected": "no " * draw.randint(2, 9)} for i in range(11)
    ]
    section = {"beta": BETA, "pairs_per_step": 4, "epochs": 2, "lr_start": 1e-2, "lr_end": 1e-3}
    return write_recipe(tmp_path_factory.mktemp("dpo"), "dpo", section, lines)


def configured(recipe, name) -> DPOConfig:
    return load_supervised(DPOConfig, recipe, [f"run.folder={recipe.parent / name}", "training.max_tokens_per_micro_batch=40"])


def rows(recipe, name):
    return [json.loads(line) for line in (recipe.parent / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(recipe):
    config = configured(recipe, "undisturbed")
    assert dpo(config) == 0
    return config


def published(model, before, sequences):
    """Equation 7 of arXiv 2305.18290; a pair's members follow each other."""
    ratios = []
    for s in sequences:
        with torch.no_grad():
            reference = token_log_probs(before, s).sum()
        ratios.append(token_log_probs(model, s).sum() - reference)
    chosen, rejected = torch.stack(ratios[0::2]), torch.stack(ratios[1::2])
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def test_every_step_is_adam_on_the_published_loss_against_the_initial_model(recipe, undisturbed):
    course = load_course(undisturbed, ModelConfig.from_folder(undisturbed.model.folder))
    assert len(course.steps) == 6
    losses, weights = dense_course(undisturbed.model.folder, course, published)
    found = rows(recipe, "undisturbed")
    assert [row["loss"] for row in found] == pytest.approx(losses, abs=1e-4)
    assert found[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and found[0]["margin"] == 0
    assert found[-1]["accuracy"] == 1 and found[-1]["margin"] > 0.5
    for name, value in load_file(undisturbed.run.folder / "hf" / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_resumed_run_measures_against_the_initial_model_and_ends_with_the_same_weights(recipe, undisturbed, monkeypatch):
    config = configured(recipe, "interrupted")
    done = Run.train

    def stop_after_four(run, order):
        done(run, order)
        run.shutdown.requested = run.step == 4

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", stop_after_four)
        assert dpo(config) == 0
    assert len(rows(recipe, "interrupted")) == 4
    assert dpo(config) == 0
    for a, b in zip(rows(recipe, "interrupted"), rows(recipe, "undisturbed"), strict=True):
        assert {k: v for k, v in a.items() if "time" not in k} == {k: v for k, v in b.items() if "time" not in k}
    before, after = (load_file(c.run.folder / "hf" / "model.safetensors") for c in (undisturbed, config))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_pair_stays_in_one_micro_batch_however_long(recipe, undisturbed, share_prompts):
    course = load_course(undisturbed, ModelConfig.from_folder(undisturbed.model.folder))
    for max_tokens in (1, 20, 60):
        sequences = [s for item in course.items for s in item.sequences]
        options = {"max_tokens": max_tokens, "share_prompts": share_prompts, "data_parallel": 2}
        packs = [pack for rank in plan(sequences, whole_groups=True, **options) for pack in rank]
        assert sorted(g for pack in packs for g in pack.group_ids.tolist()) == sorted(2 * list(range(11)))
        assert all(pack.group_ids.tolist().count(g) == 2 for pack in packs for g in pack.group_ids.tolist())
    split = plan(sequences, max_tokens=1, share_prompts=share_prompts)[0]
    assert max(len(pack.group_ids) for pack in split) == 1, "without the demand they would be cut"
