"""`rollout.kv_policy=keep` on rank 0: which trajectories' KV outlives the training phase, and what came of it.

    phase ends   --put_away-->   engines copy the KV of unfinished trajectories to their hosts; only descriptors come here
    next phase   <--bring_back-- each engine puts back what it kept; what it cannot is computed again, and counted

Where the bytes are and what fits an engine is the engine's business (`engines/base.py`, `kv_store.py`); a trajectory is
continued by the engine of its last segment (`scheduler.py`), which is the one asked here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import fields

from megatron_rl.rollout.engines.base import Engine, KVSnapshot, KVUsage
from megatron_rl.types import Group

log = logging.getLogger(__name__)


class KeptKV:
    """Of all engines. One call at a time, while no request runs."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = [engine for engine in engines if engine.capabilities.kv_snapshot]
        self._snapshots: dict[str, list[KVSnapshot]] | None = None  # by engine; None: this start has not asked yet
        self._num_restored = self._num_recomputed = 0  # tokens, since the last `take_metrics`
        self._reported = KVUsage()

    async def put_away(self, unfinished: Sequence[Group]) -> None:
        """Keep the KV of these groups' unfinished trajectories; engines forget that of all others."""
        wanted = {engine.name: sorted(_contexts(unfinished, engine)) for engine in self._engines}
        answers = await asyncio.gather(*(engine.snapshot_kv(wanted[engine.name]) for engine in self._engines))
        self._snapshots = {engine.name: found for engine, found in zip(self._engines, answers, strict=True)}

    async def bring_back(self, unfinished: Sequence[Group]) -> None:
        """Before a phase: put KV back on the devices. After a start the engines are first asked what they found in files."""
        if self._snapshots is None:
            await self.put_away(unfinished)
        assert self._snapshots is not None, "just asked"
        for engine in self._engines:
            contexts = _contexts(unfinished, engine)
            known = [s for s in self._snapshots[engine.name] if s.trajectory_id in contexts]
            known.sort(key=lambda s: -len(s.token_ids))  # where room is short, what costs most to compute comes first
            in_place = await engine.restore_kv(known) if known else []
            restored = sum(len(s.token_ids) for s, found in zip(known, in_place, strict=True) if found)
            self._num_restored += restored
            self._num_recomputed += max(0, sum(contexts.values()) - restored)
        if self._num_restored or self._num_recomputed:
            log.info("KV of %d tokens put back, of %d to be computed again", self._num_restored, self._num_recomputed)

    async def take_metrics(self) -> dict[str, float]:
        """`kv/*` since the last call: the row of one iteration."""
        answers = await asyncio.gather(*(engine.kv_usage() for engine in self._engines))
        total = KVUsage(*(sum(getattr(usage, f.name) for usage in answers) for f in fields(KVUsage)))
        before, self._reported = self._reported, total
        new = KVUsage(*(getattr(total, f.name) - getattr(before, f.name) for f in fields(KVUsage)))
        restored, recomputed = self._num_restored, self._num_recomputed
        self._num_restored = self._num_recomputed = 0
        row: dict[str, float] = {
            "kv/snapshot_bytes": new.snapshot_bytes,
            "kv/snapshot_s": new.snapshot_s,
            "kv/restore_s": new.restore_s,
            "kv/spilled_bytes": new.spilled_bytes,
            "kv/restored_tokens": restored,
            "kv/recomputed_tokens": recomputed,
            "kv/restore_failures": new.restore_failures,
        }
        if restored + recomputed:
            row["kv/hit_rate"] = restored / (restored + recomputed)
        if new.drift_tokens:
            row["kv/drift_logp_abs_mean"] = new.drift_sum / new.drift_tokens
        return row


def _contexts(unfinished: Sequence[Group], engine: Engine) -> dict[int, int]:
    """Trajectory id -> tokens whose KV its continuation needs, of those that `engine` will continue."""
    return {
        t.id: len(group.prompt.token_ids) + t.num_tokens - 1
        for group in unfinished
        for t in group.trajectories
        if t.segments and t.segments[-1].engine == engine.name and not t.segments[-1].ending.ends_trajectory
    }
