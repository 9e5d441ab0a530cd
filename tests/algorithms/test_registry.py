"""An algorithm is a file and a line: what that line decides, and what is refused by it."""

from pathlib import Path

import pytest
import torch

from megatron_rl import algorithms, config
from megatron_rl.algorithms import ALGORITHMS, make_algorithm
from megatron_rl.config import AlgorithmConfig
from megatron_rl.config.loading import iter_settings
from megatron_rl.errors import ConfigError


def test_every_algorithm_is_one_file_with_its_line():
    folder = Path(algorithms.__file__).parent
    named = [path.stem for path in folder.glob("*.py") if "\ndef algorithm(" in path.read_text(encoding="utf-8")]
    assert sorted(named) == sorted(ALGORITHMS)
    assert " | ".join(ALGORITHMS) in (dict(iter_settings(AlgorithmConfig))["name"].description or "")
    assert make_algorithm(AlgorithmConfig()).normalization.value == "sequence", "k1.5's form is the default"


def test_adding_an_algorithm_takes_a_file_and_a_line(tmp_path, monkeypatch):
    (tmp_path / "half_rloo.py").write_text(
        "from megatron_rl.algorithms import rloo\n\n"
        "def algorithm(config):\n"
        "    made = rloo.algorithm(config)\n"
        "    return type(made)(lambda *given: made.advantages(*given) / 2, made.normalization, made.objective)\n"
    )
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    monkeypatch.setitem(ALGORITHMS, "half_rloo", ())
    rewards, groups = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64)
    assert make_algorithm(AlgorithmConfig(name="half_rloo")).advantages(rewards, groups).tolist() == [0.5, -0.25, -0.25]
    bare = Path(config.__file__).with_name("bare_model.yaml")
    assert config.load(bare, ["model.folder=x", "algorithm.name=half_rloo"]).algorithm.name == "half_rloo"
    with pytest.raises(ConfigError, match="algorithm.clip_high=1.0: half_rloo does not use it"):
        config.load(bare, ["model.folder=x", "algorithm.name=half_rloo", "algorithm.clip_high=1"])


def test_a_ratio_bound_below_0_is_refused_where_it_is_one():
    for name in ("ppo", "grpo", "dr_grpo", "reinforce_pp", "gspo", "cispo"):
        with pytest.raises(ConfigError, match="algorithm.clip_low=2.0: a ratio cannot fall more than 1 below 1; set it to 1 or"):
            make_algorithm(AlgorithmConfig(name=name, clip_low=2))
    make_algorithm(AlgorithmConfig(name="k25", clip_low=2))  # of a log-ratio
