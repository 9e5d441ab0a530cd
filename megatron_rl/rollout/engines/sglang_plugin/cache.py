"""SGLang's prefix cache seen as pages: the one file that touches its tree, allocator and pool.

Known from 0.5.15: `RadixCache.match_prefix` and `insert`, `token_to_kv_pool_allocator.alloc`, `MHATokenToKVPool.k_buffer` and
`v_buffer`, each [slots, kv_heads, head_dim], where page p is slots p * page_size to (p + 1) * page_size. Releasing the pool's
memory and taking it back leaves its addresses as they are, so a `PagedPool` made once stays right; the content is lost.
Anything else than that cache and that layout is refused. Used on the scheduler's thread, while the server is idle.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import torch

from megatron_rl.errors import EngineError
from megatron_rl.kernels.kv_pages import PagedPool
from megatron_rl.rollout.engines.sglang_compat import radix_types


class PrefixCache:
    def __init__(self, scheduler: Any) -> None:
        """Raises EngineError for a server whose cache is of another kind, KernelError for a pool of another layout."""
        self._scheduler = scheduler
        self._tree, self._allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
        self._types = radix_types()
        kind, ranks = type(self._tree).__name__, scheduler.ps
        if kind != "RadixCache" or self._tree.disable:
            raise EngineError(
                f"rollout.kv_policy=keep: needs a server whose prefix cache is RadixCache and switched on, found {kind}; see "
                "rollout.sglang.server_arguments (disable_radix_cache, enable_hierarchical_cache, radix_cache_backend)"
            )
        if self._tree.is_eagle or ranks.pp_size != 1 or ranks.dp_size != 1:
            raise EngineError(
                "rollout.kv_policy=keep: a server with speculative decoding, pipeline or data parallelism cannot keep KV; see "
                "rollout.sglang.server_arguments"
            )
        buffers = self._allocator.get_kvcache()
        if not hasattr(buffers, "k_buffer"):
            raise EngineError(f"rollout.kv_policy=keep: the server's KV pool, {type(buffers).__name__}, holds no keys and values")
        self.page_size = int(self._tree.page_size)
        self.pool = PagedPool.from_layers(buffers.k_buffer, buffers.v_buffer, self.page_size)

    @property
    def is_idle(self) -> bool:
        """No request runs or waits, and the results of all forward passes have been taken."""
        return bool(self._scheduler.is_fully_idle())

    def find(self, cache_key: str, token_ids: np.ndarray) -> np.ndarray:
        """Pages int64 [pages] of the longest beginning of token_ids, int32 [tokens], that is cached under that key."""
        return self._pages(self._match(cache_key, token_ids))

    def place(self, cache_key: str, token_ids: np.ndarray) -> np.ndarray | None:
        """Enter whole pages of tokens. Returns pages, int64 [new pages], for the last of them, whose content the caller owes;
        those before are there already. None, and nothing is entered, where free room is short."""
        assert len(token_ids) % self.page_size == 0, "only whole pages are kept"
        there = self._match(cache_key, token_ids)
        num_new = len(token_ids) - len(there)
        if num_new == 0:
            return np.zeros(0, np.int64)
        new = self._allocator.alloc(num_new)
        if new is None:
            return None
        key = self._key(cache_key, token_ids)
        result = self._tree.insert(self._types.InsertParams(key=key, value=torch.cat([there, new])))
        assert result.prefix_len == len(there), "nothing came between"
        return self._pages(new)

    def clear(self) -> None:
        """Forget everything: what `place` promised could not be kept."""
        self._scheduler.flush_cache()

    def _match(self, cache_key: str, token_ids: np.ndarray) -> torch.Tensor:
        params = self._types.MatchPrefixParams(key=self._key(cache_key, token_ids))
        return self._tree.match_prefix(params).device_indices

    def _key(self, cache_key: str, token_ids: np.ndarray) -> Any:
        return self._types.RadixKey(array("q", token_ids.astype(np.int64).tobytes()), cache_key)

    def _pages(self, slots: torch.Tensor) -> np.ndarray:
        return (slots[:: self.page_size] // self.page_size).to("cpu", torch.int64).numpy()
