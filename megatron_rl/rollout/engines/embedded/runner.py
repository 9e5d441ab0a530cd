"""The engine without its thread: takes requests, runs one step at a time, hands out chunks.

All its methods are called from one thread. It refuses what could never run (`check`); deadlines and the event loop are
`engine.py`'s, the order of work is `scheduler.py`'s, the tensors are `model.py`'s and `kv_cache.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron_rl.config import EmbeddedConfig
from megatron_rl.errors import EngineError
from megatron_rl.kernels.kv_pages import PagedPool, slot_bytes_of
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Chunk, KVSnapshot, Request
from megatron_rl.rollout.engines.embedded import drift, snapshots
from megatron_rl.rollout.engines.embedded.kv_cache import Decode, KVCache, Prefill, Span
from megatron_rl.rollout.engines.embedded.model import CausalModel
from megatron_rl.rollout.engines.embedded.sampling import Draw, sample
from megatron_rl.rollout.engines.embedded.scheduler import Piece, Running, Scheduler
from megatron_rl.rollout.engines.embedded.weights import WeightLoader
from megatron_rl.rollout.kv_store import KeepKV, KVStore
from megatron_rl.types import Ending

CHUNK_TOKENS = 8  # tokens gathered before a chunk is handed out


@dataclass
class _Output:
    """Tokens of one request that no chunk has carried yet."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    kv_versions: list[int] = field(default_factory=list)


