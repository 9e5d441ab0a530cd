"""The whole loop with SGLang's fake as a started process: turns on the GPU, publishes, a server killed in the middle."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_rl import config as configuration
from megatron_rl import loop, run
from megatron_rl.config import check_world
from megatron_rl.errors import ConfigError
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.serving_sglang import SGLangServing, _first_gpu
from megatron_rl.training.parallel import Launch
from tests.resume.recipe import write_recipe
from tests.rollout.engines.fake_parameter_server import connect
from tests.rollout.engines.fake_sglang import GlooGroup, serialize

PROGRAM = (sys.executable, str(Path(__file__).parent / "rollout" / "engines" / "fake_sglang.py"))


def served_by_fake(*arguments, **options):
    fakes = {"program": PROGRAM, "serialize": lambda: serialize, "join": GlooGroup, "parameters": connect}
    return SGLangServing(*arguments, **{**fakes, **options})


def test_a_run_trains_on_a_server_that_dies_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SGLangServing", served_by_fake)
    recipe = write_recipe(tmp_path, iterations=3)
    fault = "rollout.sglang.server_arguments={fake_fault: 30}"
    evaluated = ["data.held_out=4", "evaluation.every=2", "evaluation.samples=2", "evaluation.temperature=1"]
    config = configuration.load(recipe, [f"run.folder={tmp_path / 'run'}", "rollout.engine=sglang", fault, *evaluated])
    assert loop.train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["iteration"] for row in rows if "eval/held_out/pass@2" in row] == [0, 2, 3]
    assert len(trained) >= 2 and all(row["mismatch/logp_abs_mean"] < 1e-3 for row in trained)
    turns = ("release", "onload", "offload", "resume")
    assert all(row[f"time/{turn}_s"] > 0 for row in trained for turn in (*turns, "publish"))
    log = (tmp_path / "run" / "log" / "sglang-0.log").read_text()
    assert log.count("--model-path") == 2, "started twice: it died once"
    buffer = ReplayBuffer(tmp_path / "run" / "buffer.sqlite", read_only=True)
    buffer.check()
    buffer.close()


def test_servers_with_gpus_of_their_own_take_no_turns_and_get_every_version_by_broadcast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two dies in the middle, and is given the weights of that iteration in a group of its own. No group is left open:
    NCCL's end of it would wait for servers that are gone."""
    open_groups: set[int] = set()

    class Watched(GlooGroup):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            open_groups.add(id(self))

        def close(self, *, abort):
            open_groups.remove(id(self))
            super().close(abort=abort)

    monkeypatch.setattr(run, "SGLangServing", lambda *a, **options: served_by_fake(*a, **options, join=Watched))
    settings = ["rollout.engine=sglang", "rollout.sglang.colocated=false", "rollout.sglang.engines=2"]
    fault = "rollout.sglang.server_arguments={fake_fault: 30}"
    config = configuration.load(write_recipe(tmp_path, iterations=3), [f"run.folder={tmp_path / 'run'}", *settings, fault])
    assert loop.train(config) == 0
    trained = [row for line in (tmp_path / "run" / "metrics.jsonl").open() if "loss" in (row := json.loads(line))]
    assert len(trained) >= 2 and all(row["mismatch/logp_abs_mean"] < 1e-3 for row in trained)
    assert all("time/onload_s" not in row and row["time/release_s"] == 0 for row in trained)
    logs = [(tmp_path / "run" / "log" / f"sglang-{i}.log").read_text() for i in range(2)]
    assert sum(log.count("--model-path") for log in logs) == 3, "one died once"
    assert "--base-gpu-id 1 " in logs[0] and "--base-gpu-id 2 " in logs[1], "the trainer has GPU 0"
    assert not any("--enable-memory-saver" in log for log in logs)
    assert not open_groups


