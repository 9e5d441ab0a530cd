"""What the embedded engine promises beyond the protocol: the same tokens however it schedules them, and clear failures."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
from engine_scenarios import collect, kv_of, open_engine, prompt, request, run
from transformers import AutoModelForCausalLM

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.embedded.sampling import Draw, perturbed
from megatron_rl.rollout.engines.embedded.weights import read_folder


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-scaled-rope")


def grouped_requests(num_groups=3, group_size=4, max_new_tokens=40, **options):
    """Groups with prompts of unequal length; every request of its own length."""
    return [
        request(
            i,
            prompt(i // group_size, 9 + 5 * (i // group_size)),
            max_new_tokens - i,
            seed=6,
            kv_key=f"{i // group_size}",
            **options,
        )
        for i in range(num_groups * group_size)
    ]


def generate_once(folder, requests, **options):
    async def scenario():
        engine = open_engine(folder, **options)
        found = await collect(engine, requests)
        await engine.close()
        return found

    return run(scenario())


def first_near_tie(model, context, response, req) -> int:
    """How many tokens of `response` come before the first whose two best perturbed logits differ by less than 1e-4."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    log_probs = (logits / req.sampling.temperature).log_softmax(-1)
    for i, row in enumerate(log_probs):
        best, second = perturbed(row, Draw(req.sampling, req.trajectory_id, len(context) + i)).topk(2).values.tolist()
        if best - second < 1e-4:
            return i
    return len(response)


@pytest.mark.parametrize("temperature", [0.8, 3.0])
def test_tokens_do_not_depend_on_batch_order_or_pages(folder, temperature):
    requests = grouped_requests(temperature=temperature)
    plain = generate_once(folder, requests)
    shuffled = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    others = [
        generate_once(folder, shuffled, max_running=3, batch_sizes=(3,), page_size=7, prefill_tokens=5),
        generate_once(folder, requests[::-1], page_size=32, batch_sizes=(64,)),
        {r.trajectory_id: generate_once(folder, [r])[r.trajectory_id] for r in requests[:3]},
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_compared = 0
    for req in requests:
        expected = plain[req.trajectory_id]
        num_sure = first_near_tie(model, req.token_ids, expected.token_ids, req)
        for other in others:
            if req.trajectory_id in other:
                found = other[req.trajectory_id]
                assert found.token_ids[:num_sure].tolist() == expected.token_ids[:num_sure].tolist()
                np.testing.assert_allclose(found.log_probs[:num_sure], expected.log_probs[:num_sure], atol=1e-5)
                num_compared += num_sure
    assert num_compared > 500, "near ties are rare, or the test compares nothing"


def test_same_shapes_give_the_same_bits(folder):
    async def scenario():
        engine = open_engine(folder)
        found = await collect(engine, grouped_requests())
        kv = [kv_of(engine, i) for i in range(12)]
        await engine.close()
        return found, kv

    (one, one_kv), (two, two_kv) = run(scenario()), run(scenario())
    for i in one:
        assert one[i].token_ids.tolist() == two[i].token_ids.tolist()
        assert (one[i].log_probs == two[i].log_probs).all()
    for a, b in zip(one_kv, two_kv, strict=True):
        assert torch.equal(a, b)


def test_shared_prompt_gives_the_tokens_of_separate_ones_and_is_found(folder):
    shared = generate_once(folder, grouped_requests())
    alone = generate_once(folder, [request(r.trajectory_id, r.token_ids, r.max_new_tokens, seed=6) for r in grouped_requests()])
    for i, chunk in shared.items():
        assert chunk.token_ids.tolist() == alone[i].token_ids.tolist()
        np.testing.assert_allclose(chunk.log_probs, alone[i].log_probs, atol=1e-5)
        assert alone[i].cached_tokens == 0
        assert chunk.cached_tokens == (0 if i % 4 == 0 else 9 + 5 * (i // 4) - 1)


def test_preemption_under_few_pages_gives_the_same_tokens(folder):
    requests = grouped_requests(max_new_tokens=60)
    roomy = generate_once(folder, requests)
    page_bytes = 3 * 2 * 2 * 4 * 12 * 4

    async def scenario():
        engine = open_engine(folder, kv_bytes=29 * page_bytes)  # the largest request needs 20 of 28 pages
        preempted = []
        scheduler = engine._runner.scheduler
        preempt = scheduler._preempt
        scheduler._preempt = lambda trajectory: (preempted.append(trajectory.request.trajectory_id), preempt(trajectory))
        found = await collect(engine, requests)
        await engine.load_weights([list(read_folder(folder))], 1)
        free, usable = scheduler.pages.num_free, scheduler.pages.num_usable
        await engine.close()
        return found, preempted, free, usable

    found, preempted, free, usable = run(scenario())
    assert preempted, "the pool is small enough to preempt"
    assert free == usable, "no page has leaked"
    for i, chunk in roomy.items():
        assert found[i].token_ids.tolist() == chunk.token_ids.tolist()
        np.testing.assert_allclose(found[i].log_probs, chunk.log_probs, atol=1e-5)


def test_bfloat16_stays_near_float32(folder):
    requests = [request(0, prompt(3, 20), 50, seed=1)]
    exact = generate_once(folder, requests)[0]
    half = generate_once(folder, requests, dtype=torch.bfloat16)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    context = torch.tensor([[*requests[0].token_ids, *half.token_ids]])
    with torch.no_grad():
        log_probs = model(context).logits[0, 19:-1].log_softmax(-1)
    expected = log_probs.gather(1, torch.from_numpy(half.token_ids).long()[:, None])[:, 0].numpy()
    assert 0 < np.abs(half.log_probs - expected).mean() < 0.1
    assert np.abs(exact.log_probs.mean() - half.log_probs.mean()) < 1.0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda tensors: tensors[1:], "1 tensors are missing, the first "),
        (lambda tensors: [*tensors, ("model.extra", torch.zeros(1))], "model.extra is unknown"),
        (lambda tensors: [*tensors, tensors[0]], "came twice"),
        (lambda tensors: [(n, t[:-1]) if n.endswith("q_proj.weight") else (n, t) for n, t in tensors], "q_proj.weight has shape"),
    ],
)
def test_incomplete_weights_are_refused_and_nothing_runs_on_them(folder, spoil, message):
    async def scenario():
        engine = open_engine(folder)
        tensors = list(read_folder(folder))
        with pytest.raises(EngineError, match=message):
            await engine.load_weights([spoil(tensors)], 1)
        with pytest.raises(EngineError, match="no weights"):
            await collect(engine, [request(0, [1], 3)])
        await engine.load_weights([tensors], 1)
        found = await collect(engine, [request(0, [1], 3, weight_version=1)])
        await engine.close()
        assert len(found[0].token_ids) == 3 and found[0].weight_version == 1

    run(scenario())


