"""What one layout saves every other reads; what any layout exports is what one rank read. One launch does all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_rl.training import parallel
from tests.distributed.checkpoint_ranks import LAYOUTS, continued, save_and_load
from tests.distributed.layouts import make_models
from tests.training.material import make_config
from tests.zygote import Zygote


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, zygote: Zygote) -> dict[str, Any]:
    log = folder / "log"
    assert zygote.run(save_and_load, folder, log=log) == 0, log.read_text()[-6000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def one_rank(folder: Path, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one rank reads from the checkpoint of two."""
    parallel.initialize(make_config(folder / "qwen3"))
    yield continued(folder, {})
    parallel.shutdown()


@pytest.mark.parametrize("layout", ["one rank", *LAYOUTS])
def test_a_checkpoint_of_two_ranks_continues_alike_in_every_layout(
    layout: str, results: dict[str, Any], one_rank: dict[str, Any]
) -> None:
    found = one_rank if layout == "one rank" else results["continued"][layout]
    assert found["extra"] == {"version": 1}
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in one_rank["weights"].items())
    assert found["losses"] == pytest.approx(results["saved"], rel=1e-4, abs=1e-6)
    assert results["saved"][0] != pytest.approx(results["saved"][1], rel=1e-3), "a step that changes nothing proves nothing"


def test_split_main_weights_survive_a_change_of_layout_bit_for_bit(folder: Path, one_rank: dict[str, Any]) -> None:
    split, whole = (
        dist_checkpointing.load_plain_tensors(str(folder / run / "checkpoints/iteration_000001")) for run in ("split", "whole")
    )
    assert split.keys() == whole.keys() and len(split) > 10
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, whole[key]) for key, tensor in split.items())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in split.values())


@pytest.mark.parametrize("model", ["qwen3", "qwen2"])
@pytest.mark.parametrize("layout", ["TP", "PP", "VPP"])
def test_every_rank_of_a_layout_exports_the_bytes_that_were_read(
    model: str, layout: str, results: dict[str, Any], folder: Path
) -> None:
    assert results["exported"][model, layout] == [True, True]
    written = folder / "written" / model / "-".join(LAYOUTS[layout])
    tensors = {name: tensor for file in written.glob("*.safetensors") for name, tensor in load_file(file).items()}
    source = load_file(folder / model / "model.safetensors")
    assert tensors.keys() == source.keys() and all(torch.equal(tensors[name], source[name]) for name in source)


def test_what_one_rank_cannot_write_both_report(results: dict[str, Any], folder: Path) -> None:
    for what, said in results["failures"].items():
        assert all("No space left on device" in message for message in said), (what, said)
    assert "rank 1: " in results["failures"]["weights of rank 1"][0]
    assert [p.name for p in (folder / "run" / "checkpoints").iterdir()] == ["iteration_000001"]
    assert not (folder / "never").exists()


def test_conversion_on_two_ranks_gives_back_the_model(folder: Path, results: dict[str, Any]) -> None:
    before, after = (load_file(folder / name / "model.safetensors") for name in ("qwen2", "converted/hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
