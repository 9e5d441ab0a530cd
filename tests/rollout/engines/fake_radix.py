"""SGLang 0.5.15's prefix cache, allocator, pool and scheduler as a plugin meets them, on a CPU and by hand.

Like the original: whole pages only; page 0 is padding; tokens under another `extra_key` are never found; an allocator that gives
None where room is short; `insert` that keeps what is there and says how much that was; releasing the pool's memory spoils its
content and empties the tree. The content of a slot says which token it was computed for, and with which weights.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

LAYERS, HEADS, HEAD_DIM = 2, 1, 4
_WEIGHTS = 1 << 16  # slot content: token + _WEIGHTS * number of the weights


@dataclass
class RadixKey:
    token_ids: array
    extra_key: str | None = None


@dataclass
class MatchPrefixParams:
    key: RadixKey


@dataclass
class InsertParams:
    key: RadixKey
    value: torch.Tensor


class RadixCache:
    disable = is_eagle = False

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[tuple[str | None, bytes], torch.Tensor] = {}  # (key, all tokens up to a page's end) -> its slots

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        found = []
        for entry in self._entries(params.key):
            if entry not in self.slots:
                break
            found.append(self.slots[entry])
        return SimpleNamespace(device_indices=torch.cat([torch.zeros(0, dtype=torch.int64), *found]))

    def insert(self, params: InsertParams) -> Any:
        entries = list(self._entries(params.key))
        there = sum(entry in self.slots for entry in entries)
        for i, entry in enumerate(entries):
            if entry not in self.slots:
                self.slots[entry] = params.value[i * self.page_size : (i + 1) * self.page_size].clone()
        return SimpleNamespace(prefix_len=there * self.page_size)

    def reset(self) -> None:
        self.slots.clear()

    def _entries(self, key: RadixKey) -> list[tuple[str | None, bytes]]:
        assert key.token_ids.typecode == "q"
        ends = range(self.page_size, len(key.token_ids) + 1, self.page_size)
        return [(key.extra_key, key.token_ids[:end].tobytes()) for end in ends]


class Allocator:
    def __init__(self, num_slots: int, page_size: int) -> None:
        self.size, self.page_size = num_slots, page_size
        shape = (num_slots + page_size, HEADS, HEAD_DIM)
        self._pool = SimpleNamespace(
            k_buffer=[torch.zeros(shape) for _ in range(LAYERS)], v_buffer=[torch.zeros(shape) for _ in range(LAYERS)]
        )
        self.clear()

    def get_kvcache(self) -> Any:
        return self._pool

    def alloc(self, num_slots: int) -> torch.Tensor | None:
        assert num_slots % self.page_size == 0
        num_pages = num_slots // self.page_size
        if num_pages > len(self._free):
            return None
        pages, self._free = self._free[:num_pages], self._free[num_pages:]
        return (torch.tensor(pages, dtype=torch.int64)[:, None] * self.page_size + torch.arange(self.page_size)).reshape(-1)

    def free(self, slots: torch.Tensor) -> None:
        self._free += (slots[:: self.page_size] // self.page_size).tolist()

    def available_size(self) -> int:
        return len(self._free) * self.page_size

    def clear(self) -> None:
        self._free = list(range(1, self.size // self.page_size + 1))


class Scheduler:
    """What a plugin sees of it, and what computing and releasing does to it."""

    def __init__(self, num_slots: int = 4096, page_size: int = 1, rank: int = 0, num_ranks: int = 1) -> None:
        self.ps = SimpleNamespace(tp_rank=rank, tp_size=num_ranks, pp_size=1, dp_size=1)
        self.tree_cache = RadixCache(page_size)
        self.token_to_kv_pool_allocator = Allocator(num_slots, page_size)
        self.is_fully_idle: Callable[[], bool] = lambda: True

    def flush_cache(self) -> None:
        self.tree_cache.reset()
        self.token_to_kv_pool_allocator.clear()

    def release(self) -> None:
        for buffer in self._buffers:
            buffer.fill_(torch.nan)
        self.flush_cache()

    def find(self, extra_key: str, token_ids: Sequence[int]) -> torch.Tensor:
        """Slots of the longest beginning that is cached."""
        return self.tree_cache.match_prefix(MatchPrefixParams(RadixKey(array("q", token_ids), extra_key))).device_indices

    def compute(self, extra_key: str, token_ids: Sequence[int], weights: int) -> None:
        """KV of tokens that are not cached yet, as far as there is room."""
        whole = list(token_ids)[: len(token_ids) // self.tree_cache.page_size * self.tree_cache.page_size]
        there = self.find(extra_key, whole)
        new = self.token_to_kv_pool_allocator.alloc(len(whole) - len(there))
        if new is None:
            return
        for buffer in self._buffers:
            buffer[new] = torch.tensor(whole[len(there) :], dtype=torch.float32)[:, None, None] + _WEIGHTS * weights
        self.tree_cache.insert(InsertParams(RadixKey(array("q", whole), extra_key), torch.cat([there, new])))

    def evict(self, extra_key: str, token_ids: Sequence[int]) -> None:
        """The pages of these tokens but not of a shorter beginning: the last one."""
        entry = self.tree_cache._entries(RadixKey(array("q", token_ids), extra_key))[-1]
        self.token_to_kv_pool_allocator.free(self.tree_cache.slots.pop(entry))

    def weights_of(self, extra_key: str, token_ids: Sequence[int]) -> list[int]:
        """Which weights each cached token was computed with; fails where a slot holds another token's KV, or none."""
        slots = self.find(extra_key, token_ids)
        content = torch.stack([buffer[slots] for buffer in self._buffers], 1).flatten(1)
        assert (content == content[:, :1]).all(), "one slot, one token"
        assert (content[:, 0] % _WEIGHTS).tolist() == list(token_ids)[: len(slots)], "another token's KV"
        return (content[:, 0] // _WEIGHTS).int().tolist()

    @property
    def _buffers(self) -> list[torch.Tensor]:
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        return [*pool.k_buffer, *pool.v_buffer]


class HookRegistry:
    hooks: dict[str, Callable[..., Any]] = {}

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: str) -> None:
        assert hook_type == "before"
        cls.hooks[target] = hook


def modules() -> dict[str, ModuleType]:
    """What the plugin imports of SGLang, and the module by which it knows a scheduler's process."""
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.mem_cache": {},
        "sglang.srt.mem_cache.base_prefix_cache": {"InsertParams": InsertParams, "MatchPrefixParams": MatchPrefixParams},
        "sglang.srt.mem_cache.radix_cache": {"RadixKey": RadixKey},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": SimpleNamespace(BEFORE="before")},
        "sglang.srt.managers": {},
        "sglang.srt.managers.scheduler": {"Scheduler": Scheduler},
    }
    found = {}
    for name, values in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(values)
    return found


@contextmanager
def importable() -> Iterator[None]:
    """Stands in for an installed SGLang, or hides it, for a while. What else is imported meanwhile stays imported."""
    found = modules()
    before = {name: sys.modules[name] for name in found if name in sys.modules}
    sys.modules.update(found)
    yield
    for name in found:
        del sys.modules[name]
    sys.modules.update(before)


def load_plugins() -> dict[str, Callable[..., Any]]:
    """As SGLang does it in a scheduler's process: the hooks that plugins on sys.path register, by their targets."""
    from importlib.metadata import entry_points

    sys.modules.update(modules())
    for entry_point in entry_points(group="sglang.srt.plugins"):
        entry_point.load()()
    return dict(HookRegistry.hooks)
