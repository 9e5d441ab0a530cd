"""One test body for every engine: embedded in this process, the same engine seen over a socket, and SGLang's fake.

`tests/gpu/test_sglang.py` runs it against SGLang itself.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from engine_scenarios import collect, joined, kv_of, open_engine, prompt, request, run
from sglang_scenarios import fake_server

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines import base
from megatron_rl.rollout.engines.embedded.kv_cache import Prefill, Span
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


@asynccontextmanager
async def opened_sglang_with_plugin(folder, *, kv_folder, max_age=1) -> AsyncIterator[tuple]:
    async with opened_sglang(folder, max_age=max_age) as engines:
        yield engines


@pytest.fixture(params=[opened_embedded, opened_remote, opened_sglang], ids=["embedded", "remote", "sglang"])
def opened(request):
    return request.param


@pytest.fixture(params=[opened_embedded, opened_remote], ids=["embedded", "remote"])
def opened_with_kv(request):
    """Engines whose KV can be kept, snapshot and restored."""
    return request.param


@pytest.fixture(params=[opened_embedded, opened_remote, opened_sglang_with_plugin], ids=["embedded", "remote", "sglang"])
def opened_with_kept_kv(request):
    """Engines whose KV outlives the release of its memory."""
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
    assert {
        kind.__name__: [f.name for f in fields(kind)] for kind in (base.Request, base.Chunk, base.KVSnapshot, base.KVUsage)
    } == {
        "Request": ["trajectory_id", "token_ids", "max_new_tokens", "sampling", "weight_version", "kv_key"],
        "Chunk": ["trajectory_id", "token_ids", "log_probs", "weight_version", "kv_versions", "cached_tokens", "ending"],
        "KVSnapshot": ["trajectory_id", "token_ids", "kv_versions", "pages", "fingerprint"],
        "KVUsage": [
            "snapshot_bytes",
            "snapshot_s",
            "restore_s",
            "spilled_bytes",
            "restore_failures",
            "drift_sum",
            "drift_tokens",
        ],
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
        "kv_usage": [],
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
                    request(1, prompt(1, 249), 30),
                    request(2, [1], 0),
                ],
            )
            assert free.ending == Ending.LENGTH and len(free.token_ids) == 30
            assert stopped[0].ending == Ending.STOP
            assert stopped[0].token_ids.tolist() == free.token_ids[: first + 1].tolist(), "the stop token is included"
            left = 7 - (CONTEXT_MARGIN if isinstance(engine, SGLangEngine) else 0)
            assert stopped[1].ending == Ending.LENGTH and len(stopped[1].token_ids) == left, "256 positions, 249 of them used"
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


def test_keeping_kv_reuses_it_and_records_its_version(opened_with_kv, folder, tmp_path):
    async def scenario():
        async with opened_with_kv(folder, kv_folder=tmp_path, max_age=1) as (engine, embedded):
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


def test_kv_kept_over_a_training_phase_serves_its_own_trajectory_only_until_it_is_too_old(opened_with_kept_kv, folder, tmp_path):
    async def training_phase(engine, embedded, version):
        snapshots = await engine.snapshot_kv([0, 77])
        await engine.release_memory(["kv_cache"])
        assert await engine.restore_kv(snapshots) == [False], "nowhere to put it"
        await publish(engine, embedded, folder, version, factor=1 + version / 100)
        await engine.resume_memory(["kv_cache"])
        assert await engine.restore_kv([replace(s, fingerprint="no") for s in snapshots]) == [False]
        return [(len(s.token_ids), s.kv_versions.tolist()) for s in snapshots], await engine.restore_kv(snapshots)

    async def scenario():
        async with opened_with_kept_kv(folder, kv_folder=tmp_path, max_age=1) as (engine, embedded):
            assert engine.capabilities.kv_snapshot
            context = prompt(0, 11)
            first = (await collect(engine, [request(0, context, 6, seed=1)]))[0]
            assert await training_phase(engine, embedded, 1) == ([(16, [0] * 16)], [True])
            context += first.token_ids.tolist()
            other = (await collect(engine, [request(9, context, 5, weight_version=1, kv_key="alone 0")]))[9]
            second = (await collect(engine, [request(0, context, 6, seed=1, weight_version=1)]))[0]
            assert (other.cached_tokens, other.kv_versions.tolist()) == (0, [1] * 5)
            assert (second.cached_tokens, second.kv_versions.tolist(), second.weight_version) == (16, [0] * 6, 1)
            described, in_place = await training_phase(engine, embedded, 2)
            assert [n for n, _ in described] == [22] and in_place == [False], "two versions behind is too old"
            context += second.token_ids.tolist()
            third = (await collect(engine, [request(0, context, 6, seed=1, weight_version=2)]))[0]
            assert (third.cached_tokens, third.kv_versions.tolist()) == (0, [2] * 6)
            assert (await engine.kv_usage()).snapshot_bytes > 0

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


def test_kept_kv_survives_the_release_of_the_cache_and_continues_to_the_bit(opened_with_kv, folder, tmp_path):
    async def scenario():
        async with opened_with_kv(folder, kv_folder=tmp_path) as (engine, embedded):
            context = prompt(0, 11)
            first = (await collect(engine, [request(0, context, 6, seed=1)]))[0]
            context += first.token_ids.tolist()
            before = kv_of(embedded, 0)
            (snapshot,) = await engine.snapshot_kv([0, 77])
            assert snapshot.token_ids.tolist() == context[:16] and snapshot.kv_versions.tolist() == [0] * 16
            await engine.release_memory(["kv_cache"])
            with pytest.raises(EngineError, match="released"):
                await collect(engine, [request(0, context, 6)])
            assert await engine.restore_kv([snapshot]) == [False], "nowhere to put it"
            await engine.resume_memory(["kv_cache"])
            assert await engine.restore_kv([replace(snapshot, fingerprint="no")]) == [False]
            assert await engine.restore_kv([snapshot, replace(snapshot, trajectory_id=5)]) == [True, False]
            assert torch.equal(kv_of(embedded, 0), before)
            assert (await engine.kv_usage()).restore_failures == 2
            second = (await collect(engine, [request(0, context, 40, seed=1)]))[0]
            assert second.cached_tokens == 16
        async with opened_with_kv(folder) as (engine, _):
            whole = (await collect(engine, [request(0, prompt(0, 11), 46, seed=1)]))[0]
        assert [*first.token_ids, *second.token_ids] == whole.token_ids.tolist()
        assert [*first.log_probs, *second.log_probs] == whole.log_probs.tolist(), "same shapes, same bits"

    run(scenario())


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_a_group_goes_on_after_keep_to_the_bit_and_after_recompute_within_rounding(device, folder, tmp_path):
    """Weights unchanged, version and all: publish, release and resume between two halves of four responses."""

    def half(contexts, num_tokens, version):
        return [request(i, c, num_tokens, seed=3, kv_key="g", weight_version=version) for i, c in contexts.items()]

    async def generate(interrupt, **options):
        async with opened_embedded(folder, batch_sizes=(64,), device=torch.device(device), **options) as (engine, _):
            contexts = {i: prompt(0, 19) for i in range(4)}
            first = await collect(engine, half(contexts, 12, 0))
            contexts = {i: [*context, *first[i].token_ids] for i, context in contexts.items()}
            if interrupt:
                snapshots = await engine.snapshot_kv(list(contexts))
                await engine.release_memory(["weights", "kv_cache"])
                await publish(engine, engine, folder, 1)
                await engine.resume_memory(["kv_cache"])
                assert await engine.restore_kv(snapshots) == [True] * len(snapshots)
            second = await collect(engine, half(contexts, 25, int(interrupt)))
            usage = await engine.kv_usage()
            return second, usage.drift_sum / max(usage.drift_tokens, 1), usage.drift_tokens

    async def scenario():
        whole, *_ = await generate(False)
        kept, drift, num_measured = await generate(True, kv_folder=tmp_path, drift_samples=3)
        recomputed, *_ = await generate(True)
        for i, chunk in whole.items():
            assert kept[i].cached_tokens == 30 and recomputed[i].cached_tokens == (19 if i else 0), "only the prompt is shared"
            assert kept[i].token_ids.tolist() == recomputed[i].token_ids.tolist() == chunk.token_ids.tolist()
            assert kept[i].log_probs.tolist() == chunk.log_probs.tolist()
            np.testing.assert_allclose(recomputed[i].log_probs, chunk.log_probs, atol=1e-5)
            assert kept[i].kv_versions.tolist() == [0] * 25 and recomputed[i].kv_versions.tolist() == [1] * 25
        assert num_measured == 3 * 5 and drift < 1e-5, "the same weights under a new number: nothing has drifted"

    run(scenario())


def test_drift_is_what_new_weights_say_of_the_same_tokens_on_old_and_on_new_kv(opened_with_kv, folder, tmp_path):
    async def scenario():
        async with opened_with_kv(folder, kv_folder=tmp_path, drift_samples=1) as (engine, embedded):
            context = prompt(0, 18)
            await collect(engine, [request(0, context, 1, seed=1)])
            snapshots = await engine.snapshot_kv([0])
            await engine.release_memory(["kv_cache"])
            await publish(engine, embedded, folder, 1, factor=1.1)
            await engine.resume_memory(["kv_cache"])
            old_kv = await last_log_probs(embedded, context, await engine.restore_kv(snapshots) == [True])
            usage = await engine.kv_usage()
            new_kv = await last_log_probs(embedded, context, False)
        assert usage.drift_tokens == len(old_kv) == 5
        assert usage.drift_sum == pytest.approx(np.abs(old_kv - new_kv).sum(), rel=1e-3) and usage.drift_sum > 0.01

    async def last_log_probs(embedded, context, on_kept_kv):
        """Of tokens 13 .. 17, each decoded for itself on the kept pages of the first 12, or on none: greedy scores one token
        only, so the model is asked directly."""
        runner = embedded._runner
        pages = runner.scheduler.retained[0].pages[:3] if on_kept_kv else []
        pages = pages + runner.scheduler.pages.take(5 - len(pages), 1).tolist()
        with torch.inference_mode():
            first = 12 if on_kept_kv else 0
            hidden = [
                runner._model.forward(torch.tensor(context[i : i + 1]), Prefill(runner.cache, [Span(pages, i, i + 1)]))
                for i in range(first, 17)
            ]
            log_probs = runner._model.logits(torch.cat(hidden))[12 - first :].log_softmax(-1)
        return log_probs.gather(1, torch.tensor(context[13:])[:, None])[:, 0].double().numpy()

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
