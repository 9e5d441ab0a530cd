from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl.errors import CheckpointError, ConfigError, DataError
from megatron_rl.training import checkpoint
from megatron_rl.weights.convert import convert
from tests.weights.small import config_for, one_rank, perturbed, same_bytes, stored

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """tools/convert_checkpoint.py as a module."""
    path = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("family", "tied", "dtype"), [("qwen2", False, "float32"), ("qwen3", True, "bfloat16")])
def test_to_megatron_and_back_gives_the_same_model(
    make_model: MakeModel, tmp_path: Path, command: ModuleType, family: str, tied: bool, dtype: str
) -> None:
    folder = perturbed(make_model, tmp_path / "in", family, dtype=dtype, tied=tied)
    ours, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert command.main([str(folder), ours, "--to", "megatron"]) == 0
    assert command.main([ours, back, "--to", "hf", "--dtype", dtype]) == 0
    assert same_bytes(stored(tmp_path / "back"), stored(folder))
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_starts_from_a_converted_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path / "in", "llama")
    convert(folder, tmp_path / "checkpoints" / "iteration_000000", to="megatron")
    path = checkpoint.latest(tmp_path)
    assert path is not None and checkpoint.read_extra(path) == {"iteration": 0, "version": 0, "sampler": None}


def test_bad_conversions_are_refused_by_name(
    make_model: MakeModel, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = perturbed(make_model, tmp_path / "in", "llama")
    with pytest.raises(ConfigError, match="already exists"):
        convert(folder, tmp_path, to="megatron")
    with pytest.raises(DataError, match=r"config\.json is missing"):
        convert(tmp_path, tmp_path / "out", to="megatron")
    with pytest.raises(DataError, match=r"not a checkpoint \(state\.json is missing\)"):
        convert(folder, tmp_path / "out", to="hf")
    with pytest.raises(ConfigError, match="does not divide the 1 ranks; start a multiple of 2"):
        convert(folder, tmp_path / "out", to="megatron", pipeline_parallel=2)
    with pytest.raises(ConfigError, match="must divide the model's 3 attention heads"):
        convert(folder, tmp_path / "out", to="megatron", tensor_parallel=2)
    (folder / "model.safetensors").write_bytes(b"")
    assert command.main([str(folder), str(tmp_path / "out"), "--to", "megatron"]) == 1
    assert "model.safetensors: truncated or damaged" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_damaged_checkpoint_leaves_no_model_folder(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path / "in", "llama")
    convert(folder, tmp_path / "megatron", to="megatron")
    next((tmp_path / "megatron").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        convert(tmp_path / "megatron", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
    with one_rank(config_for(folder)):  # the groups were left, so another may begin
        pass
