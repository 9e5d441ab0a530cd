"""The KV tensors: one pool of pages, and the two layouts in which a forward pass reads and writes it.

`Prefill` runs many new tokens of a few trajectories, `Decode` one new token of many, padded to a fixed number of rows.
Which page is whose is not known here (`scheduler.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from megatron_rl.model_config import ModelConfig


class KVCache:
    """pool: [layers, pages, 2 (key, value), kv_heads, page_size, head_dim]; keys are rotated."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.page_size = page_size
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.device = device
        shape = (config.num_layers, num_pages, 2, config.num_kv_heads, page_size, config.head_dim)
        # Zeroed because masked positions are still multiplied: what stands there must be finite.
        self.pool = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        return config.num_layers * 2 * config.num_kv_heads * page_size * config.head_dim * dtype.itemsize

    def copy_page(self, source: int, target: int) -> None:
        self.pool[:, target] = self.pool[:, source]

    def rows(self, pages: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Where tokens are written, int64 [tokens * 2 * kv_heads], in rows of head_dim of one layer's pool.

        pages, positions: [tokens], the page that holds each token and its position in the trajectory."""
        size, num_parts = self.page_size, 2 * self.num_kv_heads
        parts = pages[:, None].astype(np.int64) * num_parts + np.arange(num_parts)
        return torch.from_numpy((parts * size + (positions % size)[:, None]).reshape(-1)).to(self.device)

    def write(self, layer: int, rows: torch.Tensor, key_value: torch.Tensor) -> None:
        self.pool[layer].view(-1, self.head_dim).index_copy_(0, rows, key_value.reshape(-1, self.head_dim))

    def heads(self, tables: np.ndarray) -> torch.Tensor:
        """Index of `read` for page tables [trajectories, pages]; int64 [2 * trajectories * kv_heads * pages]."""
        parts = np.arange(2 * self.num_kv_heads).reshape(2, 1, self.num_kv_heads, 1)
        index = tables[None, :, None, :].astype(np.int64) * (2 * self.num_kv_heads) + parts
        return torch.from_numpy(index.reshape(-1)).to(self.device)

    def read(self, layer: int, heads: torch.Tensor, num_trajectories: int) -> torch.Tensor:
        """[2, trajectories, kv_heads, pages * page_size, head_dim]"""
        pool = self.pool[layer].view(-1, self.page_size, self.head_dim)
        found = pool.index_select(0, heads)
        return found.view(2, num_trajectories, self.num_kv_heads, -1, self.head_dim)


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one trajectory: positions start .. end - 1. `pages` hold positions 0 .. end - 1."""

    pages: Sequence[int]
    start: int
    end: int


class Prefill:
    """New tokens of several trajectories, one span after another; each attends to its own past."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._spans = spans
        positions = np.concatenate([np.arange(s.start, s.end) for s in spans])
        pages = np.concatenate([np.asarray(s.pages)[np.arange(s.start, s.end) // cache.page_size] for s in spans])
        self.positions = torch.from_numpy(positions).to(cache.device)
        self._rows = cache.rows(pages, positions)
        self._heads = [cache.heads(np.asarray(s.pages)[None, : -(-s.end // cache.page_size)]) for s in spans]
        self._masks = [None if s.start == 0 else self._mask(s) for s in spans]

    def attend(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        self._cache.write(layer, self._rows, key_value)
        parts = []
        first = 0
        for span, heads, mask in zip(self._spans, self._heads, self._masks, strict=True):
            num_tokens = span.end - span.start
            q = query[first : first + num_tokens].transpose(0, 1)[None]
            key, value = self._cache.read(layer, heads, 1)[..., : span.end, :]
            out = functional.scaled_dot_product_attention(q, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            parts.append(out[0].transpose(0, 1).flatten(1))
            first += num_tokens
        return torch.cat(parts)

    def _mask(self, span: Span) -> torch.Tensor:
        """bool [new tokens, span.end]: True where a token may look."""
        device = self._cache.device
        return torch.arange(span.end, device=device)[None] <= torch.arange(span.start, span.end, device=device)[:, None]


class Decode:
    """One new token of each trajectory, the last; `lengths` count it. Rows beyond the tables given are padding."""

    def __init__(self, cache: KVCache, tables: Sequence[Sequence[int]], lengths: Sequence[int], num_rows: int) -> None:
        self._cache = cache
        self._num_rows = num_rows
        width = -(-max(lengths) // cache.page_size)
        padded = np.zeros((num_rows, width), dtype=np.int64)  # page 0: nobody's
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            num_pages = -(-length // cache.page_size)
            padded[row, :num_pages] = table[:num_pages]
        last = np.zeros(num_rows, dtype=np.int64)
        last[: len(lengths)] = np.asarray(lengths) - 1
        self.positions = torch.from_numpy(last).to(cache.device)
        self._rows = cache.rows(padded[np.arange(num_rows), last // cache.page_size], last)
        self._heads = cache.heads(padded)
        seen = np.arange(width * cache.page_size)[None] <= last[:, None]
        self._mask = torch.zeros(seen.shape, dtype=cache.pool.dtype).masked_fill_(torch.from_numpy(~seen), -torch.inf)
        self._mask = self._mask.to(cache.device)[:, None, None]  # [rows, 1, 1, tokens]

    def attend(self, layer: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        self._cache.write(layer, self._rows, key_value)
        key, value = self._cache.read(layer, self._heads, self._num_rows)
        # The query heads that share a KV head stand as rows of one small matrix, so keys are read once for all of them.
        grouped = query.reshape(self._num_rows, self._cache.num_kv_heads, -1, self._cache.head_dim)
        out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=self._mask)
        return out.reshape(self._num_rows, -1)
