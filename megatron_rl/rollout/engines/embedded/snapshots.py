"""Retained KV into the host store and back: what fits this engine, its weights and its free pages.

A snapshot is bound to what it was computed from; one that does not fit is answered with False and the trajectory is
recomputed. Where the bytes are between phases: `rollout/kv_store.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import KVSnapshot, Request, Sampling
from megatron_rl.rollout.engines.embedded.kv_cache import KVCache
from megatron_rl.rollout.engines.embedded.scheduler import Running, Scheduler
from megatron_rl.rollout.kv_store import HeldKV, KVStore
from megatron_rl.types import Ending


def fingerprint(model: ModelConfig, cache: KVCache, compression: str, identity: str) -> str:
    """identity: whatever else KV depends on, such as run and lineage."""
    layout = f"{cache.pool.dtype} pages of {cache.page_size}, head-major, keys rotated in pair order, {compression}"
    return hashlib.sha256(f"{identity} {model} {layout}".encode()).hexdigest()


def take(scheduler: Scheduler, store: KVStore, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
    """Put the KV of these into the store, where there is some; the store forgets all others."""
    retained = [scheduler.retained[i] for i in trajectory_ids if i in scheduler.retained]
    held = [
        HeldKV(t.request.trajectory_id, t.tokens[: t.num_computed].copy(), np.array(t.pages, np.int64))
        for t in retained
        if t.num_computed
    ]
    return store.save(held, trajectory_ids)


def put_back(scheduler: Scheduler, store: KVStore, snapshots: Sequence[KVSnapshot], max_age: int) -> list[bool]:
    """Whether each one's KV is in place; what is there already stays, and what is too old, or too new, is left out."""
    in_place = [_is_retained(scheduler, snapshot) for snapshot in snapshots]
    oldest, newest = scheduler.version - max_age, scheduler.version
    to_restore = [
        i
        for i, snapshot in enumerate(snapshots)
        if snapshot.trajectory_id not in scheduler.retained
        and oldest <= snapshot.kv_versions.min()
        and snapshot.kv_versions.max() <= newest
    ]
    for i, held in zip(to_restore, store.restore([snapshots[i] for i in to_restore]), strict=True):
        if held is not None:
            scheduler.retain(_restored(scheduler, held))
            in_place[i] = True
    return in_place


def _is_retained(scheduler: Scheduler, snapshot: KVSnapshot) -> bool:
    held, num_tokens = scheduler.retained.get(snapshot.trajectory_id), len(snapshot.token_ids)
    return held is not None and held.num_computed >= num_tokens and bool((held.tokens[:num_tokens] == snapshot.token_ids).all())


def _restored(scheduler: Scheduler, held: HeldKV) -> Running:
    """As if it had just been aborted here."""
    num_tokens = len(held.token_ids)
    request = Request(held.trajectory_id, held.token_ids, 0, Sampling(), scheduler.version, kv_key="")
    trajectory = Running(request, num_tokens, held.token_ids.copy(), num_tokens, num_computed=num_tokens)
    trajectory.ending = Ending.ABORT
    trajectory.pages = held.pages.tolist()
    trajectory.kv_version = int(scheduler.pages.versions(held.pages).min())
    return trajectory
