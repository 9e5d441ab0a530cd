"""How a process finds its place, and what running without CUDA changes and leaves alone."""

import megatron.core.tensor_parallel.layers as megatron_layers
import pytest
import torch

from megatron_rl.errors import ConfigError
from megatron_rl.training import cpu, parallel
from megatron_rl.training.parallel import Launch
from tests.training.material import make_config

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 1, 0, 1, "127.0.0.1")


def test_a_launchers_variables_are_read(monkeypatch):
    for name, value in zip(VARIABLES, ("5", "8", "1", "4", "node0"), strict=True):
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(5, 8, 1, 4, "node0")


def test_half_a_launch_names_what_is_missing(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="WORLD_SIZE, LOCAL_RANK not set"):
        Launch.from_environment()


def test_a_layout_that_does_not_fit_the_ranks_is_refused_before_any_group_is_made(tmp_path):
    with pytest.raises(ConfigError, match="does not divide the 1 ranks"):
        parallel.initialize(make_config(tmp_path, training={"tensor_parallel": 2}))
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")
def test_only_megatron_sees_a_cpu_in_place_of_cuda():
    cpu.install()
    seen = megatron_layers.torch
    cpu.install()
    assert megatron_layers.torch is seen and seen is not torch
    assert seen.cuda.current_device() == torch.device("cpu") == seen.empty(1, device="cuda").device
    assert seen.nn is torch.nn and seen.Tensor is torch.Tensor
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")
def test_another_megatron_is_refused_in_words(monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", "0.19.0")
    with pytest.raises(AssertionError, match=r"fits megatron-core 0\.16, found 0\.19\.0"):
        cpu.install()
