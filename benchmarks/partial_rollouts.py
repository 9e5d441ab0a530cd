"""Trained tokens per second with partial rollouts, and without, where response lengths have a long tail.

Forced lengths, log-normal (median 1,200, sigma 1.1) up to 16,384 tokens: the trajectories of every 16 groups of 8 have the same
128 lengths in another order. The model is random, with 4 of Qwen3-8B's layers, and never ends a response itself. An iteration is
a rollout phase, the release and resume of the server's KV cache as if training had the GPU, and a training time: none, or the
trained tokens at a stated speed. Nothing is trained.

Ours is the scheduler of the project (`rollout/scheduler.py`) with its buffer: unfinished trajectories go on first, with 4,096
tokens at most in a phase, which ends with 16 complete groups; their KV is computed again in the next one. The peer waits for all
of 16 fresh groups, through the same engine, without scheduler and buffer. On top, KV kept at no cost: the cache is not released
and the weight version stays, so that the server finds what it had. The limit of a row is 1.8 times the peer. Unattended:

    python benchmarks/partial_rollouts.py [--out DIR] [--seconds 165] [--train-tokens-per-s 40000]     # one GPU, half its memory
    python benchmarks/partial_rollouts.py --small --out DIR                                            # on a CPU, no numbers
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist, mean

import numpy as np
import torch
from gpu_timing import Clock, command_line, show
from result_file import Row, write_result
from served_model import Setup, attempt, open_server, prepare

from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.engines.base import Chunk, Engine, Request, Sampling
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.scheduler import Rollout
from megatron_rl.types import Ending, Group, Message, Outcome, OutcomeKind, Prompt

TARGET = 1.8


@dataclass(frozen=True)
class Workload:
    groups: int  # of one iteration's batch
    group_size: int
    median: float  # of the responses' lengths [tokens]
    sigma: float
    longest: int
    budget: int  # tokens a trajectory may add in one phase
    prompt_tokens: int
    open_groups: int

    def lengths(self, trajectory_ids: Sequence[int]) -> list[int]:
        """Forced lengths. Consecutive batches have the same ones, shuffled."""
        size = self.groups * self.group_size
        quantiles = [NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)]
        batch = np.clip(self.median * np.exp(self.sigma * np.array(quantiles)), 1, self.longest).astype(int)
        shuffled = {b: np.random.default_rng(b).permutation(batch) for b in {i // size for i in trajectory_ids}}
        return [int(shuffled[i // size][i % size]) for i in trajectory_ids]


FULL = Workload(groups=16, group_size=8, median=1200, sigma=1.1, longest=16384, budget=4096, prompt_tokens=64, open_groups=48)
SMALL = Workload(groups=2, group_size=2, median=8, sigma=0.8, longest=32, budget=12, prompt_tokens=5, open_groups=6)


class ForcedLengths:
    """An engine whose responses end, as `stop`, at the length that was drawn for them."""

    is_restarting = False

    def __init__(self, engine: SGLangEngine, workload: Workload) -> None:
        self.name, self.capabilities = engine.name, engine.capabilities
        self.abort = engine.abort
        self._engine, self._workload = engine, workload

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        lengths = self._workload.lengths([r.trajectory_id for r in requests])
        left = {
            r.trajectory_id: length - (len(r.token_ids) - self._workload.prompt_tokens)
            for r, length in zip(requests, lengths, strict=True)
        }
        ends_here = {r.trajectory_id for r in requests if left[r.trajectory_id] <= r.max_new_tokens}
        forced = [replace(r, max_new_tokens=min(r.max_new_tokens, left[r.trajectory_id])) for r in requests]
        async with aclosing(self._engine.generate(forced)) as chunks:
            async for chunk in chunks:
                is_whole = chunk.ending is Ending.LENGTH and chunk.trajectory_id in ends_here
                yield replace(chunk, ending=Ending.STOP) if is_whole else chunk


class Prompts:
    """Random token ids, a fresh prompt each time."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, workload: Workload, vocab_size: int) -> None:
        self._workload, self._vocab_size, self._drawn = workload, vocab_size, 0
        self._random = np.random.default_rng(0)

    def draw(self, n: int) -> list[Prompt]:
        return [self._one() for _ in range(n)]

    def _one(self) -> Prompt:
        self._drawn += 1
        ids = self._random.integers(3, self._vocab_size, self._workload.prompt_tokens).astype(np.int32)
        return Prompt(f"p{self._drawn}", (Message("user", ""),), ids, "", "exact")

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    async def score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome:
        return Outcome(OutcomeKind.VALUE, 1.0, True)


