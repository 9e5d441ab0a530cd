"""The requests of one POST /generate, as SGLang 0.5.15 takes them apart, and what the fake server knows of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_rl.rollout.engines.base import Request


@dataclass
class Answer:
    """State of one running request."""

    one: dict[str, Any]
    request: Request
    num_cached: int
    made: list[list[Any]] = field(default_factory=list)  # [log-prob, token, None]
    num_sent: int = 0


def each(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Its requests with what is asked of all: lists, one entry each, of the fields that may differ."""
    rids, ids, keys, params = (body[name] for name in ("rid", "input_ids", "extra_key", "sampling_params"))
    if not ids or not all(isinstance(one, list) for one in ids):
        raise ValueError("input_ids should be a list of lists for batch processing.")
    if len(rids) != len(ids):
        raise ValueError("The specified rids length mismatch with the batch_size for batch processing.")
    if len(keys) != len(ids):
        raise ValueError("The length of extra_key should be equal to the batch size.")
    if len(set(rids)) != len(rids):
        raise ValueError(f"Duplicate request IDs detected within the request: {rids}")
    own = zip(rids, ids, keys, params, strict=True)
    return [
        body | {"rid": rid, "input_ids": tokens, "extra_key": key, "sampling_params": p, "index": i}
        for i, (rid, tokens, key, p) in enumerate(own)
    ]
