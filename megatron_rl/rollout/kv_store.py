"""KV of unfinished trajectories on the host, in the process of the engine that computed it, while training has the device.

    device pages --save--> slots of one slab, each physical page once --spill--> a file a trajectory (`kv_files.py`)
                 <-restore-                                           <--------- read straight to device pages

One slot holds one page over all layers. A page is known by its serial (`csrc/kv/allocator.h`): what has a slot already,
because a group shares its prompt or because the trajectory was saved before, is not copied again. A slot's content never
changes while it is held. When `rollout.kv_store.host_bytes` is spent, the least valuable trajectories go to disk: those of
the fewest tokens, which cost least to compute again, and among them the oldest weights. Files of another run, lineage,
model or layout are deleted; what cannot be put back is computed again, with a log line and a count, never guessed.
It moves bytes and knows neither requests nor versions' ages; those are `engines/embedded/snapshots.py`'s. Used by one thread.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from megatron_rl.config import KVStoreConfig
from megatron_rl.errors import ConfigError, KVFileError
from megatron_rl.kernels.build import state
from megatron_rl.kernels.kv_pages import PagedPool
from megatron_rl.kernels.snapshot import PageCopier, slab
from megatron_rl.rollout import kv_files
from megatron_rl.rollout.engines.base import KVSnapshot, KVUsage
from megatron_rl.rollout.kv_files import KVFile

log = logging.getLogger(__name__)

_STAGING_BYTES = 64 << 20  # of a file in memory at once


@dataclass(frozen=True)
class KeepKV:
    """How an engine keeps KV over a weight update."""

    max_age: int  # weight versions a page may lie behind
    settings: KVStoreConfig
    folder: Path  # of this engine's files


@dataclass(frozen=True)
class HeldKV:
    """KV of one trajectory on the device."""

    trajectory_id: int
    token_ids: np.ndarray  # int32 [tokens]
    pages: np.ndarray  # int64 [pages]


@dataclass
class _Kept:
    """One trajectory in the store: in slots, or in a file."""

    trajectory_id: int
    token_ids: np.ndarray  # int32 [tokens]
    versions: np.ndarray  # int32 [pages]
    slots: np.ndarray | None  # int64 [pages]; None: in `path`
    path: Path | None = None

    @property
    def value(self) -> tuple[int, int]:
        """The lowest is spilled first."""
        return len(self.token_ids), int(self.versions.min())


@dataclass
class _Slots:
    """Which device page each slot came from or went to: `page` holds the same bytes as long as its serial is `serial`."""

    num_slots: int
    page: np.ndarray = field(init=False)  # int64 [slots]
    serial: np.ndarray = field(init=False)  # uint64 [slots], 0: none
    num_filled: np.ndarray = field(init=False)  # int64 [slots], tokens

    def __post_init__(self) -> None:
        self.page = np.zeros(self.num_slots, np.int64)
        self.serial = np.zeros(self.num_slots, np.uint64)
        self.num_filled = np.zeros(self.num_slots, np.int64)


class KVStore:
    def __init__(self, keep: KeepKV, pages: state.BlockAllocator, *, page_size: int, slot_bytes: int, fingerprint: str) -> None:
        """pages: the engine's device pages. Finds the files that an earlier start of this run left.

        Raises ConfigError where the budget holds no page."""
        self.fingerprint, self._page_size, self._slot_bytes = fingerprint, page_size, slot_bytes
        self._compression, self._folder, self._pages = keep.settings.compression, keep.folder, pages
        num_slots = keep.settings.host_bytes // slot_bytes
        if num_slots < 1:
            raise ConfigError(
                f"rollout.kv_store.host_bytes={keep.settings.host_bytes}: one KV page takes {slot_bytes} bytes; raise it, or set "
                "rollout.kv_policy=recompute"
            )
        self._slots = state.BlockAllocator(num_slots)
        self._of_slot = _Slots(num_slots)
        self._slot_of_page = np.zeros(pages.num_blocks, np.int64)  # a guess, true where the slot's page and serial agree
        self._writer = uuid.uuid4().hex
        self._slab: torch.Tensor | None = None
        self._device = torch.device("cpu")
        self._copier: PageCopier | None = None
        self._kept: dict[int, _Kept] = {}
        self.usage = KVUsage()
        self._find_files()

    @property
    def num_slots_used(self) -> int:
        return self._slots.num_usable - self._slots.num_free

    def attach(self, pool: PagedPool) -> None:
        """The device pages are there (again). Nothing is saved or restored without them."""
        self._device = pool.device
        self._copier = PageCopier(pool, scheme=self._compression)

    def detach(self) -> None:
        """The device pages go; every one of them has been dropped."""
        if self._copier is not None:
            self._copier.close()
        self._copier = None

    def save(self, held: Sequence[HeldKV], wanted: Collection[int]) -> list[KVSnapshot]:
        """Copy what is on the device and not here yet; forget every trajectory that is not `wanted`.

        Returns descriptors of all wanted ones that are here, whether saved now, before, or by an earlier start."""
        started = time.perf_counter()
        for trajectory_id in self._kept.keys() - set(wanted):
            self._forget(trajectory_id)
        for item in sorted(held, key=lambda item: len(item.token_ids)):  # what is spilled for room went in first
            self._save(item)
        seconds = time.perf_counter() - started
        self.usage = replace(self.usage, snapshot_s=self.usage.snapshot_s + seconds)
        return [self._describe(self._kept[i]) for i in wanted if i in self._kept]

    def restore(self, snapshots: Sequence[KVSnapshot]) -> list[HeldKV | None]:
        """Device pages with the KV of each snapshot, held once for the caller; None where it must be computed again."""
        started = time.perf_counter()
        sources: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        arrived: dict[tuple[str, int], int] = {}
        found: list[HeldKV | None] = []
        for snapshot in snapshots:
            kept = self._kept.get(snapshot.trajectory_id)
            if kept is None or snapshot.fingerprint != self.fingerprint or not _begins_with(kept.token_ids, snapshot.token_ids):
                self._fail(f"trajectory {snapshot.trajectory_id}: this engine holds no such KV")
                found.append(None)
            elif kept.slots is not None:
                found.append(self._from_slots(kept, kept.slots, sources, targets))
            else:
                found.append(self._from_file(kept, arrived))
        if sources:
            copier, memory = self._ready()
            copier.load(np.concatenate(targets), memory, np.concatenate(sources))
        self.usage = replace(self.usage, restore_s=self.usage.restore_s + time.perf_counter() - started)
        return found

    def spill_all(self) -> None:
        """Write out what is only in memory: the process will end, and the run go on in another."""
        for kept in list(self._kept.values()):
            if kept.slots is not None:
                self._spill(kept, kept.slots)

    def clear(self) -> None:
        """Forget everything, files too."""
        for trajectory_id in list(self._kept):
            self._forget(trajectory_id)

    # --- device to host ----------------------------------------------------------------------------------------------

    def _save(self, item: HeldKV) -> None:
        versions, serials = self._pages.versions(item.pages), self._pages.serials(item.pages)
        before = self._kept.get(item.trajectory_id)
        if before and before.path and _equal(before.token_ids, item.token_ids) and _equal(before.versions, versions):
            return  # it came from this file and has not gone on since
        num_filled = np.full(len(item.pages), self._page_size)
        num_filled[-1] = len(item.token_ids) - self._page_size * (len(item.pages) - 1)
        of_slot, slots = self._of_slot, self._slot_of_page[item.pages].copy()
        known = (
            (of_slot.serial[slots] == serials) & (of_slot.page[slots] == item.pages) & (of_slot.num_filled[slots] == num_filled)
        )
        self._slots.hold(slots[known])
        self._forget(item.trajectory_id)
        new = np.flatnonzero(~known)
        if not self._make_room(len(new)):
            self._release(slots[known])
            self._fail(
                f"trajectory {item.trajectory_id}: its {len(item.token_ids)} tokens need {len(item.pages)} pages, "
                f"rollout.kv_store.host_bytes holds {self._slots.num_usable}"
            )
            return
        slots[new] = self._slots.take(len(new), 0)
        if len(new):
            copier, memory = self._ready()
            copier.save(item.pages[new], memory, slots[new])
        self._bind(slots[new], item.pages[new], num_filled[new])
        self._kept[item.trajectory_id] = _Kept(item.trajectory_id, item.token_ids, versions, slots)
        self.usage = replace(self.usage, snapshot_bytes=self.usage.snapshot_bytes + len(new) * self._slot_bytes)

    def _make_room(self, num_slots: int) -> bool:
        """Spill until so many slots are free; False where all that could go has gone."""
        while self._slots.num_free < num_slots:
            in_memory = [kept for kept in self._kept.values() if kept.slots is not None]
            if not in_memory or num_slots > self._slots.num_usable:
                return False
            least = min(in_memory, key=lambda kept: kept.value)
            assert least.slots is not None, "chosen so"
            self._spill(least, least.slots)
        return True

    def _spill(self, kept: _Kept, slots: np.ndarray) -> None:
        """To disk, its slots freed. Where the disk refuses, the trajectory is computed again."""
        path = self._path(kept.trajectory_id)
        births = self._slots.serials(slots)
        file = KVFile(kept.trajectory_id, self.fingerprint, self._writer, self._slot_bytes, kept.token_ids, kept.versions, births)
        try:
            num_bytes = kv_files.write(path, file, self._rows(slots))
        except OSError as e:
            self._fail(f"{path}: cannot be written ({e.strerror}); make room, or point rollout.kv_store.spill_folder elsewhere")
            self._forget(kept.trajectory_id)
            return
        self._release(slots)
        kept.slots, kept.path = None, path
        self.usage = replace(self.usage, spilled_bytes=self.usage.spilled_bytes + num_bytes)

    def _rows(self, slots: np.ndarray) -> Iterator[torch.Tensor]:
        assert self._slab is not None, "slots are in use"
        step = max(1, _STAGING_BYTES // self._slot_bytes)
        for i in range(0, len(slots), step):
            yield self._slab[torch.from_numpy(slots[i : i + step])]

    # --- host to device ----------------------------------------------------------------------------------------------

    def _from_slots(self, kept: _Kept, slots: np.ndarray, sources: list[np.ndarray], targets: list[np.ndarray]) -> HeldKV | None:
        """Pages for every slot; those on the device already are shared, what must be copied is added to the lists."""
        pages = self._of_slot.page[slots]
        live = (self._pages.serials(pages) == self._of_slot.serial[slots]) & (self._pages.holders(pages) > 0)
        new = np.flatnonzero(~live)
        if not self._has_room(kept, len(new)):
            return None
        self._pages.hold(pages[live])
        pages[new] = self._take_pages(kept.versions[new])
        self._bind(slots[new], pages[new], self._of_slot.num_filled[slots[new]])
        sources.append(slots[new])
        targets.append(pages[new])
        return HeldKV(kept.trajectory_id, kept.token_ids, pages)

    def _from_file(self, kept: _Kept, arrived: dict[tuple[str, int], int]) -> HeldKV | None:
        """arrived: (writer, birth) -> page of what earlier files of this call brought."""
        assert kept.path is not None, "neither in slots nor in a file"
        taken: list[np.ndarray] = []
        try:
            file = kv_files.read_head(kept.path)
            if file.fingerprint != self.fingerprint or not _equal(file.token_ids, kept.token_ids):
                raise KVFileError(f"{kept.path}: was exchanged for another; its tokens are computed again")
            keys = [(file.writer, birth) for birth in file.births.tolist()]
            pages = np.array([arrived.get(key, 0) for key in keys], np.int64)  # page 0 is nobody's
            new = pages == 0
            if not self._has_room(kept, int(new.sum())):
                return None
            self._pages.hold(pages[~new])
            taken.append(pages[~new])
            pages[new] = self._take_pages(file.versions[new])
            taken.append(pages[new])
            self._load_file(kept.path, pages, new)
        except KVFileError as e:
            for dropped in taken:
                self._pages.drop(dropped)
            self._fail(str(e))
            self._forget(kept.trajectory_id)
            return None
        arrived.update(zip(keys, pages.tolist(), strict=True))
        return HeldKV(kept.trajectory_id, kept.token_ids, pages)

    def _load_file(self, path: Path, pages: np.ndarray, new: np.ndarray) -> None:
        assert self._copier is not None, "restored only while the device pages stand"
        num_rows = min(len(pages), max(1, _STAGING_BYTES // self._slot_bytes))
        buffer = slab(num_rows, self._slot_bytes, self._device)
        at = 0
        for count in kv_files.read_pages(path, buffer):
            rows = np.flatnonzero(new[at : at + count])
            if len(rows):
                self._copier.load(pages[at + rows], buffer, rows.astype(np.int64))
            at += count

    def _has_room(self, kept: _Kept, num_pages: int) -> bool:
        if num_pages <= self._pages.num_free:
            return True
        self._fail(f"trajectory {kept.trajectory_id}: its KV needs {num_pages} pages, {self._pages.num_free} are free")
        return False

    def _take_pages(self, versions: np.ndarray) -> np.ndarray:
        pages = np.zeros(len(versions), np.int64)
        for version in np.unique(versions):
            of_version = versions == version
            pages[of_version] = self._pages.take(int(of_version.sum()), int(version))
        return pages

    # --- what is where -----------------------------------------------------------------------------------------------

    def _bind(self, slots: np.ndarray, pages: np.ndarray, num_filled: np.ndarray) -> None:
        self._slot_of_page[pages] = slots
        self._of_slot.page[slots] = pages
        self._of_slot.serial[slots] = self._pages.serials(pages)
        self._of_slot.num_filled[slots] = num_filled

    def _release(self, slots: np.ndarray) -> None:
        self._slots.drop(slots)
        self._of_slot.serial[slots[self._slots.holders(slots) == 0]] = 0

    def _forget(self, trajectory_id: int) -> None:
        kept = self._kept.pop(trajectory_id, None)
        if kept is not None and kept.slots is not None:
            self._release(kept.slots)
        if kept is not None and kept.path is not None:
            kept.path.unlink(missing_ok=True)

    def _describe(self, kept: _Kept) -> KVSnapshot:
        versions = np.repeat(kept.versions, self._page_size)[: len(kept.token_ids)]
        slots = np.zeros(0, np.int64) if kept.slots is None else kept.slots
        return KVSnapshot(kept.trajectory_id, kept.token_ids, versions, slots, self.fingerprint)

    def _ready(self) -> tuple[PageCopier, torch.Tensor]:
        assert self._copier is not None, "saved and restored only while the device pages stand"
        if self._slab is None:
            self._slab = slab(self._slots.num_usable, self._slot_bytes, self._device)
        return self._copier, self._slab

    def _path(self, trajectory_id: int) -> Path:
        return self._folder / f"trajectory_{trajectory_id}{kv_files.SUFFIX}"

    def _find_files(self) -> None:
        for partial in self._folder.glob(f".*{kv_files.SUFFIX}.partial"):
            partial.unlink()
        for path in sorted(self._folder.glob(f"*{kv_files.SUFFIX}")):
            try:
                file = kv_files.read_head(path)
                if path != self._path(file.trajectory_id):
                    raise KVFileError(f"{path}: says it is trajectory {file.trajectory_id}; its tokens are computed again")
            except KVFileError as e:
                self._fail(str(e))
                path.unlink()
                continue
            if file.fingerprint != self.fingerprint:
                log.info("%s: deleted; it is KV of another run, lineage, model or layout", path)
                path.unlink()
                continue
            self._kept[file.trajectory_id] = _Kept(file.trajectory_id, file.token_ids, file.versions, None, path)

    def _fail(self, why: str) -> None:
        log.warning("KV not kept: %s", why)
        self.usage = replace(self.usage, restore_failures=self.usage.restore_failures + 1)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return len(a) == len(b) and bool((a == b).all())


def _begins_with(whole: np.ndarray, start: np.ndarray) -> bool:
    return len(start) <= len(whole) and bool((whole[: len(start)] == start).all())