def test_a_run_publishes_by_checkpoint_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SGLangServing", served_by_fake)
    settings = [f"run.folder={tmp_path / 'run'}", "rollout.engine=sglang", "rollout.sglang.checkpoint_engine=true"]
    assert loop.train(configuration.load(write_recipe(tmp_path, iterations=2), settings)) == 0
    trained = [row for line in (tmp_path / "run" / "metrics.jsonl").open() if "loss" in (row := json.loads(line))]
    assert trained and all(row["mismatch/logp_abs_mean"] < 1e-3 for row in trained)


def test_too_few_ranks_for_checkpoint_engine_are_one_error(tmp_path: Path) -> None:
    settings = ["rollout.engine=sglang", "rollout.sglang.checkpoint_engine=true", "rollout.sglang.engines=2"]
    config = configuration.load(write_recipe(tmp_path, iterations=1), settings)
    check_world(config, 2)
    with pytest.raises(ConfigError, match="each of their 2 GPUs needs a trainer's rank, and there are 1; lower one of them"):
        check_world(config, 1)


def test_too_few_gpus_for_servers_of_their_own_are_one_error(tmp_path: Path) -> None:
    settings = ["rollout.engine=sglang", "rollout.sglang.colocated=false", "rollout.sglang.tensor_parallel=2"]
    config = configuration.load(write_recipe(tmp_path, iterations=1), [f"run.folder={tmp_path / 'run'}", *settings])
    of_two = Launch(rank=0, world_size=2, local_rank=0, local_world_size=2, master_host="127.0.0.1")
    assert _first_gpu(config, of_two, 4) == 2
    with pytest.raises(ConfigError, match=r"need 2 GPUs beside 2 for the trainer's ranks .*; this machine shows 3; lower one"):
        _first_gpu(config, of_two, 3)


def test_a_run_keeps_kv_in_servers_that_find_the_plugin_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SGLangServing", served_by_fake)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    recipe = write_recipe(tmp_path, iterations=3)
    keep = ["rollout.kv_policy=keep", "rollout.max_kv_age=2", "rollout.kv_store.host_bytes=1000000"]
    evaluated = ["data.held_out=4", "evaluation.every=1", "evaluation.samples=3", "evaluation.temperature=1"]
    config = configuration.load(recipe, [f"run.folder={tmp_path / 'run'}", "rollout.engine=sglang", *keep, *evaluated])
    assert loop.train(config) == 0
    *rows, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("eval/held_out/pass@1" in row for row in (*rows, last)) and last["iteration"] == len(rows)
    assert sum(row["kv/restored_tokens"] for row in rows) > 0 and rows[0]["kv/snapshot_bytes"] > 0
    assert all(row["kv/restore_failures"] == 0 and row.get("kv/hit_rate", 1) > 0.9 for row in rows)
    buffer = ReplayBuffer(tmp_path / "run" / "buffer.sqlite", read_only=True)
    segments = [s for t in buffer.trajectories(range(3 * buffer.num_drawn)) for s in t.segments]
    buffer.close()
    assert any((s.kv_versions < s.weight_version).any() for s in segments), "some went on with the KV of older weights"
    assert not list(tmp_path.glob("mrl-kv-*")), "sockets and settings are gone with the server"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.kv_policy=keep", "rollout.sglang.urls=[http://127.0.0.1:30000]"], "only servers started by us have"),
        (["rollout.kv_policy=keep", "rollout.kv_store.drift_samples=2"], "kv_store.drift_samples=2: an SGLang server"),
        (["rollout.sglang.urls=[http://elsewhere:30000]"], "must be on this machine, .* set colocated=false"),
        (
            ["rollout.sglang.checkpoint_engine=true", "rollout.sglang.colocated=false"],
            "so servers share them; set .*colocated=true",
        ),
        (["rollout.sglang.bucket_bytes=1000000000"], "less than 4 times weights.bucket_bytes=268435456"),
        (["rollout.sglang.server_arguments={port: 1}"], "server_arguments.port: set rollout.sglang.port instead"),
    ],
)
def test_settings_that_cannot_work_with_sglang_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.load(write_recipe(tmp_path, iterations=1), ["rollout.engine=sglang", *overrides])