class Runner:
    def __init__(
        self,
        model: ModelConfig,
        config: EmbeddedConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep: KeepKV | None = None,
        identity: str = "",
    ) -> None:
        """Raises EngineError when `kv_bytes` does not hold a single page. keep, identity: as in `EmbeddedEngine`."""
        assert max(config.batch_sizes) >= config.max_running, "checked with the configuration"
        self.config = config
        self.model_config = model
        self._model = CausalModel(model, dtype, device)
        self._batch_sizes = sorted(config.batch_sizes)
        self._outputs: dict[int, _Output] = {}
        self._running: dict[int, Running] = {}
        self._loader: WeightLoader | None = None
        self.has_weights = False
        self._num_pages = config.kv_bytes // KVCache.page_bytes(model, config.page_size, dtype)
        if self._num_pages < 2:
            raise EngineError(
                f"rollout.embedded.kv_bytes={config.kv_bytes}: a KV page of {config.page_size} tokens takes "
                f"{KVCache.page_bytes(model, config.page_size, dtype)} bytes and at least 2 are needed; raise it"
            )
        self.scheduler = Scheduler(
            self._num_pages, config.page_size, max_running=config.max_running, prefill_tokens=config.prefill_tokens
        )
        self.cache: KVCache | None = None
        self.store: KVStore | None = None
        self._keep = keep
        self.allocate()
        assert self.cache is not None, "just allocated"
        if keep:
            compression, pool = keep.settings.compression, PagedPool.from_pool(self.cache.pool)
            mark = snapshots.fingerprint(model, self.cache, compression, identity)
            slot_bytes, size = slot_bytes_of(pool, compression), config.page_size
            self.store = KVStore(keep, self.scheduler.pages, page_size=size, slot_bytes=slot_bytes, fingerprint=mark)
            self.store.attach(pool)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def allocate(self) -> None:
        """The KV cache, where it was released."""
        if self.cache is None:
            size = self.config.page_size
            self.cache = KVCache(self.model_config, self._num_pages, size, self._model.dtype, self._model.device)
            if self.store:
                self.store.attach(PagedPool.from_pool(self.cache.pool))

    def release(self, tags: Sequence[str]) -> None:
        """Give memory back: `kv_cache`, and with it retained KV, until `allocate`; `weights` until the next load."""
        self._refuse_while_running("release_memory")
        if "kv_cache" in tags:
            self.drop_retained()
            if self.store:
                self.store.detach()
            self.cache = None
        if "weights" in tags:
            self.has_weights = False
            for linear in self._model.linears():
                linear.clear()

    def drop_retained(self) -> None:
        for trajectory_id in list(self.scheduler.retained):
            self.scheduler.drop_retained(trajectory_id)

    def snapshot(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        """Nothing where KV is not kept, or the cache is released."""
        if self.store is None or self.cache is None:
            return []
        return snapshots.take(self.scheduler, self.store, trajectory_ids)

    def restore(self, to_restore: Sequence[KVSnapshot]) -> list[bool]:
        if self.store is None or self._keep is None or self.cache is None:
            return [False] * len(to_restore)
        in_place = snapshots.put_back(self.scheduler, self.store, to_restore, self._keep.max_age)
        restored = [s.trajectory_id for s, found in zip(to_restore, in_place, strict=True) if found]
        old = [i for i in restored if self.scheduler.retained[i].kv_version < self.scheduler.version]
        for trajectory_id in old[: self._keep.settings.drift_samples]:
            self._measure_drift(self.cache, self.store, self.scheduler.retained[trajectory_id])
        return in_place

    def _measure_drift(self, cache: KVCache, store: KVStore, trajectory: Running) -> None:
        if not self.has_weights:
            return
        found = drift.differences(self._model, cache, self.scheduler, trajectory, self.config.prefill_tokens)
        usage = store.usage
        store.usage = replace(usage, drift_sum=usage.drift_sum + float(found.sum()), drift_tokens=usage.drift_tokens + len(found))

    def check(self, request: Request) -> None:
        """Raises EngineError for a request that can never run here."""
        trajectory_id, num_context = request.trajectory_id, len(request.token_ids)
        limit = self.model_config.max_positions
        if not self.has_weights:
            raise EngineError("generate: no weights are loaded; call load_weights first")
        if self.cache is None:
            raise EngineError("generate: the KV cache is released; call resume_memory first")
        if request.weight_version != self.scheduler.version:
            raise EngineError(
                f"trajectory {trajectory_id} asks for weight version {request.weight_version}, "
                f"loaded is {self.scheduler.version}; publish before generating"
            )
        if trajectory_id in self._running:
            raise EngineError(f"trajectory {trajectory_id} is running already; abort it or wait for its last chunk")
        if not 1 <= num_context <= limit:
            raise EngineError(f"trajectory {trajectory_id}: context of {num_context} tokens; the model takes 1 to {limit}")
        num_tokens = min(num_context + request.max_new_tokens, limit)
        num_pages, num_usable, size = self.scheduler.count_for(num_tokens), self.scheduler.pages.num_usable, self.config.page_size
        if num_pages > num_usable:
            page_bytes = KVCache.page_bytes(self.model_config, size, self._model.dtype)
            raise EngineError(
                f"rollout.embedded.kv_bytes={self.config.kv_bytes}: trajectory {trajectory_id} may grow to {num_tokens} tokens "
                f"but the KV cache holds {num_usable * size}; raise it to at least "
                f"{(num_pages + 1) * page_bytes} or lower the response length"
            )

    def add(self, requests: Sequence[Request]) -> list[Chunk]:
        """Queue checked requests; the chunks of those that have no room for a token."""
        chunks = []
        for request in requests:
            trajectory = Running.of(request, self.model_config.max_positions)
            self._running[request.trajectory_id] = trajectory
            self._outputs[request.trajectory_id] = _Output()
            if trajectory.num_tokens == trajectory.max_tokens:
                trajectory.ending = Ending.LENGTH
                chunks.append(self._chunk(trajectory))
            else:
                self.scheduler.add(trajectory)
        return chunks

    def abort(self, trajectory_ids: Sequence[int] | None) -> list[Chunk]:
        chunks = []
        for trajectory_id in list(self._running) if trajectory_ids is None else trajectory_ids:
            trajectory = self._running.get(trajectory_id)
            if trajectory is not None:
                self.scheduler.end(trajectory, Ending.ABORT)
                chunks.append(self._chunk(trajectory))
        return chunks

    def step(self) -> list[Chunk]:
        """One prefill and one decode pass, as far as there is work for them."""
        assert self.cache is not None, "requests are only taken while the KV cache stands"
        plan = self.scheduler.plan()
        assert plan.prefill or plan.decode, "waiting requests and nothing to run"
        for source, target in plan.copies:
            self.cache.copy_page(source, target)
        chunks = self._prefill(self.cache, plan.prefill) if plan.prefill else []
        return chunks + self._decode(self.cache, plan.decode) if plan.decode else chunks

    def _prefill(self, cache: KVCache, pieces: list[Piece]) -> list[Chunk]:
        layout = Prefill(cache, [Span(p.trajectory.pages, p.start, p.end) for p in pieces])
        tokens = np.concatenate([p.trajectory.tokens[p.start : p.end] for p in pieces])
        hidden = self._model.forward(self._on_device(tokens), layout)
        ends = np.cumsum([p.end - p.start for p in pieces]) - 1
        for piece in pieces:
            piece.trajectory.num_computed = piece.end
        finished = [i for i, p in enumerate(pieces) if p.trajectory.num_pending == 0]
        if not finished:
            return []
        return self._draw([pieces[i].trajectory for i in finished], hidden[self._on_device(ends[finished])])

    def _decode(self, cache: KVCache, trajectories: list[Running]) -> list[Chunk]:
        num_rows = next(size for size in self._batch_sizes if size >= len(trajectories))
        layout = Decode(cache, [t.pages for t in trajectories], [t.num_tokens for t in trajectories], num_rows)
        tokens = np.zeros(num_rows, np.int32)
        tokens[: len(trajectories)] = [t.tokens[t.num_tokens - 1] for t in trajectories]
        hidden = self._model.forward(self._on_device(tokens), layout)
        for trajectory in trajectories:
            trajectory.num_computed = trajectory.num_tokens
        return self._draw(trajectories, hidden)

    def _draw(self, trajectories: list[Running], hidden: torch.Tensor) -> list[Chunk]:
        """hidden: [at least one row a trajectory, hidden]"""
        logits = self._model.logits(hidden)[: len(trajectories)]
        draws = [Draw(t.request.sampling, t.request.trajectory_id, t.num_tokens) for t in trajectories]
        token_ids, log_probs = sample(logits, draws)
        if not np.isfinite(log_probs).all():
            broken = trajectories[int(np.argmin(np.isfinite(log_probs)))].request.trajectory_id
            raise EngineError(f"trajectory {broken}: the model's logits are not finite; look at the last optimizer step")
        chunks = []
        for trajectory, token_id, log_prob in zip(trajectories, token_ids.tolist(), log_probs.tolist(), strict=True):
            output = self._outputs[trajectory.request.trajectory_id]
            output.token_ids.append(token_id)
            output.log_probs.append(log_prob)
            output.kv_versions.append(trajectory.kv_version)
            trajectory.push(token_id)
            if trajectory.ending is not None:
                self.scheduler.end(trajectory, trajectory.ending)
            if trajectory.ending is not None or len(output.token_ids) == CHUNK_TOKENS:
                chunks.append(self._chunk(trajectory))
        return chunks

    def _chunk(self, trajectory: Running) -> Chunk:
        """Everything drawn since the last chunk; the last one forgets the request."""
        trajectory_id = trajectory.request.trajectory_id
        output = self._outputs.pop(trajectory_id)
        if trajectory.ending is None:
            self._outputs[trajectory_id] = _Output()
        else:
            del self._running[trajectory_id]
        return Chunk(
            trajectory_id=trajectory_id,
            token_ids=np.array(output.token_ids, np.int32),
            log_probs=np.array(output.log_probs, np.float32),
            weight_version=self.scheduler.version,
            kv_versions=np.array(output.kv_versions, np.int32),
            cached_tokens=trajectory.num_found,
            ending=trajectory.ending,
        )

    def begin_load(self) -> None:
        self._refuse_while_running("load_weights")
        self.has_weights = False  # until all are there: half of two models is neither
        self._loader = WeightLoader(self._model)

    def take_bucket(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        assert self._loader is not None, "begin_load comes first"
        for name, tensor in bucket:
            self._loader.take(name, tensor)

    def finish_load(self, version: int) -> None:
        assert self._loader is not None, "begin_load comes first"
        self._loader.finish()
        self._loader = None
        self.has_weights = True
        self.scheduler.change_version(version, version - self._keep.max_age if self._keep else version + 1)

    def _refuse_while_running(self, what: str) -> None:
        if self.has_work:
            raise EngineError(f"{what}: {len(self._running)} requests are running; abort them or wait for their last chunks")

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._model.device)
