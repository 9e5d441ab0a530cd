"""Carries KV pages of a pool to slots of a host slab and back, at the speed of the link whatever the page size.

On a GPU: a gather packs a chunk of pages into one of two device buffers while the copy engine empties the other into pinned
memory, so the processors are busy for a few hundredths of the time and the link all of it. On a CPU pages are copied directly.
Which page belongs in which slot, and what a slot means, the caller knows. Refused, as KernelError: a slab that is not pinned
(from a GPU the copies would be slow and would block), and pages or slots out of range or named twice. Kernels: `kv_pages.py`.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.errors import KernelError
from megatron_rl.kernels.kv_pages import PagedPool, Scheme, check_host_pages, describe, gather, refuse, scatter, slot_bytes_of

# Few enough that a matrix product beside a snapshot keeps its processors, many enough to pack faster than the link empties.
COPY_BLOCKS = 16


def slab(num_slots: int, slot_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_slots, slot_bytes] in host memory, of random content; pinned where `device` is a GPU.

    Mapped in huge pages and pinned in place, since an allocator of pinned memory rounds sizes up to the next power of two.
    Memory goes back when the last view dies."""
    if num_slots < 1 or slot_bytes < 1:
        refuse("slab", "num_slots, slot_bytes", "at least 1 each", f"{num_slots}, {slot_bytes}")
    num_bytes = num_slots * slot_bytes
    if device.type != "cuda":
        return torch.empty((num_slots, slot_bytes), dtype=torch.uint8)
    try:
        mapped = mmap.mmap(-1, num_bytes)
    except OSError as e:
        raise KernelError(f"slab: {num_slots} slots of {slot_bytes} bytes: {num_bytes} bytes of host memory refused ({e})") from e
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapped, dtype=np.uint8)
    address = memory.ctypes.data
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        status = int(runtime.cudaHostRegister(address, num_bytes, 0))
    if status:
        rule = "ask for less, or raise the limit that `ulimit -l` shows"
        raise KernelError(f"slab: {num_bytes} bytes could not be pinned (CUDA error {status}); {rule}")
    # torch holds `memory` until the last view is gone. A process that ends leaves this to the driver.
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory).view(num_slots, slot_bytes)


@dataclass(frozen=True)
class Run:
    """Consecutive slots of the slab that are consecutive in the buffer too: one copy."""

    buffer: slice
    slots: slice


