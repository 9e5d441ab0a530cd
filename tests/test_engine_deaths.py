"""Servers killed in every phase of an iteration, one beside another that lives: the run ends as an undisturbed one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_rl import config as configuration
from megatron_rl import loop, run, serving_sglang
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.serving_sglang import SGLangServing
from megatron_rl.training.trainer import Trainer
from tests.resume.recipe import write_recipe
from tests.rollout.engines.fake_process import FakeProcess
from tests.rollout.engines.fake_sglang import FakeSGLang, serialize

PHASES = (
    "generating",
    "before release",
    "in release",
    "training",
    "before weights are resumed",
    "in delivery",
    "before KV is resumed",
    "saving",
)
ITERATIONS = 10


class Kills:
    """One a phase, in order, and one an iteration at most."""

    def __init__(self, *phases: str) -> None:
        self.left = list(phases)
        self.iteration, self._last = 0, -1

    def due(self, phase: str) -> bool:
        if self.left[:1] != [phase] or self.iteration == self._last:
            return False
        self._last = self.iteration
        self.left.pop(0)
        return True

    def install(self, patch: pytest.MonkeyPatch, processes: list[FakeProcess]) -> None:
        """Into everything that a phase consists of."""

        def kill(phase: str) -> None:
            if self.due(phase):
                processes[self.iteration % 2].kill()

        def before(owner: Any, name: str, act: Callable[[], None]) -> None:
            original = getattr(owner, name)

            def wrapped(*arguments: Any, **options: Any) -> Any:
                act()
                return original(*arguments, **options)

            patch.setattr(owner, name, wrapped)

        def next_iteration(self_: Any, iteration: int) -> bool:
            self.iteration = iteration
            return begin_phase(self_, iteration)

        begin_phase = ReplayBuffer.begin_phase
        patch.setattr(ReplayBuffer, "begin_phase", next_iteration)
        before(SGLangServing, "release", partial(kill, "before release"))
        before(Trainer, "step", partial(kill, "training"))

        count_event = FakeSGLang._count_event

        def count_or_die(fake: FakeSGLang) -> None:
            count_event(fake)
            if fake._num_events % 7 == 0 and self.due("generating"):
                raise fake.die("killed")

        patch.setattr(FakeSGLang, "_count_event", count_or_die)

    def faults(self, process: FakeProcess) -> None:
        """Of a server just started."""
        num_buckets = 0

        def second_bucket(body: Any) -> bool:
            nonlocal num_buckets
            num_buckets += 1
            return num_buckets % 2 == 0 and self.due("in delivery")

        def resumed(body: Any) -> bool:
            tag = {"weights": "weights are", "kv_cache": "KV is"}[body["tags"][0]]
            return self.due(f"before {tag} resumed")

        process.dies_in("release_memory_occupation", lambda b: self.due("in release" if "weights" in b["tags"] else "saving"))
        process.dies_in("resume_memory_occupation", resumed)
        process.dies_in("update_weights_from_tensor", second_bucket)


def trained(folder: Path, kills: Kills, patch: pytest.MonkeyPatch, *, is_alone: bool = True) -> dict[str, Any]:
    """All of a run on two fake servers that must not depend on its deaths, and how often they were started. is_alone: the rank
    exports its weights at any time; else as if others had to take part."""
    processes: list[FakeProcess] = []

    def process(config: Any, **options: Any) -> FakeProcess:
        processes.append(FakeProcess(config, **options))
        processes[-1].on_start = kills.faults
        return processes[-1]

    patch.setattr(serving_sglang, "ServerProcess", process)

    def serving(*arguments: Any, export: Any, **options: Any) -> SGLangServing:
        export = export if is_alone else None
        return SGLangServing(*arguments, export=export, program=("fake",), serialize=lambda: serialize, **options)

    patch.setattr(run, "SGLangServing", serving)
    kills.install(patch, processes)
    settings = {"engines": 2, "bucket_bytes": 160000, "max_restarts": len(PHASES)}
    overrides = [f"run.folder={folder}", "run.checkpoint_every=1", "rollout.engine=sglang", "weights.bucket_bytes=40000"]
    overrides += [f"rollout.sglang.{key}={value}" for key, value in settings.items()]
    assert loop.train(configuration.load(write_recipe(folder.parent, iterations=ITERATIONS), overrides)) == 0
    buffer = ReplayBuffer(folder / "buffer.sqlite", read_only=True)
    buffer.check()
    batches = [buffer.batch(i) or [] for i in range(ITERATIONS)]
    groups = [*(g for batch in batches for g in batch), *buffer.open_groups(), *buffer.complete_groups()]
    trajectories = {t.id: (t.token_ids.tolist(), t.weight_versions.tolist()) for g in groups for t in g.trajectories}
    counts = buffer.counts()
    buffer.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {k: v for f in sorted((folder / "hf").glob("*.safetensors")) for k, v in load_file(f).items()}
    return {
        "trajectories": trajectories,
        "batches": [[g.id for g in batch] for batch in batches],
        "counts": counts,
        "rewards": [(row["iteration"], row.get("reward/mean")) for row in rows],
        "weights": weights,
        "starts": sum(process.num_starts for process in processes),
    }


def test_servers_killed_in_every_phase_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        wanted = trained(tmp_path / "undisturbed" / "run", Kills(), patch)
    assert wanted["starts"] == 2
    assert any(len(set(versions)) > 1 for _, versions in wanted["trajectories"].values()), "no partial rollout happened"
    several = ("generating", "in delivery", "generating", "generating")  # the first under the model folder's weights
    for name, phases in (("alone", PHASES), ("several", several)):
        kills = Kills(*phases)
        with monkeypatch.context() as patch:
            found = trained(tmp_path / name / "run", kills, patch, is_alone=name == "alone")
        assert not kills.left and found["starts"] == 2 + len(phases)
        for key in ("batches", "trajectories", "counts", "rewards"):
            assert found[key] == wanted[key], (name, key)
        for parameter, tensor in found["weights"].items():
            np.testing.assert_allclose(tensor, wanted["weights"][parameter], atol=1e-6, err_msg=parameter)
