"""KV over the training phase with SGLang: the plugin's pages, the engine's promises, faults. The cache is a stand-in."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import fake_radix
import numpy as np
import pytest
from engine_scenarios import collect, prompt, request, run
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_scenarios import connect, fake_server, plugin

from megatron_rl.errors import EngineError, EngineGoneError
from megatron_rl.rollout.engines import wire
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang_kv import KeepOnServer, ServerKV
from megatron_rl.rollout.engines.sglang_plugin.cache import PrefixCache
from megatron_rl.rollout.engines.sglang_plugin.install import PluginSettings, install, socket_path
from megatron_rl.rollout.engines.sglang_plugin.plugin import KVPlugin
from megatron_rl.rollout.engines.sglang_plugin.store import CachedPages, PageStore

TOKEN_BYTES = 2 * fake_radix.LAYERS * fake_radix.HEADS * fake_radix.HEAD_DIM * 4


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-tied")


# --- pages -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 4]),
    num_shared=st.integers(0, 9),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    num_slots=st.integers(1, 80),
    num_phases=st.integers(1, 3),
)
def test_what_is_put_back_is_what_was_saved_and_no_page_is_lost(page_size, num_shared, lengths, num_slots, num_phases):
    """Phases with new weights each; trajectories share a prompt and grow; room may be short on the device and on the host."""
    scheduler = fake_radix.Scheduler(num_slots=64, page_size=page_size)
    allocator = scheduler.token_to_kv_pool_allocator
    with fake_radix.importable():
        cache = PrefixCache(scheduler)
    store = PageStore(cache.pool, host_bytes=num_slots * page_size * TOKEN_BYTES, compression="none")
    contexts = {i: [*range(num_shared), *prompt(i, n)] for i, n in enumerate(lengths)}
    num_stored = dict.fromkeys(contexts, 0)
    for phase in range(num_phases):
        cached, weights = [], {}
        for i, context in contexts.items():
            scheduler.compute(f"{phase}", context, phase)
            weights[i] = scheduler.weights_of(f"{phase}", context)
            ids = np.array(context, np.int32)
            cached.append(CachedPages(i, ids, cache.find(f"{phase}", ids), num_stored[i] // page_size))
        counts, num_bytes = store.save(cached, [])
        assert store.num_slots_used <= num_slots and num_bytes <= store.num_slots_used * store.slot_bytes
        has_room = sum(len(item.pages) for item in cached) <= num_slots
        for item, count in zip(cached, counts, strict=True):
            whole = len(item.pages) * page_size
            assert count == whole or (count < whole and not has_room)
        scheduler.release()
        for i in contexts:
            kept, num_stored[i] = store.get(i), 0
            new = None if kept is None else cache.place(f"{phase + 1}", kept.token_ids)
            if kept is not None and new is not None:
                store.load([new], [kept.slots[len(kept.slots) - len(new) :]])
                num_stored[i] = len(kept.token_ids)
                found = scheduler.weights_of(f"{phase + 1}", kept.token_ids.tolist())
                assert found == weights[i][: len(found)] and len(found) == counts[i]
        num_in_tree = len(scheduler.tree_cache.slots) * page_size
        assert allocator.available_size() + num_in_tree == allocator.size, "every page is free or in the tree"
        contexts = {i: [*context, *range(300, 302 + phase)] for i, context in contexts.items()}
    assert store.save([], []) == ([], 0) and store.num_slots_used == 0, "what nobody wants is forgotten"


# --- promises --------------------------------------------------------------------------------------------------------


async def training_phase(s, folder, version, ids):
    """KV away, memory released, new weights, memory and KV back."""
    snapshots = await s.engine.snapshot_kv(ids)
    await s.engine.release_memory(["kv_cache", "weights"])
    await s.engine.resume_memory(["weights"])
    await s.engine.load_weights([[(n, t * (1 + version / 100)) for n, t in read_folder(folder)]], version)
    await s.engine.resume_memory(["kv_cache"])
    return await s.engine.restore_kv(snapshots)


def group(contexts, version, num_tokens=6):
    return [request(i, c, num_tokens, weight_version=version, kv_key="g") for i, c in contexts.items()]


async def grow(s, contexts, version):
    """The next tokens of each; chunks by trajectory."""
    found = await collect(s.engine, group(contexts, version))
    contexts.update({i: [*contexts[i], *chunk.token_ids.tolist()] for i, chunk in found.items()})
    return found


def test_a_group_goes_on_from_its_kept_kv_and_only_what_is_new_is_copied(folder):
    async def scenario():
        async with fake_server(folder, max_age=3) as s:
            contexts = {i: prompt(0, 12) for i in range(3)}
            await grow(s, contexts, 0)
            assert await training_phase(s, folder, 1, [0, 1, 2]) == [True] * 3
            copied = (await s.engine.kv_usage()).snapshot_bytes
            assert copied == (12 + 3 * 5) * TOKEN_BYTES, "the prompt once"
            assert s.fake.scheduler.token_to_kv_pool_allocator.available_size() == 4096 - (12 + 3 * 5), "on the device too"
            second = await grow(s, contexts, 1)
            assert {(c.cached_tokens, *c.kv_versions) for c in second.values()} == {(17, *[0] * 6)}
            assert s.fake.kv_weights[-1] == [1] * 17, "the KV of the first weights"
            contexts[7] = contexts[0][:-3]  # of the group, but it kept nothing
            late = (await collect(s.engine, group({7: contexts[7]}, 1)))[7]
            assert (late.cached_tokens, late.kv_versions.tolist()) == (0, [1] * 6)
            assert await training_phase(s, folder, 2, [0, 1]) == [True] * 2
            usage = await s.engine.kv_usage()
            assert usage.snapshot_bytes - copied == 2 * 6 * TOKEN_BYTES and usage.restore_failures == 0
            third = await grow(s, {i: contexts[i] for i in (0, 1)}, 2)
            assert third[0].cached_tokens == 23 and s.fake.kv_weights[-1] == [1] * 17 + [2] * 6

    run(scenario())


def test_kv_evicted_before_its_use_is_computed_again_counted_and_labelled_with_its_new_version(folder):
    async def scenario():
        async with fake_server(folder, max_age=3) as s:
            contexts = {i: prompt(i, 12) for i in range(2)}
            await grow(s, contexts, 0)
            assert await training_phase(s, folder, 1, [0, 1]) == [True] * 2
            for end in range(17, 10, -1):
                s.fake.scheduler.evict("1/0/g", contexts[0][:end])
            for end in range(17, 0, -1):
                s.fake.scheduler.evict("1/0/g", contexts[1][:end])
            second = await grow(s, contexts, 1)
            assert [(second[i].cached_tokens, *second[i].kv_versions) for i in (0, 1)] == [(10, *[0] * 6), (0, *[1] * 6)]
            assert (await s.engine.kv_usage()).restore_failures == 2
            snapshots = await s.engine.snapshot_kv([0, 1])
            assert [x.kv_versions.tolist() for x in snapshots] == [[0] * 10 + [1] * 13, [1] * 23]

    run(scenario())


def test_what_the_host_memory_does_not_hold_is_computed_again(folder):
    async def scenario():
        async with fake_server(folder, host_bytes=20 * TOKEN_BYTES) as s:
            contexts = {0: prompt(0, 12), 1: prompt(1, 4)}
            await grow(s, contexts, 0)
            assert await training_phase(s, folder, 1, [0, 1]) == [True] * 2
            second = await grow(s, contexts, 1)
            assert [second[i].cached_tokens for i in (0, 1)] == [17, 3], "the longest first"
            assert (await s.engine.kv_usage()).restore_failures == 1

    run(scenario())


# --- faults ----------------------------------------------------------------------------------------------------------


def test_kv_is_saved_only_while_no_request_runs(folder):
    async def scenario():
        async with fake_server(folder, max_age=1) as s:
            s.fake.scheduler.is_fully_idle = lambda: False
            asking = asyncio.create_task(s.engine.snapshot_kv([0]))
            await s.engine._kv.introduce()  # answered all the same
            assert not asking.done()
            s.fake.scheduler.is_fully_idle = lambda: True
            assert await asking == []

    run(scenario())


def test_ranks_that_do_not_agree_keep_nothing(tmp_path):
    """Two ranks of one server; the second has less room on its device."""

    async def scenario():
        with ExitStack() as stack:
            keep, _ = stack.enter_context(plugin())
            schedulers = [fake_radix.Scheduler(num_slots, rank=i, num_ranks=2) for i, num_slots in enumerate((64, 16))]
            plugins = [KVPlugin(PluginSettings(str(keep.folder), 1 << 20, "none")) for _ in schedulers]
            for one, scheduler in zip(plugins, schedulers, strict=True):
                one.start(scheduler)
                scheduler.compute("0/0/g", range(12), 0)
            polling = asyncio.create_task(poll(plugins, schedulers))
            kv = ServerKV(keep, "sglang-0", 2, 10.0)
            await kv.introduce()
            first = request(0, range(10), 3, kv_key="g")
            kv.ended(first, kv.origin(first), 0, np.array([10, 11, 12], np.int32))
            (snapshot,) = await kv.snapshot([0])
            assert len(snapshot.token_ids) == 12
            kv.dropped()
            flushed = []

            async def flush():
                flushed.append(True)

            schedulers[0].release()
            assert await kv.restore([snapshot], 1, flush) == [False] and flushed, "the second is full"
            schedulers[1].release()
            schedulers[0].release()
            assert await kv.restore([snapshot], 1, flush) == [True] and len(flushed) == 1
            assert [s.weights_of("1/0/g", range(12)) for s in schedulers] == [[0] * 12] * 2
            polling.cancel()

    async def poll(plugins, schedulers):
        while True:
            for one, scheduler in zip(plugins, schedulers, strict=True):
                one.poll(scheduler, [])
            await asyncio.sleep(0.001)

    run(scenario())


def test_a_server_without_the_plugin_or_that_it_cannot_work_in_is_refused_at_the_start(folder):
    async def scenario():
        async with fake_server(folder) as s:
            keep = KeepOnServer(install(1 << 20, "none"), 1)
            with pytest.raises(EngineGoneError, match="KV plugin of rank 0 does not answer .*FileNotFoundError.* SGLANG_PLUGINS"):
                await connect(s.url, folder, keep=keep)
            for host_bytes, spoil, message in [
                (
                    1 << 20,
                    lambda scheduler: setattr(scheduler.tree_cache, "disable", True),
                    "switched on, found RadixCache; see rollout.sglang.server_arguments",
                ),
                (1 << 20, lambda scheduler: setattr(scheduler, "tree_cache", object()), "switched on, found object;"),
                (1 << 20, lambda scheduler: setattr(scheduler.ps, "pp_size", 2), "pipeline or data parallelism cannot keep KV"),
                (TOKEN_BYTES - 1, lambda scheduler: None, "kv_store.host_bytes: 63 bytes for each rank"),
            ]:
                s.fake.scheduler = fake_radix.Scheduler()
                spoil(s.fake.scheduler)
                with plugin(host_bytes=host_bytes) as (keep, inside):
                    s.fake.plug(inside.start, inside.poll)
                    with pytest.raises(EngineError, match=message):
                        await connect(s.url, folder, keep=keep)
                    s.fake._polling.cancel()

    run(scenario())


def test_nonsense_on_the_socket_harms_nothing(folder):
    async def scenario():
        async with fake_server(folder, max_age=1) as s:
            path = str(socket_path(s.engine._kv._keep.folder, 0))
            for data in (b"", b"GET / HTTP/1.1 and more of this", wire.encode(0, wire.Health())):
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(data)
                writer.write_eof()
                with suppress(ConnectionError):
                    answer = await reader.read()
                assert not answer or b"is no command of this plugin" in answer
                writer.close()
            await s.engine._kv.introduce()

    run(scenario())
