"""Every missing run of every ablation, many at once: `side_by_side.py --jobs N --seconds S --out FOLDER`.

One thread and the CPU each; where GPUs and TransformerEngine are, the runs see neither (its Adam steps on a GPU only). Seeds in
turn, longest tasks first. At the limit what is unfinished is stopped and its folder removed, so that this command, or `run.py`,
makes just that. FOLDER gets runs.tar.gz: what `run.py --finished` and `long2short.py` need, unpacked in the repository's root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import long2short
from run import ABLATIONS, HERE, ROOT, RUNS, command, folder_of, is_finished, make_task

HIDDEN = ("transformer_engine", "apex")
KEPT = ("outcome.json", "metrics.jsonl", "config.yaml", "scores.json")
MOST_FAILURES = 3  # before anything has succeeded: then the machine lacks something, and the rest would fail too


@dataclass(frozen=True)
class Job:
    """A script of this folder with its arguments; `folder` is removed where it is stopped."""

    name: str
    kind: str  # jobs of a kind take about as long
    arguments: list[str]
    folder: Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="after which nothing is started or goes on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "long2short"], help="these runs; default all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run, e.g. to try this script")
    arguments = parser.parse_args()
    for task in ("chain", "sum"):
        make_task(task)
    arguments.out.mkdir(parents=True, exist_ok=True)
    chains = chains_of_jobs(arguments.seeds, arguments.only or [*RUNS, "long2short"], arguments.set)
    with tempfile.TemporaryDirectory() as hidden:
        for package in HIDDEN:
            Path(hidden, f"{package}.py").write_text('raise ModuleNotFoundError("hidden from runs on a CPU")\n', encoding="utf-8")
        bench = Bench(arguments.seconds, sum(map(len, chains)), environment(hidden))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(bench.run_chain, chains))
    pack(arguments.out / "runs.tar.gz", arguments.seeds)
    print(
        f"{dict(bench.counts)} in {bench.passed:.0f} s, {arguments.jobs} at once; seconds a job at most: {bench.longest}",
        flush=True,
    )
    return 0 if set(bench.counts) <= {"done"} else 1


def chains_of_jobs(seeds: Sequence[int], wanted: Sequence[str], settings: Sequence[str]) -> list[list[Job]]:
    """In the order of starting; within a chain one after the other. Long2short begins with what `sum` made, so they go first."""
    used = [name for name in dict.fromkeys(run for a in ABLATIONS.values() for run in a.arms.values()) if name in wanted]
    chains = []
    for seed in seeds:
        longest_first = sorted(used, key=lambda name: (name != "sum", RUNS[name][0] != "chain"))
        for name in longest_first:
            chain = [] if is_finished(name, seed) else [run_job(name, seed, settings)]
            if name == "sum" and "long2short" in wanted and not (long2short.folder_of(seed) / "scores.json").is_file():
                arguments = ["long2short.py", "--score", "--seeds", str(seed)]
                chain.append(Job(f"long2short/seed{seed}", "long2short", arguments, long2short.folder_of(seed)))
            if chain:
                chains.append(chain)
    return sorted(chains, key=lambda chain: chain[-1].kind != "long2short")


def run_job(name: str, seed: int, settings: Sequence[str]) -> Job:
    return Job(f"{name}/seed{seed}", RUNS[name][0], [*command(name, seed), *settings], folder_of(name, seed))


def environment(hidden: str) -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    paths = [hidden, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}


class Bench:
    """Runs jobs from several threads until the limit, and counts how they ended."""

    def __init__(self, seconds: float, num_jobs: int, environment: dict[str, str]) -> None:
        self._begun, self._limit, self._num_jobs, self._environment = time.monotonic(), seconds, num_jobs, environment
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.longest: dict[str, int] = {}  # seconds, by kind

    @property
    def passed(self) -> float:
        return time.monotonic() - self._begun

    def run_chain(self, chain: Sequence[Job]) -> None:
        """One job after the other, as long as they succeed."""
        ending = "done"
        for job in chain:
            begun = self.passed
            ending = self._run(job) if ending == "done" else "not started"
            with self._lock:
                self.counts[ending] += 1
                if ending == "done":
                    self.longest[job.kind] = max(self.longest.get(job.kind, 0), round(self.passed - begun))
                place = f"{sum(self.counts.values())}/{self._num_jobs}"
                print(f"{self.passed:4.0f} s {place:>8} {ending:11} {job.name} ({self.passed - begun:.0f} s)", flush=True)

    def _run(self, job: Job) -> str:
        left = self._limit - self.passed
        is_hopeless = self.counts["failed"] >= MOST_FAILURES and not self.counts["done"]
        if is_hopeless or left <= self.longest.get(job.kind, 0):
            return "not started"
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        said = job.folder.with_suffix(".log")
        with said.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, str(HERE / job.arguments[0]), *job.arguments[1:]],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its children too; a reward worker ends when its pipe closes
                process.wait()
                shutil.rmtree(job.folder, ignore_errors=True)
                return "stopped"
        if code:
            print(f"{job.name} failed with {code}:\n{said.read_text(encoding='utf-8')[-1500:]}", flush=True)
        return "failed" if code else "done"


def pack(path: Path, seeds: Sequence[int]) -> None:
    """Of every finished run what results are made of; of the long models themselves too."""
    with tarfile.open(path, "w:gz") as tar:
        for file in files_to_pack(seeds):
            tar.add(file, arcname=str(file.relative_to(ROOT)))


def files_to_pack(seeds: Sequence[int]) -> Iterator[Path]:
    for seed in seeds:
        finished = [folder_of(name, seed) for name in RUNS if is_finished(name, seed)]
        scored = [f for f in [long2short.folder_of(seed)] if (f / "scores.json").is_file()]
        for folder in finished + scored:
            yield from (folder / name for name in KEPT if (folder / name).is_file())
        if is_finished(long2short.LONG_RUN, seed):
            yield long2short.long_model(seed)


if __name__ == "__main__":
    sys.exit(main())
