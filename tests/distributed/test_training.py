"""The RL objective under every parallel layout: loss, gradients and weights after two optimizer steps equal one rank's.

Micro-batches are small, so that groups are split over micro-batches and ranks; the one rank takes each step's batch whole.
"""

import pytest
import torch

from megatron_rl.training import parallel
from megatron_rl.training.packing import plan
from tests.distributed.launch import train_layouts
from tests.distributed.layouts import LAYOUTS, MAX_TOKENS, PREFERENCE, config_of, make_models, minibatches, prefer, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder, zygote):
    """Of all layouts; one launch for each number of ranks, one after the other."""
    found = {}
    for num_ranks in (2, 4):
        log = folder / f"log_{num_ranks}"
        assert zygote.run(train_layouts, num_ranks, folder, log=log) == 0, log.read_text()[-6000:]
        found |= torch.load(folder / f"results_{num_ranks}.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def one_rank(folder):
    """The same two steps on one rank, each in one micro-batch."""
    parallel.initialize(config_of(folder / "qwen3", {}))
    trained = {model: train(config_of(folder / model, {})) for model in ("qwen3", "qwen2")}
    yield trained | {"DPO": prefer(config_of(folder / "qwen3", {}))}
    parallel.shutdown()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_rank_does(layout, results, one_rank):
    found, wanted = results[layout], one_rank[LAYOUTS[layout][1]]
    assert wanted["metrics"]["log_ratio/abs_mean"] > 0.01, "tau must act for this test to mean anything"
    assert found["metrics"]["num_micro_batches"] > 4 > wanted["metrics"]["num_micro_batches"]
    for key in ("loss", "grad_norm", "entropy/mean", "log_ratio/abs_mean", "mismatch/logp_abs_mean", "drift/logp_abs_mean"):
        assert found["metrics"][key] == pytest.approx(wanted["metrics"][key], rel=1e-4, abs=1e-6), key
    assert found["metrics"]["tokens/trained"] == wanted["metrics"]["tokens/trained"]
    assert set(found["weights"]) == set(wanted["weights"])
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in found["gradients"]:
        torch.testing.assert_close(
            found["gradients"][name], wanted["gradients"][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", PREFERENCE)
def test_pairs_are_preferred_on_two_ranks_as_on_one(layout, results, one_rank):
    found, wanted = results[layout], one_rank["DPO"]
    assert abs(wanted["metrics"]["margin"]) > 0.01, "the second step must have a log-ratio for this test to mean anything"
    for key in ("loss", "grad_norm", "accuracy", "margin", "log_ratio/abs_mean"):
        assert found["metrics"][key] == pytest.approx(wanted["metrics"][key], rel=1e-3, abs=1e-5), key
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_batch_has_groups_split_over_micro_batches_and_over_ranks():
    planned = [plan(sequences, max_tokens=MAX_TOKENS, data_parallel=2) for sequences in minibatches()]
    homes = {}
    for ranks in planned:
        for rank, packs in enumerate(ranks):
            for i, pack in enumerate(packs):
                for trajectory in pack.trajectory_ids.tolist():
                    homes.setdefault(trajectory // 3, set()).add((rank, i))
    assert any(len({rank for rank, _ in places}) == 2 for places in homes.values()), "over ranks"
    assert any(len({i for _, i in places}) == 2 for places in homes.values()), "over micro-batches"


def test_a_loss_that_is_not_finite_stops_every_rank_with_the_same_words(results):
    said = results["refused"]
    assert len(said) == 2 and said[0] == said[1] and "loss is not finite" in said[0] and "7" in said[0]


def test_main_weights_split_over_ranks_are_read_back_whole(results):
    assert results["round trip"] is True
