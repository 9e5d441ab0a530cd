"""Who holds which KV page: a free list, reference counts, and the weight version each page was computed with.

Only numbers; the tensors are in `kv_cache.py`, and who gets a page when is decided in `scheduler.py`.
Page 0 belongs to nobody: padding rows of a decode batch write there.
"""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    def __init__(self, num_pages: int, page_size: int) -> None:
        """num_pages counts page 0 too; page_size in tokens."""
        self.page_size = page_size
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._num_holders = [0] * num_pages
        self._versions = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    def count_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def take(self, version: int) -> int:
        """A free page, held once. The caller has made sure that there is one."""
        page = self._free.pop()
        self._num_holders[page] = 1
        self._versions[page] = version
        return page

    def hold(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is free and cannot be shared"
            self._num_holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is dropped more often than held"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                self._free.append(page)

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def version(self, page: int) -> int:
        return self._versions[page]
