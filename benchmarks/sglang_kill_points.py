"""One run of `sglang_kills.py`: the training loop, with SIGKILL to its server or to itself at the points that it is told.

    python benchmarks/sglang_kill_points.py FOLDER --phases PHASE [PHASE] [--small] [section.key=value ...]

The calls that an iteration consists of are wrapped, so that a kill comes inside the phase that it names, whatever the machine's
speed: "in delivery" before the second bucket, "in release" between the server's idleness and its release, and so on. What dies
is SGLang's scheduler process; its main process notices within a second or two, breaks its connections and ends. FOLDER is the
run's folder; its kills.jsonl gets two lines a kill. Small: served by the tests' fake, which is one process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sglang_kills import KILLS, PHASES, ROOT, read_lines

from megatron_rl import config as configuration
from megatron_rl import loop, run
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.engines.base import Chunk, Request
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.rollout.engines.sglang_supervisor import SupervisedEngine
from megatron_rl.rollout.engines.sglang_transport import IPC
from megatron_rl.serving_sglang import SGLangServing
from megatron_rl.training.trainer import Trainer

FIRST, APART = 2, 4  # iteration of a run's first kill, and iterations to the next

log = logging.getLogger(__name__)


class Killer:
    """Kills at the points of `phases`, in order, and writes what it did to FOLDER/kills.jsonl: two lines a kill."""

    def __init__(self, folder: Path, buffer: Path, phases: Sequence[str]) -> None:
        self._path, self._buffer_path = folder / KILLS, buffer
        written = read_lines(self._path)
        killed = [line for line in written if line["event"] == "killed"]
        self._phases = list(phases)[len(killed) :]
        self._next_iteration = FIRST + APART * len(killed)
        self._waits = len(killed) > len(written) - len(killed)  # for tokens after a kill; here: of the trainer
        self._num_restarts = -1  # of the engine, at the kill
        self._iteration = self._num_requests = self._num_chunks = self._num_buckets = 0
        self._engine: SupervisedEngine | None = None  # whose chunk was the last
        self._victim: SupervisedEngine | None = None

    def reach(self, phase: str) -> None:
        """A point of the run; perhaps its last."""
        if self._phases[:1] != [phase] or self._iteration < self._next_iteration or self._waits:
            return
        self._phases.pop(0)
        self._next_iteration += APART
        assert self._engine is not None, "iterations have gone by"
        self._waits, self._victim, self._num_restarts = True, self._engine, self._engine.num_restarts
        process = os.getpid() if phase == "trainer" else scheduler_of(self._engine._server.pid)
        self._write("killed", phase=phase)
        os.kill(process, signal.SIGKILL)

    def hear(self, engine: SupervisedEngine) -> None:
        """A chunk has come."""
        self._engine = engine
        self._num_chunks += 1
        if self._waits and self._victim in (None, engine) and engine.num_restarts > self._num_restarts:
            self._waits = False
            self._write("went on")
        if self._num_chunks >= self._num_requests:
            self.reach("generating")
            self.reach("trainer")

    def _write(self, event: str, **more: Any) -> None:
        buffer = ReplayBuffer(self._buffer_path, read_only=True)  # from whatever thread
        line = {"event": event, "iteration": self._iteration, "counts": buffer.counts(), **more}
        if event == "killed":
            line["tokens"] = fingerprints(buffer)
        buffer.close()
        log.warning("%s, iteration %d %s", event, self._iteration, more)
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line | {"time": time.time()}) + "\n")

    def install(self) -> None:
        """Into the calls that an iteration consists of."""
        generate = SupervisedEngine.generate

        async def heard(engine: SupervisedEngine, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
            self._num_requests += len(requests)
            async with aclosing(generate(engine, requests)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    self.hear(engine)
                    yield chunk

        SupervisedEngine.generate = heard  # type: ignore[assignment, method-assign]
        before(ReplayBuffer, "begin_phase", self._begin_phase)
        before(SGLangServing, "release", lambda *_: self.reach("before release"))
        before(Trainer, "step", lambda *_, **__: self.reach("training"))
        before(IPC, "deliver", self._deliver)
        before(SGLangClient, "post", self._post)

    def _begin_phase(self, buffer: ReplayBuffer, iteration: int) -> None:
        self._iteration = iteration
        self._num_requests = self._num_chunks = self._num_buckets = 0

    def _deliver(self, *_: Any) -> None:
        self._num_buckets += 1
        if self._num_buckets == 2:
            self.reach("in delivery")

    def _post(self, client: SGLangClient, path: str, body: Any, *_: Any) -> None:
        if path == "/release_memory_occupation" and "weights" in body["tags"]:
            self.reach("in release")
        if path == "/resume_memory_occupation" and "kv_cache" in body["tags"]:
            self.reach("before KV is resumed")


def before(owner: Any, name: str, act: Callable[..., object]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        act(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def scheduler_of(server: int) -> int:
    """Process id of the server's scheduler, its first of several; the server itself, where it has none."""
    for stat in sorted(Path("/proc").glob("[0-9]*/stat")):
        with suppress(OSError):
            group = int(stat.read_text(errors="replace").rpartition(")")[2].split()[2])
            if group == server and b"sglang::scheduler" in stat.with_name("cmdline").read_bytes():
                return int(stat.parent.name)
    return server


def fingerprints(buffer: ReplayBuffer) -> dict[str, tuple[int, int]]:
    """Of every trajectory ever drawn: how many tokens it has, and their checksum."""
    found = buffer.trajectories([status.id for status in buffer.statuses()])
    return {str(t.id): (t.num_tokens, zlib.crc32(t.token_ids.tobytes())) for t in found}


def train(folder: Path, phases: Sequence[str], overrides: Sequence[str], *, small: bool) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    recipe = ROOT / "examples" / "smollm2_gpu" / "config.yaml"
    if small:
        from tests.rollout.engines.fake_sglang import serialize

        recipe = folder.parent / "config.yaml"
        program = (sys.executable, str(ROOT / "tests" / "rollout" / "engines" / "fake_sglang.py"))
        run.SGLangServing = partial(SGLangServing, program=program, serialize=lambda: serialize)  # type: ignore[assignment, misc]
    config = configuration.load(recipe, [f"run.folder={folder}", *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    Killer(folder, config.buffer_path, phases).install()
    return loop.train(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phases", nargs="+", choices=PHASES, required=True)
    parser.add_argument("--small", action="store_true")
    options, overrides = parser.parse_known_args()
    sys.exit(train(options.folder, options.phases, overrides, small=options.small))
