"""The Engine protocol: what generates tokens, seen from the rollout scheduler.

An engine knows token ids, weights by their Hugging Face names and a KV cache; it knows nothing of prompts, groups,
budgets, rewards or Megatron. `budget` and `repeat` are the scheduler's verdicts, never an engine's: to cut a
trajectory the scheduler gives it a small `max_new_tokens`, or aborts it.

Life of a request: generate -> Chunk* -> one last Chunk with an `ending`. A chunk may be empty. An aborted request still
yields the tokens it made, with ending `abort`. Weights change only while no request runs.
Implementations: `embedded/` (torch, in process), `remote.py` (another rank's engine over a socket), `sglang.py` (a server).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_rl.types import Ending


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Noise is a pure function of (seed, trajectory id, position, token id)."""

    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0  # 1 means off
    top_k: int = 0  # 0 means off
    min_p: float = 0.0  # 0 means off
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """Continue `token_ids` (prompt plus everything generated before) by at most `max_new_tokens` tokens."""

    trajectory_id: int
    token_ids: np.ndarray  # int32 [context]
    max_new_tokens: int
    sampling: Sampling
    weight_version: int  # the version the caller expects; another one is an error
    kv_key: str  # requests with equal keys and a common prefix may share KV pages


@dataclass(frozen=True)
class Chunk:
    """Newly generated tokens of one request, in order. A stop token is included in its chunk."""

    trajectory_id: int
    token_ids: np.ndarray  # int32 [tokens]
    log_probs: (
        np.ndarray
    )  # float32 [tokens]: log softmax(logits / temperature), before top-p/top-k/min-p; temperature 1 when greedy
    weight_version: int
    kv_versions: np.ndarray  # int32 [tokens]: oldest weight version among the KV pages each token was sampled on
    cached_tokens: int  # context tokens whose KV was found rather than computed
    ending: Ending | None  # only on the last chunk: stop, length (max_new_tokens or context used up) or abort


@dataclass(frozen=True)
class KVSnapshot:
    """Says that an engine holds the KV of one unfinished trajectory on its host, and what it was computed from.

    A descriptor: the bytes stay in the process of the engine that made it, and only that engine can restore it."""

    trajectory_id: int
    token_ids: np.ndarray  # int32 [tokens] whose KV is held: a beginning of prompt and response
    kv_versions: np.ndarray  # int32 [tokens], oldest weight version in the page of each
    pages: np.ndarray  # int64 [pages], where they are in the engine's host memory; empty: in a file
    fingerprint: str  # hash of run, lineage, model, layout and dtype; restored only into an equal engine


@dataclass(frozen=True)
class KVUsage:
    """What an engine has done with the KV of unfinished trajectories since it was made."""

    snapshot_bytes: int = 0  # copied to the host; pages that were there already do not count
    snapshot_s: float = 0.0
    restore_s: float = 0.0
    spilled_bytes: int = 0  # written to files
    restore_failures: int = 0  # trajectories whose KV was lost: no room, a damaged or missing file
    drift_sum: float = 0.0  # of |log-prob on kept KV - log-prob on fresh KV|, `rollout.kv_store.drift_samples`
    drift_tokens: int = 0


@dataclass(frozen=True)
class Capabilities:
    log_probs: bool
    kv_snapshot: bool
    memory_release: bool
    streaming: bool


class Engine(Protocol):
    """One generating engine. All methods are called from one event loop."""

    name: str  # unique in the run; recorded with every segment
    capabilities: Capabilities
    weight_version: int  # of the weights loaded now

    @property
    def is_restarting(self) -> bool:
        """Its requests wait for what will answer them to be started again, which has deadlines of its own."""
        ...

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[Chunk]:
        """Yield the chunks of all `requests` as they are made; may be called while other calls run.

        Raises EngineError for a context longer than the model's, a wrong weight version, or a dead engine."""
        ...

    async def abort(self, trajectory_ids: Sequence[int] | None) -> None:
        """End these requests (None: all). Each still yields its last chunk, with ending `abort`."""
        ...

    async def load_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """Replace all weights by buckets of (Hugging Face name, full tensor). Only with no request running;
        KV of older versions is dropped unless the KV policy keeps it."""
        ...

    async def release_memory(self, tags: Sequence[str]) -> None: ...

    async def resume_memory(self, tags: Sequence[str]) -> None: ...

    async def snapshot_kv(self, trajectory_ids: Sequence[int]) -> list[KVSnapshot]:
        """Keep the KV of these trajectories over the release of the cache, and forget that of all others.

        Returns what is kept of them, saved now or by an earlier start of the run; those without are left out."""
        ...

    async def restore_kv(self, snapshots: Sequence[KVSnapshot]) -> list[bool]:
        """One answer a snapshot: True where its KV is in place, False where it must be recomputed."""
        ...

    async def kv_usage(self) -> KVUsage: ...

    async def health(self) -> None:
        """Returns when the engine can serve; raises EngineError when it cannot."""
        ...

    async def close(self) -> None: ...
