"""kill -9 of the engine in every phase of an iteration, and of the trainer: what goes on, how soon, and that nothing is lost.

examples/smollm2_gpu with 12 small iterations, four runs side by side on one GPU, each killed at most twice, at the very point
that a phase is: `sglang_kill_points.py`. A trainer that was killed is started again by the same command. Each kill writes down
every trajectory of the buffer; at the end all of them must begin with the tokens they had, `ReplayBuffer.check()` must pass,
metrics.jsonl must hold every iteration; correctness and the distance of log-probs are compared over the run. Seconds count from
a kill to the first tokens of the server started again, so the rest of the training phase is in them. Unattended, one GPU:

    python benchmarks/sglang_kills.py --model FOLDER --out DIR [--seconds 280] [--phases "in delivery" trainer]
    python benchmarks/sglang_kills.py --model FOLDER --out DIR --ranks 2    # two GPUs; writes sglang_kills_2_ranks.json
    python benchmarks/sglang_kills.py --small --out DIR     # no numbers worth reading: a tiny model, a fake server, on a CPU

With several ranks each has a server on its GPU, and one run is killed: the ranks bring a server back together.

What the runs say goes to DIR/sglang_kills_<number>.log. Exits with 1 where a run did not get to its end or something is lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from gpu_timing import Clock, command_line
from launched import torchrun
from result_file import Row, write_result

from megatron_rl.errors import BufferFileError
from megatron_rl.report.metrics import read_metrics
from megatron_rl.rollout.buffer import ReplayBuffer

ROOT = Path(__file__).parents[1]
PHASES = (
    "generating",
    "before release",
    "in release",
    "training",
    "in delivery",
    "before KV is resumed",
    "trainer",  # in the middle of generating
)
PLAN = (  # the phases in which each run is killed, in order
    ("generating", "in delivery"),
    ("before release", "before KV is resumed"),
    ("in release", "training"),
    ("trainer",),
)
PLAN_OF_RANKS = (("generating", "in delivery"),)
ITERATIONS = 12
KILLS = "kills.jsonl"  # in a run's folder
OVERRIDES = (
    f"run.iterations={ITERATIONS}",
    "run.checkpoint_every=3",
    "rollout.groups_per_iteration=32",
    "rollout.min_groups=32",
    "rollout.max_open_groups=48",
    "rollout.sglang.mem_fraction=0.6",
    "rollout.sglang.server_arguments={grammar_backend: none, enable_fp32_lm_head: true, disable_cuda_graph: true, "
    "max_total_tokens: 150000}",
    "weights.bucket_bytes=67108864",
    "rollout.sglang.bucket_bytes=268435456",  # of 270 MB, so that there is a second
)


@dataclass
class KilledRun:
    """A run as a process, started again by the same command where its trainer was killed."""

    number: int
    phases: Sequence[str]
    folder: Path
    command: Sequence[str]
    log: Path
    is_launched: bool  # by torchrun, which ends its ranks where it is asked to end
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def is_over(self) -> bool:
        """Started again first, if it is the trainer that was killed."""
        code = self.process.poll()
        if code == -signal.SIGKILL and [(kill["phase"], then) for kill, then in self.kills()][-1:] == [("trainer", None)]:
            self.start()
            return False
        return code is not None

    def end(self) -> None:
        """Its server ends with it. The server's last words go to the log, where the run did not get to its end."""
        if self.process.poll() is None and self.is_launched:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        server_log = self.folder / "log" / "sglang-0.log"
        if self.process.returncode and server_log.exists():
            with self.log.open("ab") as log:
                log.write(b"\n--- end of the server's log\n" + server_log.read_bytes()[-20_000:])

    def kills(self) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
        """What was written at each kill, and when tokens came again."""
        lines = read_lines(self.folder / KILLS)
        return [(a, b) for a, b in zip(lines, [*lines[1:], None], strict=True) if a["event"] == "killed"]

    def report(self) -> list[Row]:
        """Also printed: a line a kill."""
        kills = self.kills()
        if len(kills) < len(self.phases):
            missing = ", ".join(self.phases[len(kills) :])
            print(f"run {self.number}: MISSING: not killed {missing}; see {self.log}", flush=True)
        if not kills:
            return []
        buffer = ReplayBuffer(self.folder / "buffer.sqlite", read_only=True)
        try:
            buffer.check()
            broken = 0
        except BufferFileError as e:
            broken = 1
            print(f"run {self.number}: {e}", flush=True)
        held = {str(t.id): t.token_ids for t in buffer.trajectories([status.id for status in buffer.statuses()])}
        table = ", ".join(f"{term.name} {term.count}" for term in buffer.conservation() if term.count)
        buffer.close()
        rows = [row for kill, then in kills for row in kill_rows(kill, then, held)]
        print(f"run {self.number}: buffer: {table}", flush=True)
        rows.append(plain_row(f"run killed {', '.join(self.phases)}: rules of conservation broken", "files", broken, limit=0))
        return rows + self._metric_rows()

    def _metric_rows(self) -> list[Row]:
        rows, name = read_metrics(self.folder), f"run killed {', '.join(self.phases)}"
        trained = [row for row in rows if "loss" in row]
        done = len({row["iteration"] for row in rows} & set(range(ITERATIONS)))
        print(
            f"run {self.number}: exit code {self.process.returncode}, {done} of {ITERATIONS} iterations, {len(trained)} trained",
            flush=True,
        )
        result = [plain_row(f"{name}: iterations in metrics.jsonl", "iterations", done, limit=ITERATIONS)]
        if third := len(trained) // 3:
            first, last = (round(mean(row["reward/correct"] for row in part), 4) for part in (trained[:third], trained[-third:]))
            case = f"{name}: correctness, last third of {len(trained)} batches"
            result.append(Row(case, "share", last, first, "first third", None, None, None, {}))
            worst = max(row["mismatch/logp_abs_mean"] for row in trained)
            result.append(plain_row(f"{name}: |engine - trainer| log-prob, worst batch", "nats", round(worst, 5)))
            print(f"run {self.number}: correctness {first} -> {last}, log-probs at most {worst:.5f} apart", flush=True)
        return result


