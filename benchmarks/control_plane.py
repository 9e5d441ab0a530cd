"""The control plane's C++ against plain Python, on one core: repetition, packing, packed index, block allocator.

Both sides get the same input, and give the same answer, or one at least as good, before anything is timed. Repeats alternate; a
row holds medians. The peers are the tests' references and, for blocks, a pool of free list and counts in Python. The limit of
a row is its target; a ratio above 1 is better than it, or than the peer, for times too.

    python benchmarks/control_plane.py [--repeats 11]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from result_file import Row, write_result

from megatron_rl.kernels import packed_index, partition
from megatron_rl.kernels.build import state
from megatron_rl.rollout.repetition import RepetitionDetector
from megatron_rl.types import TrainingSequence
from tests.kernels import packed_index_reference, partition_reference
from tests.rollout.repetition_reference import PlainDetector

Work = Callable[[], object]
Times = tuple[list[float], list[float]]  # seconds of each repeat, ours and the peer's

NEVER = 10**6  # so many repeats are in no input: none ends the work early


def seconds(ours: Work, peer: Work, repeats: int) -> Times:
    """Of each repeat; one uncounted round first."""
    found: Times = ([], [])
    for _ in range(repeats + 1):
        for side, work in zip(found, (ours, peer), strict=True):
            start = time.perf_counter()
            work()
            side.append(time.perf_counter() - start)
    return found[0][1:], found[1][1:]


def rate_row(
    case: str, unit: str, amounts: tuple[int, int], times: tuple[list[float], list[float]], peer: str, limit: float | None
):
    """Millions a second; `amounts`: what each side does in a repeat."""
    rates = [[amount / t / 1e6 for t in side] for amount, side in zip(amounts, times, strict=True)]
    ours, theirs = map(statistics.median, rates)
    return _row(case, unit, ours, theirs, peer, limit, ours / theirs, limit and ours / limit, rates)


def time_row(case: str, unit: str, scale: float, times: Times, peer: str, limit: float) -> Row:
    scaled = [[t * scale for t in side] for side in times]
    ours, theirs = map(statistics.median, scaled)
    return _row(case, unit, ours, theirs, peer, limit, theirs / ours, limit / ours, scaled)


def _row(case, unit, ours, theirs, peer, limit, ratio, of_limit, sides) -> Row:
    spread = {name: (_short(min(side)), _short(max(side))) for name, side in zip(("ours", "peer"), sides, strict=True)}
    row = Row(case, unit, _short(ours), _short(theirs), peer, limit, _short(ratio), _short(of_limit), spread)
    print(
        f"{case}: {row.ours} {unit}, peer {row.peer}, ratio {row.ratio_to_peer}, of the target {row.ratio_to_limit}", flush=True
    )
    return row


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def detector_rows(repeats: int) -> list[Row]:
    """The plain detector sees fewer tokens: it is slow. Its cost grows with how often a token occurs among the last 512."""
    rng, num_tokens, num_plain = np.random.default_rng(0), 200_000, 2_000
    zipf = np.minimum(rng.zipf(1.2, num_tokens), 150_000)
    inputs = {
        "one token": np.zeros(num_tokens),
        "4 different tokens": rng.integers(0, 4, num_tokens),
        "Zipf 1.2": zipf,
        "150000 different tokens": rng.integers(0, 150_000, num_tokens),
    }
    rows = []
    for name, drawn in inputs.items():
        tokens = drawn.astype(np.int32)

        def ours(tokens: np.ndarray = tokens) -> None:
            assert RepetitionDetector(512, NEVER).push_many(tokens) is None

        def peer(tokens: np.ndarray = tokens) -> None:
            detector = PlainDetector(512, NEVER)
            assert not any(detector.push(token) for token in tokens[:num_plain].tolist())

        times = seconds(ours, peer, repeats)
        case = f"repetition, max period 512, {name}"
        rows.append(rate_row(case, "M tokens/s", (num_tokens, num_plain), times, "one run a period in a Python dict", 5.0))
    return rows


def packing_rows(repeats: int) -> list[Row]:
    lengths = np.clip(np.random.default_rng(0).lognormal(8, 1, 4096).round(), 1, 65536)
    rows = []
    for name, costs in {"S": lengths, "S + S^2 / 8192": lengths + lengths**2 / 8192}.items():
        listed = costs.tolist()
        plain = partition_reference.spread(listed, partition_reference.balanced(listed, 64))
        found = partition.balanced(listed, 64)
        ours = partition_reference.spread(listed, [[i for i, p in enumerate(found) if p == part] for part in range(64)])
        assert ours <= plain, "the parts are at least as even as the peer's"
        times = seconds(
            lambda listed=listed: partition.balanced(listed, 64),
            lambda listed=listed: partition_reference.balanced(listed, 64),
            repeats,
        )
        case = f"packing 4096 into 64 parts, cost {name}; spread {_short(ours)}, peer's {_short(plain)}"
        rows.append(time_row(case, "ms", 1e3, times, "heap of 64-tuples in Python", 10.0))
    return rows


def index_rows(repeats: int) -> list[Row]:
    rng, rows = np.random.default_rng(0), []

    def sequence(group: int, prompt: np.ndarray, length: int) -> TrainingSequence:
        tokens, versions = rng.integers(0, 150_000, length).astype(np.int32), np.zeros(length, np.int32)
        return TrainingSequence(group, 0, prompt, tokens, np.ones(length, bool), np.zeros(length, np.float32), versions, 0.0, 1.0)

    for num_groups, length in ((64, 64), (8, 2048)):
        prompts = [rng.integers(0, 150_000, 128).astype(np.int32) for _ in range(num_groups)]
        families = [[sequence(g, prompt, length) for _ in range(8)] for g, prompt in enumerate(prompts)]
        expected, found = packed_index_reference.build(families, 64), packed_index.build(families, 64)
        assert all(np.array_equal(getattr(found, name), array) for name, array in vars(expected).items())
        num_tokens = len(expected.token_ids)
        times = seconds(
            lambda families=families: packed_index.build(families, 64),
            lambda families=families: packed_index_reference.build(families, 64),
            repeats,
        )
        case = f"packed index, {num_groups} groups of 8 responses of {length} tokens"
        rows.append(rate_row(case, "M tokens/s", (num_tokens, num_tokens), times, "numpy, array by array", None))
    return rows


class PlainPool:
    """Who holds which block, with lists: a free list, and a number of holders and a version of each block."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks
        self._versions = [0] * num_blocks

    def take(self, version: int) -> int:
        block = self._free.pop()
        self._num_holders[block] = 1
        self._versions[block] = version
        return block

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            assert self._num_holders[block] > 0
            self._num_holders[block] += 1

    def drop(self, blocks: list[int]) -> None:
        for block in blocks:
            assert self._num_holders[block] > 0
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free.append(block)


