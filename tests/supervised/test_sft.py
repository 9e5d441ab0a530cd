"""`megatron-rl sft` on one rank, against a dense computation with transformers and torch's AdamW."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config import SFTConfig, load_supervised
from megatron_rl.errors import ConfigError, DataError, TrainingError
from megatron_rl.model_config import ModelConfig
from megatron_rl.report.run_data import read_run
from megatron_rl.report.supervised import write_supervised_report
from megatron_rl.supervised.run import Method, Run, train
from megatron_rl.supervised.sft import load_course, sft
from megatron_rl.training import checkpoint
from megatron_rl.training.trainer import Trainer
from tests.supervised.recipes import dense_course, token_log_probs, write_recipe

STAGES = [{"lr_start": 2e-2, "lr_end": 2e-3, "warmup": 0.2}, {"epochs": 2, "lr_start": 1e-2, "lr_end": 1e-3}]


def conversations():
    draw = random.Random(0)
    lines = [{"prompt": str(i), "response": "yes " * draw.randint(1, 8)} for i in range(14)]
    roles = ["user", "assistant"] * 3
    return [*lines, {"messages": [{"role": role, "content": f"{i}." * 3} for i, role in enumerate(roles)]}]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    section = {"batch_tokens": 150, "stages": STAGES}
    return write_recipe(tmp_path_factory.mktemp("sft"), "sft", section, conversations())


def configured(recipe, folder, *overrides) -> SFTConfig:
    return load_supervised(SFTConfig, recipe, [f"run.folder={folder}", *overrides])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def facts(folder):
    """All but times."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(folder)]


@pytest.fixture(scope="module")
def undisturbed(recipe):
    folder = recipe.parent / "undisturbed"
    assert sft(configured(recipe, folder)) == 0
    return folder


def test_every_step_is_adam_on_the_mean_cross_entropy_of_the_assistants_tokens(recipe, undisturbed):
    config = configured(recipe, undisturbed)
    course = load_course(config, ModelConfig.from_folder(config.model.folder))
    assert len(course.steps) > 9 and {s.stage for s in course.steps} == {0, 1}

    def cross_entropy(model, _, sequences):
        return -torch.cat([token_log_probs(model, s) for s in sequences]).mean()

    losses, weights = dense_course(config.model.folder, course, cross_entropy)
    assert [row["loss"] for row in rows(undisturbed)] == pytest.approx(losses, abs=2e-4)
    assert [row["lr"] for row in rows(undisturbed)] == [s.lr for s in course.steps]
    assert losses[-1] < 0.5 * losses[0]
    found = load_file(undisturbed / "hf" / "model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert "supervised run" in write_supervised_report(undisturbed).read_text()
    with pytest.raises(DataError, match="a run of kind sft has no trajectories"):
        read_run(undisturbed)


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.mark.parametrize("place", ["in a step", "within a save", "told to stop"])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(place, recipe, undisturbed, monkeypatch):
    folder = recipe.parent / place.replace(" ", "_")
    config = configured(recipe, folder)
    done = Trainer.step

    def step(self, *args):
        if self.optimizer.num_steps == 7 and place == "in a step":
            raise Killed
        return done(self, *args)

    def commit(*args):
        if args[2]["step"] == 6 and place == "within a save":
            raise Killed
        return committed(*args)

    committed = checkpoint._commit
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        patch.setattr(checkpoint, "_commit", commit)
        if place == "told to stop":
            train_one = Run.train
            patch.setattr(Run, "train", lambda run, order: (train_one(run, order), vars(run.shutdown).update(requested=True))[0])
            assert sft(config) == 0
            assert not (folder / "hf").exists() and len(rows(folder)) == 1
        else:
            with pytest.raises(Killed):
                sft(config)
    assert sft(config) == 0
    assert facts(folder) == facts(undisturbed)
    before, after = (load_file(f / "hf" / "model.safetensors") for f in (undisturbed, folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_is_not_trained_again_and_other_data_or_settings_are_refused(recipe, undisturbed, tmp_path):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert sft(configured(recipe, undisturbed)) == 0
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="sft=.*started with .*restore the setting"):
        sft(configured(recipe, undisturbed, "sft.batch_tokens=90"))
    data = recipe.parent / "data.jsonl"
    text = data.read_text()
    try:
        data.write_text(text.replace("yes", "no", 1))
        with pytest.raises(DataError, match="began with other data than its data file holds now"):
            sft(configured(recipe, undisturbed))
    finally:
        data.write_text(text)


def test_a_loss_that_is_not_finite_names_the_lines_and_keeps_the_last_checkpoint(recipe, tmp_path):
    config = configured(recipe, tmp_path)
    course = load_course(config, ModelConfig.from_folder(config.model.folder))
    guilty = course.items[course.steps[4].items[0]]

    class Poisoned:
        def coefficients(self, inputs):
            return torch.ones_like(inputs.log_probs)

        def loss(self, inputs):
            bad = inputs.group_ids[inputs.sequence_ids] == guilty.sequences[0].group_id
            return torch.where(bad, np.nan, -inputs.weights[inputs.sequence_ids] * inputs.log_probs)

    first = next(i for i, s in enumerate(course.steps) if course.items.index(guilty) in s.items)
    with pytest.raises(TrainingError, match=f"step {first + 1} of .*no step was taken") as caught:
        train(config, Method(Poisoned(), lambda model: course))
    assert guilty.where in str(caught.value)
    assert f"that after step {first - first % 3}." in str(caught.value)
    assert checkpoint.latest_iteration(tmp_path) == first - first % 3


def test_examples_too_long_are_an_error_or_are_dropped_and_counted(recipe, tmp_path):
    model = ModelConfig.from_folder(recipe.parent / "model")
    short = "sft.stages=[{context_tokens: 30}]"
    with pytest.raises(DataError, match=r"line \d+, column 1: \d+ tokens, more than the longest context of 30; \d+ of 15"):
        load_course(configured(recipe, tmp_path, short), model)
    course = load_course(configured(recipe, tmp_path, short, "sft.too_long=drop"), model)
    assert 0 < course.num_dropped < 15 and course.facts["examples"] == 15 - course.num_dropped
    with pytest.raises(DataError, match="nothing is left to train on: all 15 examples are longer than 3 tokens"):
        load_course(configured(recipe, tmp_path, "sft.stages=[{context_tokens: 3}]", "sft.too_long=drop"), model)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.stages=[]", "at least one stage is needed"),
        ("sft.stages=[{}, {context_tokens: 8}]", "fall; a stage may not be shorter than the one before it"),
        ("sft.stages=[{lr: 1}]", "sft.stages.0.lr: no such setting"),
        ("sft.batchtokens=3", "sft.batchtokens: no such setting; the nearest is sft.batch_tokens"),
        ("training.virtual_pipeline=2", "needs training.pipeline_parallel of at least 2"),
        ("rollout.group_size=3", "rollout: no such setting"),
    ],
)
def test_settings_that_contradict_are_refused(recipe, override, message):
    with pytest.raises(ConfigError, match=message):
        configured(recipe, "run", override)
