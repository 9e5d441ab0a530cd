"""The host store of KV: every page once, nothing twice, and never wrong bytes, whatever happens to its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config import KVStoreConfig
from megatron_rl.errors import ConfigError
from megatron_rl.kernels.build import state
from megatron_rl.kernels.kv_pages import PagedPool, slot_bytes_of
from megatron_rl.rollout.kv_store import HeldKV, KeepKV, KVStore

PAGE_SIZE, NUM_PAGES = 4, 40
SHAPE = (2, NUM_PAGES, 2, 1, PAGE_SIZE, 4)  # [layers, pages, 2, kv_heads, page_size, head_dim]
SLOT_BYTES = 2 * 2 * PAGE_SIZE * 4 * 4


class Device:
    """Pages with random content, their allocator, and a store over them."""

    def __init__(self, folder: Path, *, slots: int = 100, fingerprint: str = "this run", **options: object) -> None:
        self.pages = state.BlockAllocator(NUM_PAGES, 1)
        self.random = torch.Generator().manual_seed(0)
        self.pool = torch.randn(SHAPE, generator=self.random)
        slot_bytes = slot_bytes_of(PagedPool.from_pool(self.pool), options.get("compression", "none"))
        keep = KeepKV(1, KVStoreConfig(host_bytes=slots * SLOT_BYTES, **options), folder)
        self.store = KVStore(keep, self.pages, page_size=PAGE_SIZE, slot_bytes=slot_bytes, fingerprint=fingerprint)
        self.store.attach(PagedPool.from_pool(self.pool))

    def held(self, trajectory_id: int, num_tokens: int, *, version: int = 0, shared: list[int] | None = None) -> HeldKV:
        """`shared`: pages of another, held once more, that this one begins with."""
        shared = shared or []
        self.pages.hold(shared)
        num_own = -(-num_tokens // PAGE_SIZE) - len(shared)
        pages = np.array([*shared, *self.pages.take(num_own, version)], np.int64)
        tokens = np.random.default_rng(trajectory_id).integers(0, 99, num_tokens).astype(np.int32)
        return HeldKV(trajectory_id, tokens, pages)

    def content(self, held: HeldKV) -> torch.Tensor:
        """[layers, pages, 2, kv_heads, page_size, head_dim]"""
        return self.pool[:, torch.from_numpy(held.pages)].clone()

    def lose(self, *helds: HeldKV) -> None:
        """The training phase: pages dropped, the pool gone, another one of other content there."""
        for held in helds:
            self.pages.drop(held.pages)
        self.pages.check_empty()
        self.store.detach()
        self.pool = torch.randn(SHAPE, generator=self.random)
        self.store.attach(PagedPool.from_pool(self.pool))


def test_a_prompt_shared_by_a_group_is_stored_once_and_comes_back_shared(tmp_path):
    device = Device(tmp_path)
    first = device.held(0, 14)
    group = [first, *(device.held(i, 13 + i, shared=first.pages[:3].tolist()) for i in range(1, 5))]
    before = [device.content(held) for held in group]
    snapshots = device.store.save(group, range(5))
    num_pages = 3 + sum(len(held.pages) - 3 for held in group)
    assert device.store.num_slots_used == num_pages
    assert device.store.usage.snapshot_bytes == num_pages * SLOT_BYTES
    device.lose(*group)
    restored = device.store.restore(snapshots)
    assert all(torch.equal(device.content(held), content) for held, content in zip(restored, before, strict=True))
    assert device.pages.num_usable - device.pages.num_free == num_pages
    assert device.pages.holders(restored[0].pages[:3]).tolist() == [5] * 3


def test_a_second_snapshot_copies_only_new_pages_also_after_a_restore(tmp_path):
    device = Device(tmp_path)
    held = device.held(0, 10)
    device.store.save([held], [0])
    copied = device.store.usage.snapshot_bytes
    device.store.save([held], [0])
    assert device.store.usage.snapshot_bytes == copied == 3 * SLOT_BYTES, "nothing new, nothing copied"
    grown = HeldKV(0, np.arange(15, dtype=np.int32), np.append(held.pages, device.pages.take(1, 1)))
    (snapshot,) = device.store.save([grown], [0])
    assert device.store.usage.snapshot_bytes == copied + 2 * SLOT_BYTES, "the tail that was filled up, and the new page"
    assert snapshot.kv_versions.tolist() == [0] * 12 + [1] * 3
    before = device.content(grown)
    device.lose(grown)
    (restored,) = device.store.restore([snapshot])
    assert torch.equal(device.content(restored), before)
    device.store.save([restored], [0])
    assert device.store.usage.snapshot_bytes == copied + 2 * SLOT_BYTES, "restored pages are known by where they came from"
    device.pages.renew(restored.pages[-1:])
    device.store.save([restored], [0])
    assert device.store.usage.snapshot_bytes == copied + 3 * SLOT_BYTES, "a page about to be overwritten is another page"
    device.store.save([], [])
    assert device.store.num_slots_used == 0


def test_what_the_budget_does_not_hold_goes_to_disk_shortest_first_and_comes_back(tmp_path):
    device = Device(tmp_path, slots=8)
    helds = [device.held(i, num_tokens) for i, num_tokens in enumerate((8, 17, 4, 12))]
    before = [device.content(held) for held in helds]
    snapshots = device.store.save(helds, range(4))
    assert {path.name for path in tmp_path.iterdir()} == {"trajectory_0.kv", "trajectory_2.kv"}
    assert [len(s.pages) for s in snapshots] == [0, 5, 0, 3]
    assert device.store.usage.spilled_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    device.lose(*helds)
    restored = device.store.restore(snapshots)
    assert all(torch.equal(device.content(held), content) for held, content in zip(restored, before, strict=True))
    device.store.save(restored, range(4))
    assert device.store.usage.snapshot_bytes == 11 * SLOT_BYTES, "nothing has gone on: neither memory nor files are written again"
    device.store.save(restored[1:], range(1, 4))
    assert {path.name for path in tmp_path.iterdir()} == {"trajectory_2.kv"}, "what nobody wants is deleted"
    assert device.store.usage.restore_failures == 0


def test_a_trajectory_larger_than_the_budget_is_recomputed_and_counted(tmp_path, caplog):
    device = Device(tmp_path, slots=2)
    assert device.store.save([device.held(0, 9)], [0]) == []
    assert device.store.usage.restore_failures == 1 and device.store.num_slots_used == 0
    assert "its 9 tokens need 3 pages, rollout.kv_store.host_bytes holds 2" in caplog.text


def test_a_new_process_finds_the_files_and_a_group_shares_its_prompt_again(tmp_path):
    device = Device(tmp_path)
    first = device.held(0, 10, version=3)
    group = [first, device.held(1, 11, version=4, shared=first.pages[:2].tolist())]
    before = [device.content(held) for held in group]
    device.store.save(group, range(2))
    device.store.spill_all()
    assert device.store.num_slots_used == 0
    later = Device(tmp_path)
    later.pool.fill_(float("nan"))
    snapshots = later.store.save([], [0, 1, 2])
    assert [s.kv_versions.tolist() for s in snapshots] == [[3] * 10, [3] * 8 + [4] * 3]
    restored = later.store.restore(snapshots)
    assert all(torch.equal(later.content(held), content) for held, content in zip(restored, before, strict=True))
    assert later.pages.num_usable - later.pages.num_free == 4, "two shared, one tail each"
    assert later.pages.versions(restored[1].pages).tolist() == [3, 3, 4]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(at: int):
    def spoil(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return spoil


SPOILS = {
    "cut short": truncate,
    "one byte of the head": flip(30),
    "one byte of its first words": flip(0),
    "one byte of a token": flip(300),
    "one byte of the last page": flip(-60),
    "one byte of the checksum": flip(-1),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("when", ["before the start", "after the start"])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoiled_file_is_recomputed_counted_and_deleted(spoil, when, tmp_path, caplog):
    device = Device(tmp_path)
    helds = [device.held(i, 10 + i) for i in range(2)]
    device.store.save(helds, [0, 1])
    device.store.spill_all()
    path = tmp_path / "trajectory_0.kv"
    if when == "before the start":
        spoil(path)
    later = Device(tmp_path)
    snapshots = later.store.save([], [0, 1])
    if when == "after the start":
        spoil(path)
    restored = {s.trajectory_id: held for s, held in zip(snapshots, later.store.restore(snapshots), strict=True)}
    assert restored.get(0) is None and not path.exists()
    assert torch.equal(later.content(restored[1]), device.content(helds[1]))
    assert later.pages.num_usable - later.pages.num_free == 3, "no page of the spoiled one is held"
    assert later.store.usage.restore_failures == (0 if spoil is Path.unlink and when == "before the start" else 1)
    assert later.store.usage.restore_failures == caplog.text.count("KV not kept")


def test_files_of_another_run_or_lineage_and_unfinished_ones_are_deleted(tmp_path, caplog):
    caplog.set_level("INFO")
    device = Device(tmp_path, fingerprint="run a, lineage 0")
    device.store.save([device.held(0, 10)], [0])
    device.store.spill_all()
    (tmp_path / ".trajectory_1.kv.partial").write_bytes(b"half")
    later = Device(tmp_path, fingerprint="run a, lineage 1")
    assert later.store.save([], [0, 1]) == [] and list(tmp_path.iterdir()) == []
    assert "trajectory_0.kv: deleted; it is KV of another run, lineage" in caplog.text


def test_a_disk_that_refuses_costs_recomputation_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    device = Device(tmp_path / "file", slots=3)
    assert [s.trajectory_id for s in device.store.save([device.held(0, 8), device.held(1, 9)], [0, 1])] == [1]
    assert device.store.usage.restore_failures == 1 and "rollout.kv_store.spill_folder" in caplog.text


def test_kv_that_finds_no_free_pages_is_recomputed_and_holds_none(tmp_path):
    device = Device(tmp_path)
    helds = [device.held(i, 40) for i in range(2)]
    snapshots = device.store.save(helds, [0, 1])
    device.lose(*helds)
    others = device.pages.take(25, 0)
    assert [held is not None for held in device.store.restore(snapshots)] == [True, False]
    device.pages.drop(others)
    assert device.pages.num_usable - device.pages.num_free == 10


def test_a_budget_of_less_than_a_page_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"rollout.kv_store.host_bytes=0: one KV page takes {SLOT_BYTES} bytes; raise it"):
        Device(tmp_path, slots=0)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_compressed_kv_comes_back_near_and_takes_less(scheme, tmp_path):
    device = Device(tmp_path, compression=scheme)
    held = device.held(0, 16)
    before = device.content(held)
    (snapshot,) = device.store.save([held], [0])
    device.lose(held)
    (restored,) = device.store.restore([snapshot])
    bound = {"int8": 1 / 254, "fp8": 1 / 16}[scheme] * before.abs().amax(-1, keepdim=True)
    assert ((device.content(restored) - before).abs() <= bound * 1.001).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_history_of_phases_restores_the_bytes_that_were_saved_and_leaks_nothing(data, tmp_path_factory):
    device = Device(tmp_path_factory.mktemp("kv"), slots=data.draw(st.integers(1, 20)))
    alive: dict[int, HeldKV] = {}
    for phase in range(data.draw(st.integers(1, 4))):
        for i in data.draw(st.sets(st.integers(0, 4))):
            room = device.pages.num_free
            if i in alive and room:
                old = alive[i]
                more = data.draw(st.integers(0, 5)) if room > 1 else 0
                num_new = -(-(len(old.token_ids) + more) // PAGE_SIZE) - len(old.pages)
                pages = np.append(old.pages, device.pages.take(num_new, phase))
                alive[i] = HeldKV(i, np.append(old.token_ids, np.zeros(more, np.int32)), pages)
            elif room >= 4:
                source = next(iter(alive.values()), None)
                shared = source.pages[: len(source.token_ids) // PAGE_SIZE][:1].tolist() if source else []
                alive[i] = device.held(i, data.draw(st.integers(5, 14)), version=phase, shared=shared)
        wanted = data.draw(st.sets(st.sampled_from(sorted(alive) or [0])))
        snapshots = device.store.save([held for i, held in alive.items() if i in wanted], sorted(wanted))
        before = {i: device.content(held) for i, held in alive.items()}
        device.lose(*alive.values())
        restored = device.store.restore(snapshots)
        alive = {held.trajectory_id: held for held in restored if held is not None}
        for i, held in alive.items():
            assert torch.equal(device.content(held), before[i])
    device.store.clear()
    assert device.store.num_slots_used == 0
    device.lose(*alive.values())