def allocator_rows(repeats: int) -> list[Row]:
    """A block operation: one block taken, held once more, or dropped. A round takes, holds, drops and drops all blocks."""
    num_blocks, rounds, k = 8192, 20, 16
    allocator, pool = state.BlockAllocator(num_blocks), PlainPool(num_blocks)

    def ours() -> None:
        for _ in range(rounds):
            blocks = allocator.take(num_blocks, 1)
            allocator.hold(blocks)
            allocator.drop(blocks)
            allocator.drop(blocks)

    def peer() -> None:
        blocks = [pool.take(1) for _ in range(num_blocks)]
        pool.hold(blocks)
        pool.drop(blocks)
        pool.drop(blocks)

    amounts = (4 * num_blocks * rounds, 4 * num_blocks)
    times = seconds(ours, peer, repeats)
    rows = [rate_row("allocator, take, hold and drop 8192 blocks", "M operations/s", amounts, times, "lists in Python", 20.0)]
    ours_held, peer_held = allocator.take(num_blocks, 1), [pool.take(1) for _ in range(num_blocks)]

    def forks() -> None:  # one alone would measure the caches, which the peer's turn has filled with its own
        for _ in range(rounds):
            allocator.fork(ours_held, k)

    ours_s, peer_s = seconds(forks, lambda: [pool.hold(peer_held) for _ in range(k)], repeats)
    times = [t / rounds for t in ours_s], peer_s
    case = f"allocator, fork({k}) of 8192 blocks, one of {rounds} in a row"
    return [*rows, time_row(case, "us", 1e6, times, "lists in Python", 50.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="counted repeats")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = [row for rows in (detector_rows, packing_rows, index_rows, allocator_rows) for row in rows(repeats)]
    print(write_result("control_plane", rows, ceilings={}, packages=["numpy"]))


if __name__ == "__main__":
    main()