def test_weights_do_not_change_under_a_running_request(folder):
    async def scenario():
        engine = open_engine(folder)
        stream = engine.generate([request(0, prompt(0, 5), 240)])
        await anext(stream)
        with pytest.raises(EngineError, match="1 requests are running"):
            await engine.load_weights([list(read_folder(folder))], 1)
        await stream.aclose()
        await engine.close()

    run(scenario())


def test_a_crash_of_the_worker_reaches_every_running_and_later_call(folder):
    async def scenario():
        engine = open_engine(folder)
        steps = iter(range(5))
        step = engine._runner.step

        def failing_step():
            if next(steps, None) is None:
                raise RuntimeError("out of memory")
            return step()

        engine._runner.step = failing_step
        results = await asyncio.gather(
            collect(engine, [request(0, [1], 100)]), collect(engine, [request(1, [2], 100)]), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, EngineError) and "RuntimeError: out of memory" in str(result)
        with pytest.raises(EngineError, match="out of memory"):
            await engine.health()
        await engine.close()

    run(scenario())


def test_logits_that_are_not_finite_end_the_engine_with_the_trajectory_named(folder):
    async def scenario():
        engine = open_engine(folder)
        await engine.load_weights([[(n, t * float("nan") if "norm" in n else t) for n, t in read_folder(folder)]], 1)
        with pytest.raises(EngineError, match="trajectory 4: the model's logits are not finite"):
            await collect(engine, [request(4, [1], 3, weight_version=1)])
        await engine.close()

    run(scenario())


def test_an_engine_without_progress_is_given_up_after_its_deadline(folder):
    async def scenario():
        engine = open_engine(folder, name="slow one", silence_s=0.2)
        release = threading.Event()
        step = engine._runner.step
        engine._runner.step = lambda: (release.wait(30), step())[1]
        with pytest.raises(EngineError, match="slow one: no progress for .* allowed are 0.2"):
            await collect(engine, [request(0, [1], 3)])
        release.set()
        await engine.close()

    run(scenario())


def test_a_cache_of_less_than_two_pages_is_refused(folder):
    with pytest.raises(EngineError, match="rollout.embedded.kv_bytes=65536: a KV page of 4096 tokens"):
        open_engine(folder, kv_bytes=65536, page_size=4096)
