"""Where the seconds of a weight publish go: its steps one after the other, and what one call costs whatever is in it.

`weight_publish.py` runs this and writes its rows. Nothing overlaps here, so the sum is more than a publish takes; on a GPU every
mark waits for the device. What a call costs is taken apart by calls that leave something out:

    HTTP alone                       a label is set: server and tokenizer process, no scheduler
    next to nothing loaded           + to the scheduler and back, a small handle
    a whole bucket opened            + the handle of a full buffer; of it, one small tensor is loaded
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from result_file import Row
from served_model import Lap, Setup

from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.rollout.engines.sglang_transport import IPC
from megatron_rl.weights.transport import FlatBucket, Flattener, Tensors, as_it_lies, layout

CALLS = 10  # of each kind that is taken apart


@dataclass
class Publish:
    """What is published, and to whom; its transport is open."""

    setup: Setup
    engine: SGLangEngine
    client: SGLangClient
    buckets: Callable[[], Iterable[Tensors]]
    bucket_bytes: int
    version: int


async def profile(publish: Publish, repeats: int) -> list[Row]:
    found = [await steps(publish) for _ in range(repeats)]
    rows = [spread_row(f"step by step: {name}", [each[name] for each in found]) for name in found[-1]]
    if isinstance(publish.setup.transport, IPC):
        rows += [spread_row(f"one call: {name}", samples) for name, samples in calls(publish).items()]
    return rows


async def steps(publish: Publish) -> dict[str, float]:
    """Seconds of each step of one publish; and how many calls it made, whose sizes are those of a real one."""
    transport, lap, num_calls = publish.setup.transport, Lap(publish.setup.device), 0
    await publish.client.post("/flush_cache?timeout=30", None)
    lap.mark("flush")
    flattener = Flattener(publish.bucket_bytes, transport.alignment)

    def deliver(bucket: FlatBucket | None) -> None:
        nonlocal num_calls
        if bucket is not None:
            num_calls += 1
            bucket.wait_until_written()
            lap.mark("pack")
            transport.deliver(bucket, transport.lend(bucket))
            lap.mark("calls: serialize, HTTP, load")
            for error in transport.failed.values():
                raise error

    for tensors in publish.buckets():
        lap.mark("gather")
        if flattener.needs_no_copy(tensors):
            deliver(as_it_lies(tensors))
            continue
        if not flattener.fits(tensors):
            deliver(flattener.take())
        flattener.add(tensors)
        lap.mark("pack")
    deliver(flattener.take())
    del flattener
    if publish.setup.device.type == "cuda":
        torch.cuda.ipc_collect()
    lap.mark("collect handles")
    await publish.engine.adopt(publish.version)
    lap.mark("label")
    return lap.seconds | {"number of calls": num_calls}


def calls(publish: Publish) -> dict[str, list[float]]:
    """Seconds of single calls, each leaving out something of a real one."""
    serialize, client, taken = publish.setup.serializer(), publish.client, {}
    small = next([entry] for tensors in publish.buckets() for entry in tensors if entry[1].dim() == 1)
    buffer = torch.empty(publish.bucket_bytes * 7 // 8, dtype=torch.uint8, device=publish.setup.device)
    buffer[: small[0][1].nbytes].copy_(small[0][1].contiguous().view(-1).view(torch.uint8))
    tiny = buffer[: small[0][1].nbytes].clone()

    def load(data: torch.Tensor) -> None:
        payload = serialize(FlatBucket(data, layout(small)))
        body = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket", "flush_cache": False}
        client.post_blocking("/update_weights_from_tensor", body)

    def label() -> None:
        client.post_blocking("/update_weight_version", {"new_version": str(publish.version), "abort_all_requests": False})

    kinds: dict[str, Callable[[], object]] = {
        "serialize": lambda: serialize(FlatBucket(buffer, layout(small))),
        "HTTP alone": label,
        "next to nothing loaded": lambda: load(tiny),
        "a whole bucket opened": lambda: load(buffer),
    }
    for name, call in kinds.items():
        taken[name] = []
        for _ in range(CALLS):
            lap = Lap(publish.setup.device)
            call()
            lap.mark(name)
            taken[name].append(lap.seconds[name])
    return taken


def spread_row(case: str, samples: list[float]) -> Row:
    unit = "calls" if "number" in case else "s"
    spread = {"ours": (round(min(samples), 5), round(max(samples), 5))}
    return Row(case, unit, round(statistics.median(samples), 5), None, None, None, None, None, spread)