def kill_rows(kill: dict[str, Any], then: dict[str, Any] | None, held: dict[str, np.ndarray]) -> list[Row]:
    """held: by trajectory id, the tokens at the end. What was there at the kill must be how they begin."""
    phase, at_kill = kill["phase"], kill["tokens"]
    lost = sum(i not in held or zlib.crc32(held[i][:n].tobytes()) != checksum for i, (n, checksum) in at_kill.items())
    rows = [plain_row(f"killed {phase}: of {len(at_kill)} trajectories lost or changed", "trajectories", lost, limit=0)]
    when = "DID NOT GO ON"
    if then is not None:
        seconds = then["time"] - kill["time"]
        when = f"went on after {seconds:.1f} s"
        rows.append(plain_row(f"killed {phase}: until tokens come again", "s", round(seconds, 1)))
    told = [", ".join(f"{k} {v}" for k, v in line["counts"].items()) if line else "-" for line in (kill, then)]
    print(
        f"killed {phase}, iteration {kill['iteration']}: {when}; trajectories before: {told[0]}; after: {told[1]}; "
        f"lost or changed {lost}",
        flush=True,
    )
    return rows


def plain_row(case: str, unit: str, value: float, limit: float | None = None) -> Row:
    return Row(case, unit, value, None, None, limit, None, None, {})


def is_whole(rows: Sequence[Row]) -> bool:
    """Nothing is lost, no iteration is missing."""
    return all(row.limit is None or row.ours == row.limit for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def prepare(folder: Path, model: Path | None) -> list[str]:
    """Prompts, or without a model one of its own with a recipe, in `folder`; the settings of all runs."""
    if model is None:
        from tests.resume.recipe import write_recipe

        write_recipe(folder, iterations=ITERATIONS)
        return [
            "rollout.engine=sglang",
            "run.checkpoint_every=3",
            "weights.bucket_bytes=40000",
            "rollout.sglang.bucket_bytes=160000",
        ]
    prompts = folder / "prompts.jsonl"
    make_prompts = ROOT / "examples" / "smollm2_gpu" / "make_prompts.py"
    subprocess.run([sys.executable, str(make_prompts), str(prompts)], check=True)
    return [*OVERRIDES, f"model.folder={model.resolve()}", f"data.path={prompts}"]


def main() -> int:
    parser = command_line(__doc__, seconds=280, then="everything is ended, and what there is told")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="these kills only")
    parser.add_argument("--ranks", type=int, default=1, help="of the trainer, with a server each")
    options, overrides = parser.parse_known_args()
    if not options.model and not options.small:
        parser.error("give --model; --small tries the code on a CPU")
    clock = Clock.of(options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a server that is ending may still write
        settings = [*prepare(Path(folder), None if options.small else options.model), *overrides]
        settings += [f"rollout.sglang.engines={options.ranks}"]
        runs = []
        for number, planned in enumerate(PLAN if options.ranks == 1 else PLAN_OF_RANKS):
            if phases := [phase for phase in planned if phase in options.phases]:
                where, log = Path(folder) / f"run{number}", options.out / f"sglang_kills_{number}.log"
                log.unlink(missing_ok=True)
                program = [str(ROOT / "benchmarks" / "sglang_kill_points.py"), str(where), *settings]
                program += [*(["--small"] if options.small else []), "--phases", *phases]
                is_launched = options.ranks > 1
                command = torchrun(options.ranks, *program) if is_launched else [sys.executable, *program]
                runs.append(KilledRun(number, phases, where, command, log, is_launched))
        rows = watch(runs, clock)
    packages = ["torch", "aiohttp"] if options.small else ["torch", "sglang", "megatron-core", "aiohttp"]
    device = torch.device("cuda") if torch.cuda.is_available() else None
    name = "sglang_kills" if options.ranks == 1 else f"sglang_kills_{options.ranks}_ranks"
    write_result(name, rows, ceilings={}, packages=packages, device=device, folder=options.out)
    return int(not is_whole(rows) or any(each.process.returncode for each in runs))


def watch(runs: Sequence[KilledRun], clock: Clock) -> list[Row]:
    """Until all are over or the time is."""
    for each in runs:
        each.start()
    try:
        while clock.left > 0 and sum(each.is_over() for each in runs) < len(runs):
            time.sleep(0.2)
    finally:
        for each in runs:
            each.end()
    clock.tell("all runs are over" if clock.left > 0 else "the time is over")
    return [row for each in runs for row in each.report()]


if __name__ == "__main__":
    sys.exit(main())
