"""KV of unfinished trajectories, copied to the host and put back.

A snapshot is bound to what it was computed from; one that does not fit this engine is answered with False and the
trajectory is recomputed. Where snapshots live between phases is not decided here.
"""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import KVSnapshot, Request, Sampling
from megatron_rl.rollout.engines.embedded.kv_cache import KVCache
from megatron_rl.rollout.engines.embedded.scheduler import Running, Scheduler
from megatron_rl.types import Ending


def fingerprint(model: ModelConfig, cache: KVCache, identity: str) -> str:
    """identity: whatever else KV depends on, such as run and lineage."""
    text = f"{identity} {model} {cache.pool.dtype} keys rotated in pair order"
    return hashlib.sha256(text.encode()).hexdigest()


def take(scheduler: Scheduler, cache: KVCache, trajectory_id: int, mark: str) -> KVSnapshot | None:
    """Host copy of a retained trajectory's KV; None where there is none. mark: the engine's fingerprint."""
    held = scheduler.retained.get(trajectory_id)
    if held is None:
        return None
    num_tokens = held.num_computed
    pages = cache.pool[:, held.pages].cpu()  # [layers, pages, 2, kv_heads, page_size, head_dim]
    flat = pages.permute(2, 0, 1, 4, 3, 5).flatten(2, 3)[:, :, :num_tokens].contiguous()
    versions = np.repeat(scheduler.pages.versions(held.pages), cache.page_size)[:num_tokens]
    token_ids = held.tokens[:num_tokens].copy()
    return KVSnapshot(trajectory_id, token_ids, versions.astype(np.int32), flat[0], flat[1], mark)


def put_back(scheduler: Scheduler, cache: KVCache, snapshot: KVSnapshot, mark: str, oldest_kept: int) -> bool:
    """Whether the snapshot's KV is in place; False where it is another engine's, too old, or finds no free pages."""
    num_tokens = len(snapshot.token_ids)
    size = cache.page_size
    num_pages = scheduler.count_for(num_tokens)
    held = scheduler.retained.get(snapshot.trajectory_id)
    if held is not None and held.num_computed >= num_tokens and (held.tokens[:num_tokens] == snapshot.token_ids).all():
        return True
    fits = snapshot.fingerprint == mark and 0 < num_pages <= scheduler.pages.num_free
    versions_fit = bool(((snapshot.kv_versions >= oldest_kept) & (snapshot.kv_versions <= scheduler.version)).all())
    if held is not None or not fits or not versions_fit:
        return False
    request = Request(snapshot.trajectory_id, snapshot.token_ids, 0, Sampling(), scheduler.version, kv_key="")
    trajectory = Running(request, num_tokens, snapshot.token_ids.copy(), num_tokens, num_computed=num_tokens)
    trajectory.ending = Ending.ABORT
    for i in range(num_pages):
        part = slice(i * size, min((i + 1) * size, num_tokens))
        page = int(scheduler.pages.take(1, int(snapshot.kv_versions[part].min()))[0])
        num_filled = part.stop - part.start
        for kind, source in enumerate((snapshot.keys, snapshot.values)):
            cache.pool[:, page, kind, :, :num_filled] = source[:, part].transpose(1, 2).to(cache.device)
        trajectory.pages.append(page)
    trajectory.kv_version = int(snapshot.kv_versions.min())
    scheduler.retain(trajectory)
    return True