class PageCopier:
    """`save` and `load` return when the bytes are where they belong. One caller at a time."""

    def __init__(
        self, pool: PagedPool, *, chunk_bytes: int = 64 << 20, scheme: Scheme = "none", max_blocks: int = COPY_BLOCKS
    ) -> None:
        """chunk_bytes: of one of the two device buffers, at least one slot. max_blocks: of the grid that packs and unpacks."""
        if chunk_bytes < 1 or max_blocks < 1:
            refuse("PageCopier", "chunk_bytes, max_blocks", "at least 1 each", f"{chunk_bytes}, {max_blocks}")
        self._pool = pool
        self._scheme: Scheme = scheme
        self.slot_bytes = slot_bytes_of(pool, scheme)
        self.chunk_slots = max(1, chunk_bytes // self.slot_bytes)
        self._lanes = _Lanes(pool, self.chunk_slots, self.slot_bytes, scheme, max_blocks) if pool.device.type == "cuda" else None
        self._is_open = True

    def save(self, pages: np.ndarray, slab: torch.Tensor, slots: np.ndarray) -> None:
        """Page pages[i] goes to slab[slots[i]]. pages, slots: int64 [n]; slab: uint8 [slots, slot_bytes], pinned on a GPU."""
        pages, slots = self._checked("save", pages, slab, slots)
        if self._lanes is not None:
            self._lanes.save(pages, slab, slots)
            return
        for run in runs(slots):
            gather(self._pool, torch.from_numpy(pages[run.buffer]), slab[run.slots], scheme=self._scheme)

    def load(self, pages: np.ndarray, slab: torch.Tensor, slots: np.ndarray) -> None:
        """The reverse: slab[slots[i]] goes to page pages[i]. Pages are distinct."""
        pages, slots = self._checked("load", pages, slab, slots)
        if self._lanes is not None:
            self._lanes.load(pages, slab, slots)
            return
        for run in runs(slots):
            scatter(self._pool, torch.from_numpy(pages[run.buffer]), slab[run.slots], scheme=self._scheme)

    def close(self) -> None:
        """Gives the device buffers back; the copier is used no more."""
        self._is_open = False
        self._lanes = None

    def _checked(self, call: str, pages: np.ndarray, slab: torch.Tensor, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pages and slots in the order of slots, which makes the fewest copies."""
        if not self._is_open:
            raise KernelError(f"PageCopier.{call}: the copier is closed; make a new one")
        function = f"PageCopier.{call}"
        is_slab = isinstance(slab, torch.Tensor) and slab.dtype == torch.uint8 and slab.dim() == 2 and slab.is_contiguous()
        if not is_slab or slab.shape[1] != self.slot_bytes or slab.device.type != "cpu":
            refuse(function, "slab", f"contiguous uint8 [slots, {self.slot_bytes}] on cpu", describe(slab))
        if self._pool.device.type == "cuda" and not slab.is_pinned():
            refuse(function, "slab", "pinned memory, as slab() makes it", "pageable memory")
        check_host_pages(function, "pages", pages, self._pool.num_pages)
        check_host_pages(function, "slots", slots, slab.shape[0])
        if len(pages) != len(slots):
            refuse(function, "slots", f"as many as pages, {len(pages)}", len(slots))
        order = np.argsort(slots, kind="stable")
        pages, slots = pages[order], slots[order]
        written, limit = (slots, slab.shape[0]) if call == "save" else (pages, self._pool.num_pages)
        seen = np.zeros(limit, dtype=bool)
        seen[written] = True
        if np.count_nonzero(seen) != len(written):
            refuse(function, "slots" if call == "save" else "pages", "each at most once", "one twice")
        return pages, slots


def runs(slots: np.ndarray) -> Iterator[Run]:
    """The fewest copies between buffer rows 0 .. n - 1 and ascending slots, int64 [n]."""
    if not len(slots):
        return
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    for first, end in zip([0, *breaks], [*breaks, len(slots)], strict=True):
        start = int(slots[first])
        yield Run(slice(int(first), int(end)), slice(start, start + int(end - first)))


class _Lanes:
    """Two device buffers, one stream that packs or unpacks, one that copies.

    save: pack waits until the copy out of its buffer is done; copy waits until its buffer is packed.
    load: copy waits until its buffer is unpacked; unpack waits until the copy into its buffer is done.
    """

    def __init__(self, pool: PagedPool, chunk_slots: int, slot_bytes: int, scheme: Scheme, max_blocks: int) -> None:
        device = pool.device
        self._pool, self._chunk_slots, self._max_blocks = pool, chunk_slots, max_blocks
        self._scheme: Scheme = scheme
        self._buffers = [torch.empty((chunk_slots, slot_bytes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._packer = torch.cuda.Stream(device, priority=-1)  # ahead of long kernels, or the link would wait for them
        self._copier = torch.cuda.Stream(device, priority=-1)
        self._packer_done, self._copier_done = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def save(self, pages: np.ndarray, slab: torch.Tensor, slots: np.ndarray) -> None:
        on_device = self._begin(pages)
        for i, part in enumerate(self._chunks(len(pages))):
            buffer = self._buffers[i % 2][: part.stop - part.start]
            packed, copied = self._packer_done[i % 2], self._copier_done[i % 2]
            self._packer.wait_event(copied)
            with torch.cuda.stream(self._packer):
                gather(self._pool, on_device[part], buffer, scheme=self._scheme, max_blocks=self._max_blocks)
                packed.record()
            self._copier.wait_event(packed)
            with torch.cuda.stream(self._copier):
                for run in runs(slots[part]):
                    slab[run.slots].copy_(buffer[run.buffer], non_blocking=True)
                copied.record()
        self._copier.synchronize()

    def load(self, pages: np.ndarray, slab: torch.Tensor, slots: np.ndarray) -> None:
        on_device = self._begin(pages)
        for i, part in enumerate(self._chunks(len(pages))):
            buffer = self._buffers[i % 2][: part.stop - part.start]
            unpacked, copied = self._packer_done[i % 2], self._copier_done[i % 2]
            self._copier.wait_event(unpacked)
            with torch.cuda.stream(self._copier):
                for run in runs(slots[part]):
                    buffer[run.buffer].copy_(slab[run.slots], non_blocking=True)
                copied.record()
            self._packer.wait_event(copied)
            with torch.cuda.stream(self._packer):
                scatter(self._pool, on_device[part], buffer, scheme=self._scheme, max_blocks=self._max_blocks)
                unpacked.record()
        self._packer.synchronize()

    def _begin(self, pages: np.ndarray) -> torch.Tensor:
        """pages on the device, int64 [n]; both streams start after what the caller's stream has been given."""
        now = torch.cuda.current_stream(self._pool.device)
        self._packer.wait_stream(now)
        self._copier.wait_stream(now)
        with torch.cuda.stream(self._packer):
            return torch.from_numpy(pages).to(self._pool.device)

    def _chunks(self, num_pages: int) -> Iterator[slice]:
        for first in range(0, num_pages, self._chunk_slots):
            yield slice(first, min(first + self._chunk_slots, num_pages))
