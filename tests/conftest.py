"""Fixtures shared by all tests: a tiny tokenizer, tiny random models from the quickstart's maker, and the zygote."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.zygote import Zygote

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quickstart_maker() -> ModuleType:
    """examples/quickstart/make_model.py as a module; the examples folder is no package."""
    path = Path(__file__).parents[1] / "examples" / "quickstart" / "make_model.py"
    spec = importlib.util.spec_from_file_location("quickstart_make_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, quickstart_maker: ModuleType) -> Path:
    """A folder with only a byte tokenizer of 261 tokens, its chat template, and end token `<|end|>` (id 1)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    quickstart_maker.make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(quickstart_maker: ModuleType) -> Callable[..., Path]:
    """`make_model(folder, family="qwen3", *, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128, tied=True,
    max_positions=512, seed=0, **config_options)`: writes config.json, safetensors and tokenizer of a random model."""
    return quickstart_maker.make_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A random Qwen3 of 2 layers and hidden size 64; read it, never write into it."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def zygote(pytestconfig: pytest.Config) -> Iterator[Zygote]:
    """Runs functions in fresh processes without paying their imports; a little less long than a test may take."""
    z = Zygote(limit_s=int(pytestconfig.getini("timeout")) - 20)
    yield z
    z.close()
