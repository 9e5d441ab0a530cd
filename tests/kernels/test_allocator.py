"""The block allocator against a plain model of it, and what it says of misuse."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from megatron_rl.kernels.build import state

NUM_BLOCKS, NUM_RESERVED = 24, 2
blocks_of_any_kind = st.lists(st.integers(-2, NUM_BLOCKS + 1), max_size=8)
forms = st.sampled_from([lambda b: np.array(b, np.int32), lambda b: np.array(b, np.int64), lambda b: np.array(b, ">i8"), list])


class AllocatorBesideItsModel(RuleBasedStateMachine):
    """Every call is made on both; a call that would break a law is refused and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.real = state.BlockAllocator(NUM_BLOCKS, NUM_RESERVED)
        self.holders: Counter[int] = Counter()
        self.versions: dict[int, int] = {}
        self.serials: dict[int, int] = {}
        self.last_serial = 0

    @rule(count=st.integers(-1, 9), version=st.integers(0, 5))
    def take(self, count, version):
        num_free = NUM_BLOCKS - NUM_RESERVED - len(+self.holders)
        if not 0 <= count <= num_free:
            with pytest.raises(ValueError, match=rf"take: count: expected 0 to the {num_free} free blocks, got {count}"):
                self.real.take(count, version)
            return
        blocks = self.real.take(count, version)
        assert blocks.dtype == np.int64 and len(set(blocks.tolist())) == count
        for block in blocks.tolist():
            assert self.holders[block] == 0 and block >= NUM_RESERVED
            self.last_serial += 1
            self.holders[block], self.versions[block], self.serials[block] = 1, version, self.last_serial

    @rule(blocks=blocks_of_any_kind, k=st.integers(0, 3), form=forms)
    def fork(self, blocks, k, form):
        if k < 1 or any(self.holders[b] == 0 for b in blocks):
            with pytest.raises(ValueError, match="expected (a held block|a block from 0 to 23|1 or more), got"):
                self.real.fork(form(blocks), k)
            return
        self.real.fork(form(blocks), k)
        for block in blocks:
            self.holders[block] += k

    @rule(blocks=blocks_of_any_kind, form=forms)
    def drop(self, blocks, form):
        count = Counter(blocks)
        if any(self.holders[b] < n for b, n in count.items()):
            with pytest.raises(ValueError, match="drop: blocks.*expected a (held block|block from 0 to 23), got"):
                self.real.drop(form(blocks))
            return
        self.holders -= count
        assert self.real.drop(form(blocks)) == sum(self.holders[b] == 0 for b in count)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def copy_on_write(self, block):
        is_full = len(+self.holders) == NUM_BLOCKS - NUM_RESERVED
        if self.holders[block] == 0 or (self.holders[block] > 1 and is_full):
            with pytest.raises(ValueError):
                self.real.copy_on_write(block)
            return
        own = self.real.copy_on_write(block)
        assert (own == block) == (self.holders[block] == 1)
        if own != block:
            self.last_serial += 1
            self.holders[block] -= 1
            self.holders[own], self.versions[own], self.serials[own] = 1, self.versions[block], self.last_serial

    @rule(blocks=blocks_of_any_kind, form=forms)
    def renew(self, blocks, form):
        if any(self.holders[b] == 0 for b in blocks):
            with pytest.raises(ValueError):
                self.real.renew(form(blocks))
            return
        self.real.renew(form(blocks))
        for block in blocks:
            self.last_serial += 1
            self.serials[block] = self.last_serial

    @invariant()
    def agree(self):
        every = np.arange(NUM_BLOCKS, dtype=np.int32)
        assert self.real.holders(every).tolist() == [self.holders[b] for b in range(NUM_BLOCKS)]
        assert self.real.versions(every).tolist() == [self.versions.get(b, 0) for b in range(NUM_BLOCKS)]
        assert self.real.serials(every).tolist() == [self.serials.get(b, 0) for b in range(NUM_BLOCKS)]
        assert self.real.num_free == NUM_BLOCKS - NUM_RESERVED - len(+self.holders)
        assert self.real.num_usable == NUM_BLOCKS - NUM_RESERVED

    def teardown(self):
        held = +self.holders
        if held:
            with pytest.raises(ValueError, match=f"none held, got {len(held)} leaked: {min(held)} "):
                self.real.check_empty()
        self.real.drop(list(held.elements()))
        self.real.check_empty()


TestAllocatorBesideItsModel = AllocatorBesideItsModel.TestCase
TestAllocatorBesideItsModel.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    "blocks, got",
    [
        (np.zeros(2, np.float32), "float32 of 1 dimensions"),
        (np.zeros((2, 1), np.int64), "int64 of 2 dimensions"),
        (np.zeros(1, np.uint8), "uint8 of 1 dimensions"),
        ("all", "<U3 of 0 dimensions"),
    ],
)
def test_what_is_no_list_of_blocks_is_refused(blocks, got):
    with pytest.raises(ValueError, match=f"drop: blocks: expected a one-dimensional int32 or int64 array, got .*{got}"):
        state.BlockAllocator(4).drop(blocks)


@pytest.mark.parametrize("num_blocks, num_reserved", [(0, 0), (1, 1), (-3, 0), (4, -1)])
def test_an_allocator_without_usable_blocks_is_refused(num_blocks, num_reserved):
    with pytest.raises(ValueError, match="BlockAllocator: num_"):
        state.BlockAllocator(num_blocks, num_reserved)