@dataclass
class Phases:
    """What a side's iterations took and brought."""

    seconds: list[float] = field(default_factory=list)  # rollout and switch
    tokens: list[int] = field(default_factory=list)  # trained
    switch: list[float] = field(default_factory=list)  # of the seconds, release and resume
    versions_behind: list[float] = field(default_factory=list)

    def add(self, side: str, seconds: float, tokens: int, switch: float) -> None:
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.switch.append(switch)
        print(f"  {side}: {seconds:.2f} s, {tokens} tokens trained, {tokens / seconds:.0f} tokens/s", flush=True)

    def rate(self, train_tokens_per_s: float | None) -> float:
        """Trained tokens per second of whole iterations."""
        training = sum(self.tokens) / train_tokens_per_s if train_tokens_per_s else 0.0
        return sum(self.tokens) / (sum(self.seconds) + training)


async def switch(engine: SGLangEngine) -> float:
    """The server's KV cache away and back, as around a training phase [s]."""
    start = time.perf_counter()
    await engine.release_memory(["kv_cache"])
    await engine.resume_memory(["kv_cache"])
    return time.perf_counter() - start


async def partial(
    setup: Setup, workload: Workload, engine: SGLangEngine, clock: Clock, *, warmups: int, most: int, keep: bool, reserve_s: float
) -> Phases:
    """Iterations of the scheduler from an empty buffer; the first `warmups` are not counted. keep: KV stays between them."""
    found, side = Phases(), "KV kept" if keep else "partial"
    prompts = Prompts(workload, setup.model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        buffer = ReplayBuffer(Path(folder) / "buffer.sqlite", run_id="benchmark")
        forced: Engine = ForcedLengths(engine, workload)  # type: ignore[assignment]
        rollout = Rollout(buffer, [forced], prompts, prompts, prompts, setup.config, setup.model)
        try:
            first = engine.weight_version
            for iteration in range(warmups + most):
                if iteration > warmups and clock.left < reserve_s:
                    break
                if not keep:
                    await engine.adopt(first + iteration)
                start = time.perf_counter()
                batch = await rollout.run(iteration, engine.weight_version)
                buffer.record_batch(iteration, [group.id for group in batch])
                switched = 0.0 if keep else await switch(engine)
                seconds = time.perf_counter() - start
                if iteration >= warmups:
                    found.add(side, seconds, trained(batch, workload), switched)
                    found.versions_behind.append(behind(batch, engine.weight_version))
                else:
                    print(f"  {side}, not counted: {seconds:.2f} s, {trained(batch, workload)} tokens", flush=True)
        finally:
            buffer.close()
    return found


def trained(batch: Sequence[Group], workload: Workload) -> int:
    """Tokens of a batch, whose lengths are checked to be the forced ones."""
    trajectories = [t for group in batch for t in group.trajectories]
    made = [t.num_tokens for t in trajectories]
    wanted = workload.lengths([t.id for t in trajectories])
    assert made == wanted, f"lengths {made[:8]}..., forced were {wanted[:8]}..."
    return sum(made)


def behind(batch: Sequence[Group], version: int) -> float:
    versions = np.concatenate([t.weight_versions for group in batch for t in group.trajectories])
    return float(np.mean(version - versions))


async def waiting_for_all(setup: Setup, workload: Workload, engine: SGLangEngine, most: int, clock: Clock) -> Phases:
    """Iterations of fresh groups, each as long as its longest response."""
    found, prompts = Phases(), Prompts(workload, setup.model.vocab_size)
    forced = ForcedLengths(engine, workload)
    size = workload.groups * workload.group_size
    for iteration in range(most):
        if iteration and clock.left < found.seconds[-1]:
            break
        requests = []
        for group in range(workload.groups):
            (prompt,) = prompts.draw(1)
            first = iteration * size + group * workload.group_size
            requests += [
                Request(first + i, prompt.token_ids, workload.longest, Sampling(), engine.weight_version, prompt.id)
                for i in range(workload.group_size)
            ]
        start, tokens = time.perf_counter(), 0
        async for chunk in forced.generate(requests):
            tokens += len(chunk.token_ids)
        switched = await switch(engine)
        found.add("waiting for all", time.perf_counter() - start, tokens, switched)
        assert tokens == sum(workload.lengths([r.trajectory_id for r in requests]))
    return found


def rows_of(mine: Phases, theirs: Phases | None, speed: float, label: str) -> list[Row]:
    rows = []
    for training, assumed in ((None, "no training time"), (speed, f"training at {speed:.0f} tokens/s")):
        ours, peer = mine.rate(training), theirs.rate(training) if theirs else None
        spread = sorted(n / s for n, s in zip(mine.tokens, mine.seconds, strict=True))
        rows.append(
            Row(
                f"{label}, {assumed}",
                "trained tokens/s",
                round(ours),
                None if peer is None else round(peer),
                "waiting for all of a batch" if theirs else "waiting for all: failed",
                None if peer is None else round(TARGET * peer),
                None if peer is None else round(ours / peer, 3),
                None if peer is None else round(ours / peer / TARGET, 3),
                {} if training else {"ours": (round(spread[0]), round(spread[-1]))},
            )
        )
    return rows


async def measure(setup: Setup, workload: Workload, clock: Clock, out: Path, speed: float) -> dict[str, str]:
    failures: dict[str, str] = {}
    sides: dict[str, Phases] = {}

    def write() -> None:
        mine, theirs, kept = (sides.get(name) for name in ("partial", "waiting", "kept"))
        rows = rows_of(mine, theirs, speed, "partial rollouts, KV computed again") if mine else []
        rows += rows_of(kept, theirs, speed, "partial rollouts, KV kept at no cost") if kept else []
        show(rows)
        curves = {f"{name}_{key}": getattr(p, key) for name, p in sides.items() for key in ("seconds", "tokens", "switch")}
        if mine:
            curves["versions_behind"] = mine.versions_behind
            print(f"  trained tokens lie {mean(mine.versions_behind):.2f} versions behind on average", flush=True)
        packages = ["torch", "aiohttp"] if setup.small else ["torch", "sglang", "aiohttp"]
        write_result("partial_rollouts", rows, ceilings={}, packages=packages, curves=curves, device=setup.device, folder=out)

    clock.tell("starting the server")
    async with open_server(setup) as (engine, _):
        clock.tell("partial rollouts")
        counts = {"warmups": 2, "most": 3 if setup.small else 7}
        reserve_s = 0 if setup.small else 40  # for the peer
        side = partial(setup, workload, engine, clock, keep=False, reserve_s=reserve_s, **counts)
        sides |= {"partial": p} if (p := await attempt("partial rollouts", side, failures)) else {}
        clock.tell("waiting for all")
        side = waiting_for_all(setup, workload, engine, 1, clock)
        sides |= {"waiting": p} if (p := await attempt("waiting for all", side, failures)) else {}
        write()
        if clock.has_time_for("KV kept", 0 if setup.small else 25):
            side = partial(setup, workload, engine, clock, keep=True, reserve_s=5, **(counts | {"most": 3}))
            sides |= {"kept": p} if (p := await attempt("KV kept", side, failures)) else {}
            write()
    return failures


def settings(workload: Workload) -> list[str]:
    w = workload
    return [
        "rollout.sglang.mem_fraction=0.5",
        f"rollout.sglang.stream_interval={min(64, w.budget // 2)}",
        "rollout.repetition.enabled=false",
        f"rollout.group_size={w.group_size}",
        f"rollout.groups_per_iteration={w.groups}",
        f"rollout.min_groups={w.groups}",
        f"rollout.max_open_groups={w.open_groups}",
        f"rollout.token_budget={w.budget}",
        f"rollout.max_response_tokens={w.longest}",
        "rollout.max_segments=64",  # the end of a phase cuts segments too, and none may end as `length` here
        "rollout.max_staleness=64",
    ]


def main() -> None:
    parser = command_line(__doc__, seconds=165, then="nothing is started")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--train-tokens-per-s", type=float, default=40000, help="speed of the training that is not done")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        parser.error("no GPU here; --small tries the code on a CPU")
    clock, workload = Clock.of(arguments.seconds), SMALL if arguments.small else FULL
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(Path(folder), small=arguments.small, layers=arguments.layers, overrides=settings(workload))
        failures = asyncio.run(measure(setup, workload, clock, arguments.out, arguments.train_tokens_per_s))
    for what, reason in failures.items():
        print(f"MISSING {what}: {reason}")
    print(f"{clock.seconds - clock.left:.0f} s; {arguments.out}/partial_rollouts.json")


if __name__ == "__main__":
    main()
