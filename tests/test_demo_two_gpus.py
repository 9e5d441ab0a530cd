"""The demo's runs on two GPUs, without runs: when a wave begins, what a run is held against, what its settings are."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_rl import config as configuration
from megatron_rl.config import check_model, check_world
from megatron_rl.model_config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import demo_two_gpus
from demo_two_gpus import BASELINE, DEMOS, RECIPE, WAVES, DemoRun, Peers, measure, rows_of
from unattended import Clock

SMOLLM2 = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49152,
    max_positions=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    eos_token_ids=(2,),
)


def row(correct: float, **more: float) -> dict[str, float]:
    """A trained iteration of a run that takes no turns."""
    tokens = {"tokens/trained": 900, "tokens/packed": 1000, "loss": 0.0, "mismatch/logp_abs_mean": 0.004}
    return {"reward/correct": correct, "time/rollout_s": 2.0, "time/train_s": 1.0, "time/release_s": 0.0, **tokens, **more}


@dataclass
class Scripted:
    """In place of a DemoRun: trains a batch every time it is looked at, from the `begins`-th time on, `batches` in all."""

    name: str
    begins: int = 0
    batches: int = 3
    model: ModelConfig = SMOLLM2
    looks: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[dict[str, float]]:
        self.looks += 1
        return [row(0.5) for _ in range(min(self.batches, max(0, self.looks - self.begins)))]

    @property
    def is_over(self) -> bool:
        return len(self.trained) >= self.batches

    def tell_end(self, clock: Clock) -> None:
        self.told.append("over")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(only=[f"{BASELINE}3", "TP=2", "PP=2"], small=True, out=tmp_path)


def test_a_wave_begins_when_the_last_one_has_trained_and_every_batch_counts(options, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo_two_gpus.time, "sleep", lambda _: None)
    started: list[Scripted] = []

    def begin(name: str) -> Scripted:
        assert name != "PP=2" or all(each.looks > each.begins for each in started), "one of them has trained nothing yet"
        started.append(Scripted(name, begins=40 if name == "TP=2" else 0))
        return started[-1]

    assert measure(options, Clock.of(60), tmp_path, begin) == 0
    assert [each.name for each in started] == options.only and all(each.told == ["over"] for each in started)
    cases = [row["case"] for row in json.loads((tmp_path / "demo_two_gpus.json").read_text())["rows"]]
    for name in options.only:
        assert f"{name}: correctness, batches 3 to 3" in cases
        assert f"{name}: rollout, median" in cases and f"{name}: release, median" not in cases, "nobody took turns"


def test_a_run_that_never_trains_holds_up_nobody_for_long_and_is_called_missing(options, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo_two_gpus, "WAVE_S", 0.1)
    started = []

    def begin(name: str) -> Scripted:
        started.append(Scripted(name, begins=10**9 if name == "TP=2" else 0))
        return started[-1]

    assert measure(options, Clock.of(1), tmp_path, begin) == 1
    assert [each.name for each in started] == options.only and all(each.told == ["over"] for each in started)
    assert "missing ['TP=2']" in capsys.readouterr().out


def test_a_run_is_held_against_the_other_seeds_and_the_peak(options) -> None:
    """Ten batches of 0.9 where one GPU's seeds have 0.7 and 0.8: the limit is as far below the lowest as they are apart."""
    trained = [row(0.9) for _ in range(10)]
    peers = Peers({f"{BASELINE}3": [0.7] * 10, "earlier": [0.8] * 10, "short": [0.1] * 3}, {"rollout": 3.0})
    found = {r.case.removeprefix("half each: "): r for r in rows_of("half each", trained, peers, SMOLLM2, "NVIDIA H200")}
    last = found["correctness, batches 8 to 10"]
    assert (last.peer, last.limit, last.peer_name) == (0.75, 0.6, "one GPU, 2 seeds")
    assert found["rollout, median"].ratio_to_peer == 1.5 and found["|engine - trainer| log-prob, mean"].ratio_to_limit == 5
    assert found["trained tokens per GPU-second of an iteration, median"].ours == 900 / (2 * 3.0)
    matrices = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536) * 1000 + 49152 * 576 * 900
    mfu = found["MFU of an iteration, generating and all, median"]
    assert mfu.ours == round(6 * matrices / (2 * 3.0) / 989.4e12, 5)
    own = rows_of(f"{BASELINE}3", trained, peers, SMOLLM2, "a CPU")
    assert own[1].peer_name == "one GPU, 1 seeds" and not any("MFU" in r.case for r in own)


def test_every_run_has_settings_that_fit_its_model_and_ports_of_its_own(tmp_path: Path, monkeypatch) -> None:
    from dataclasses import replace

    assert [name for wave in WAVES for name in wave] == list(DEMOS)
    commands: list[list[str]] = []
    monkeypatch.setattr(demo_two_gpus, "Job", lambda command, log, environment: commands.append(list(map(str, command))))
    monkeypatch.setattr(ModelConfig, "from_folder", lambda folder: SMOLLM2)
    (tmp_path / "prompts.jsonl").touch()
    wide = replace(SMOLLM2, num_heads=12, num_kv_heads=4)
    ports = []
    for name, demo in DEMOS.items():
        DemoRun(name, tmp_path, tmp_path, RECIPE, small=False)
        overrides = commands[-1][commands[-1].index(str(RECIPE)) + 1 :]
        config = configuration.load(RECIPE, overrides)
        check_world(config, demo.ranks)
        check_model(config, wide if demo.server is demo_two_gpus.PAIR else SMOLLM2)
        ports += [config.rollout.sglang.port + i for i in range(config.rollout.sglang.engines)]
    assert len(set(ports)) == len(ports) and max(ports) < 32768
