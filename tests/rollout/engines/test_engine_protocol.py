"""One test body for every engine: embedded in this process, the same engine seen over a socket, and SGLang's fake.

`tests/gpu/test_sglang.py` runs it against SGLang itself.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
from engine_scenarios import collect, joined, open_engine, prompt, request, run
from sglang_scenarios import fake_server

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines import base
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.remote import RemoteEngine, serve
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import CONTEXT_MARGIN
from megatron_rl.types import Ending


@asynccontextmanager
async def opened_embedded(folder, **options) -> AsyncIterator[tuple]:
    """(engine under test, the engine that is given its weights)"""
    embedded = open_engine(folder, **options)
    yield embedded, embedded
    await embedded.close()


@asynccontextmanager
async def opened_remote(folder, **options) -> AsyncIterator[tuple]:
    async with opened_embedded(folder, **options) as (embedded, _):
        server = await serve(embedded, host="127.0.0.1", port=0)
        engine = await RemoteEngine.connect("127.0.0.1", server.port, silence_s=30)
        yield engine, embedded
        await engine.close()
        await server.close()


@asynccontextmanager
async def opened_sglang(folder, **options) -> AsyncIterator[tuple]:
    async with fake_server(folder, **options) as server:
        yield server.engine, server.engine


@pytest.fixture(params=[opened_embedded, opened_remote, opened_sglang], ids=["embedded", "remote", "sglang"])
def opened(request):
    return request.param


@pytest.fixture(params=[opened_embedded, opened_remote], ids=["embedded", "remote"])
def opened_with_kv(request):
    """Engines whose KV can be kept, snapshot and restored."""
    return request.param


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-tied")


async def publish(engine, embedded, folder, version, factor=1.0):
    """New weights to the embedded engine, in three buckets; the engine under test hears of the version."""
    tensors = [(name, tensor * factor) for name, tensor in read_folder(folder)]
    await embedded.load_weights([tensors[5:], tensors[2:5], tensors[:2]], version)
    if engine is not embedded:
        await engine.load_weights([], version)


def test_protocol_is_frozen():
    """A change here is a change for every engine and for the wire; make it on purpose."""
    assert [f.name for f in fields(base.Sampling)] == ["temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids"]
    assert base.Sampling() == base.Sampling(1.0, 1.0, 0, 0.0, 0, ())
    assert {kind.__name__: [f.name for f in fields(kind)] for kind in (base.Request, base.Chunk, base.KVSnapshot)} == {
        "Request": ["trajectory_id", "token_ids", "max_new_tokens", "sampling", "weight_version", "kv_key"],
        "Chunk": ["trajectory_id", "token_ids", "log_probs", "weight_version", "kv_versions", "cached_tokens", "ending"],
        "KVSnapshot": ["trajectory_id", "token_ids", "kv_versions", "keys", "values", "fingerprint"],
    }
    assert [f.name for f in fields(base.Capabilities)] == ["log_probs", "kv_snapshot", "memory_release", "streaming"]
    assert [e.value for e in Ending] == ["stop", "length", "budget", "repeat", "abort"]
    public = {n: list(inspect.signature(f).parameters)[1:] for n, f in inspect.getmembers(base.Engine, inspect.isfunction)}
    assert {name: parameters for name, parameters in public.items() if not name.startswith("_")} == {
        "generate": ["requests"],
        "abort": ["trajectory_ids"],
        "load_weights": ["buckets", "version"],
        "release_memory": ["tags"],
        "resume_memory": ["tags"],
        "snapshot_kv": ["trajectory_ids"],
        "restore_kv": ["snapshots"],
        "health": [],
        "close": [],
    }
    assert set(base.Engine.__annotations__) == {"name", "capabilities", "weight_version"}


def test_requests_end_as_length_or_at_their_stop_token(opened, folder):
    async def scenario():
        async with opened(folder) as (engine, _):
            free = (await collect(engine, [request(0, prompt(0, 9), 30, seed=4)]))[0]
            stop = int(free.token_ids[11])
            first = free.token_ids.tolist().index(stop)
            stopped = await collect(
                engine,
                [
                    request(0, prompt(0, 9), 30, seed=4, stop_token_ids=(stop,)),
                    request(1, prompt(1, 250), 30),
                    request(2, [1], 0),
                ],
            )
            assert free.ending == Ending.LENGTH and len(free.token_ids) == 30
            assert stopped[0].ending == Ending.STOP
            assert stopped[0].token_ids.tolist() == free.token_ids[: first + 1].tolist(), "the stop token is included"
            left = 6 - (CONTEXT_MARGIN if isinstance(engine, SGLangEngine) else 0)
            assert stopped[1].ending == Ending.LENGTH and len(stopped[1].token_ids) == left, "256 positions, 250 of them used"
            assert stopped[2].ending == Ending.LENGTH and len(stopped[2].token_ids) == 0

    run(scenario())


def test_abort_and_resume_equals_uninterrupted(opened, folder):
    async def scenario():
        async with opened(folder) as (engine, _):
            requests = [request(i, prompt(i, 10 + i), 230, seed=2, temperature=1.3) for i in range(3)]
            whole = await collect(engine, requests)
            fresh = [request(i, prompt(i, 10 + i), 230, seed=2, temperature=1.3, kv_key="another") for i in range(3)]
            parts = {i: [] for i in range(3)}
            async for chunk in engine.generate(fresh):
                parts[chunk.trajectory_id].append(chunk)
                if chunk.trajectory_id == 1 and len(parts[1]) == 2:
                    await engine.abort([0, 1])
            cut = {i: joined(chunks) for i, chunks in parts.items()}
            assert [cut[i].ending for i in range(3)] == [Ending.ABORT, Ending.ABORT, Ending.LENGTH]
            for i in (0, 1):
                num_made = len(cut[i].token_ids)
                assert 0 < num_made < 230
                context = [*prompt(i, 10 + i), *cut[i].token_ids]
                rest = (await collect(engine, [request(i, context, 230 - num_made, seed=2, temperature=1.3)]))[i]
                assert rest.cached_tokens == len(context) - 1, "all but the last token had been computed"
                assert [*cut[i].token_ids, *rest.token_ids] == whole[i].token_ids.tolist()
                log_probs = np.concatenate([cut[i].log_probs, rest.log_probs])
                np.testing.assert_allclose(log_probs, whole[i].log_probs, atol=1e-5)

    run(scenario())


def test_abort_of_everything_ends_waiting_requests_too(opened, folder):
    async def scenario():
        async with opened(folder, max_running=2) as (engine, _):
            endings = {}
            async for chunk in engine.generate([request(i, prompt(i, 8), 200) for i in range(6)]):
                if not endings and chunk.ending is None:
                    await engine.abort(None)
                if chunk.ending is not None:
                    endings[chunk.trajectory_id] = chunk.ending
            assert endings == dict.fromkeys(range(6), Ending.ABORT)
            await engine.health()

    run(scenario())


def test_keeping_kv_reuses_it_and_records_its_version(opened_with_kv, folder):
    async def scenario():
        async with opened_with_kv(folder, kv_policy="keep", max_kv_age=1) as (engine, embedded):
            context = prompt(0, 11)
            first = (await collect(engine, [request(0, context, 6, seed=1)]))[0]
            await publish(engine, embedded, folder, 1, factor=1.01)
            context += first.token_ids.tolist()
            other = (await collect(engine, [request(9, context, 5, weight_version=1, kv_key="alone 0")]))[9]
            second = (await collect(engine, [request(0, context, 6, seed=1, weight_version=1)]))[0]
            await publish(engine, embedded, folder, 2, factor=1.02)
            context += second.token_ids.tolist()
            third = (await collect(engine, [request(0, context, 6, seed=1, weight_version=2)]))[0]
            assert (other.cached_tokens, other.kv_versions.tolist()) == (0, [1] * 5), "old KV serves its own trajectory only"
            assert (second.cached_tokens, second.kv_versions.tolist(), second.weight_version) == (16, [0] * 6, 1)
            assert (third.cached_tokens, third.kv_versions.tolist()) == (0, [2] * 6), "two versions behind is too old"

    run(scenario())


def test_recompute_policy_drops_kv_and_equals_an_engine_that_never_had_it(opened, folder):
    async def scenario():
        async with opened(folder) as (engine, embedded):
            context = prompt(0, 11)
            first = (await collect(engine, [request(0, context, 6, seed=1)]))[0]
            context += first.token_ids.tolist()
            await publish(engine, embedded, folder, 1, factor=1.05)
            second = (await collect(engine, [request(0, context, 30, seed=1, weight_version=1)]))[0]
        async with opened(folder) as (engine, embedded):
            await publish(engine, embedded, folder, 1, factor=1.05)
            fresh = (await collect(engine, [request(0, context, 30, seed=1, weight_version=1)]))[0]
        assert second.cached_tokens == 0 and second.kv_versions.tolist() == [1] * 30
        assert second.token_ids.tolist() == fresh.token_ids.tolist()
        assert (second.log_probs == fresh.log_probs).all(), "same shapes, same bits"
        assert (first.token_ids != second.token_ids[:6]).any()

    run(scenario())


def test_kv_snapshot_survives_the_release_of_the_cache(opened_with_kv, folder):
    async def scenario():
        async with opened_with_kv(folder) as (engine, _):
            context = prompt(0, 11)
            first = (await collect(engine, [request(0, context, 6, seed=1)]))[0]
            context += first.token_ids.tolist()
            (snapshot,) = await engine.snapshot_kv([0, 77])
            await engine.release_memory(["kv_cache"])
            with pytest.raises(EngineError, match="released"):
                await collect(engine, [request(0, context, 6)])
            await engine.resume_memory(["kv_cache"])
            assert snapshot.keys.shape == (3, 16, 2, 12) and snapshot.token_ids.tolist() == context[:16]
            foreign = base.KVSnapshot(**{**{f.name: getattr(snapshot, f.name) for f in fields(snapshot)}, "fingerprint": "no"})
            assert await engine.restore_kv([foreign, snapshot]) == [False, True]
            again = (await engine.snapshot_kv([0]))[0]
            assert torch.equal(again.keys, snapshot.keys) and torch.equal(again.values, snapshot.values)
            second = (await collect(engine, [request(0, context, 40, seed=1)]))[0]
            assert second.cached_tokens == 16
        async with opened_with_kv(folder) as (engine, _):
            whole = (await collect(engine, [request(0, prompt(0, 11), 46, seed=1)]))[0]
        assert [*first.token_ids, *second.token_ids] == whole.token_ids.tolist()

    run(scenario())


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: [request(0, prompt(0, 257), 5)], "context of 257 tokens; the model takes 1 to 256"),
        (lambda: [request(0, [], 5)], "context of 0 tokens"),
        (lambda: [request(0, [1], 5, weight_version=3)], "asks for weight version 3, loaded is 0"),
        (lambda: [request(0, [1], 5), request(0, [2], 5)], "occurs twice"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_the_engine_goes_on(opened, folder, bad, message):
    async def scenario():
        async with opened(folder, kv_bytes=70_000) as (engine, _):
            with pytest.raises(EngineError, match=message):
                await collect(engine, bad())
            assert len((await collect(engine, [request(0, [1, 2], 5)]))[0].token_ids) == 5

    run(scenario())


def test_a_request_larger_than_the_cache_is_refused_with_the_size_it_needs(opened_with_kv, folder):
    async def scenario():
        async with opened_with_kv(folder, kv_bytes=70_000) as (engine, _):
            with pytest.raises(EngineError, match="rollout.embedded.kv_bytes=70000: .* raise it to at least"):
                await collect(engine, [request(0, prompt(0, 60), 100)])
            assert len((await collect(engine, [request(0, [1, 2], 5)]))[0].token_ids) == 5

    run(scenario())


def test_a_consumer_that_leaves_takes_its_requests_with_it(opened, folder):
    async def scenario():
        async with opened(folder) as (engine, embedded):
            stream = engine.generate([request(0, prompt(0, 9), 200)])
            await anext(stream)
            await stream.aclose()
            await engine.health()  # commands are taken in order: the abort is through
            await embedded.health()
            found = await collect(engine, [request(0, prompt(0, 9), 20)])
            assert len(found[0].token_ids) == 20

    run(scenario())
