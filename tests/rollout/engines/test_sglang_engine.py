"""SGLang's engine where it differs from the protocol's common ground: its answers' forms, weights, memory, bad servers."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_scenarios import collect, joined, prompt, request, run, save_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_scenarios import connect, fake_server
from transformers import AutoModelForCausalLM

from megatron_rl.errors import EngineError, EngineGoneError
from megatron_rl.rollout.engines import sglang_posts
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import load_weights
from megatron_rl.rollout.engines.sglang_call import Call
from megatron_rl.rollout.engines.sglang_http import EventReader
from megatron_rl.rollout.engines.sglang_posts import _named
from megatron_rl.types import Ending


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-tied")


def served(folder, scenario, **options):
    """Runs `scenario(served)` against a fake server."""

    async def body():
        async with fake_server(folder, **options) as s:
            return await scenario(s)

    return run(body())


# --- answers ---------------------------------------------------------------------------------------------------------


def event(tokens, total, *, listed, ids=None, ending=None):
    """An event whose log-prob list holds `listed`; a token's log-prob is minus its id."""
    meta = {"finish_reason": ending and {"type": ending}, "completion_tokens": total, "weight_version": "3", "cached_tokens": 2}
    meta["output_token_logprobs"] = [[-float(t), t, None] for t in listed]
    return {"output_ids": tokens if ids is None else ids, "meta_info": meta}


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 99), min_size=1, max_size=20), cuts=st.sets(st.integers(1, 19)), data=st.data())
def test_tokens_are_read_once_and_in_order_whatever_the_form_of_the_events(tokens, cuts, data):
    """Whole lists, lists that have grown since, new entries only, merged events, and the last token repeated by an abort."""
    call = Call(request(0, [1, 2], 50, weight_version=3), "client-0", 0, 256, 1)
    call.is_aborted = True
    found, known = [], 0
    for cut in [*sorted(c for c in cuts if c < len(tokens)), len(tokens)]:
        new = tokens[known:cut]
        whole = tokens[: data.draw(st.integers(cut, len(tokens)))]
        forms = [whole, whole * 2, new]
        listed = data.draw(st.sampled_from(forms)) if known else whole
        last = cut == len(tokens)
        ids = data.draw(st.sampled_from([new, new[-1:]])) if last and len(new) > 1 else new
        chunk = call.chunk(event(new, cut, listed=listed, ids=ids, ending="abort" if last else None))
        found.append(chunk)
        known = cut
    whole = joined(found)
    assert whole.token_ids.tolist() == tokens and whole.log_probs.tolist() == [-t for t in tokens]
    assert whole.kv_versions.tolist() == [3] * len(tokens) and whole.ending is Ending.ABORT and whole.cached_tokens == 2


@pytest.mark.parametrize(
    "bad, message",
    [
        (event([5], 2, listed=[5]), "0 tokens received, 2 said to be made, 1 new ones sent"),
        (event([6], 1, listed=[5]), "or not the ones named"),
        (event([5], 1, listed=[5], ending="abort"), "the server gave it up"),
    ],
)
def test_an_answer_that_cannot_be_right_is_an_error_that_names_the_request(bad, message):
    call = Call(request(7, [1, 2], 50, weight_version=3), "client-0", 4, 256, 1)
    with pytest.raises(EngineError, match=f"trajectory 7 .request 000000000007-client-0-0000000004.: .*{message}"):
        call.chunk(bad)


@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, 90)), end=st.integers(0, 90))
def test_events_are_read_whole_however_their_bytes_come(cuts, end):
    events = [{"n": 1}, {"text": "data: [DONE]"}, {"n": [2, 3]}]
    lines = [b"data: %s\n" % text for text in [*(json.dumps(e).encode() for e in events), b"[DONE]"]]
    data = b"\n".join([*lines, b""])
    reader, found = EventReader(), []
    for start, stop in pairwise([0, *sorted(c for c in cuts if c < end), end]):
        found += reader.feed(data[start:stop])
    *whole, done = (end >= data.index(line) + len(line) for line in lines)
    assert found == events[: sum(whole)] and reader.is_done == done


@pytest.mark.parametrize(
    "event, message",
    [
        ({"error": {"message": "too long"}}, "trajectories 7, 8 .request 000000000007-client-0-0000000004.: refused: too long"),
        ({"meta_info": {"id": "000000000009-client-0-0000000004"}}, "an answer to what was not asked, or has ended"),
    ],
)
def test_an_event_of_all_or_of_nobody_is_an_error(event, message):
    calls = [Call(request(i, [1, 2], 50, weight_version=3), "client-0", i - 3, 256, 1) for i in (7, 8)]
    with pytest.raises(EngineError, match=message):
        _named(event, {call.rid: call for call in calls})


def test_an_answer_under_other_weights_is_an_error(folder):
    async def scenario(s):
        s.fake.weight_version = "8"
        with pytest.raises(EngineError, match="answered under weight version 8, asked was 0"):
            await collect(s.engine, [request(0, prompt(0, 5), 5)])

    served(folder, scenario)


@pytest.mark.parametrize("form", ["all", "new"])
def test_log_probs_are_those_of_the_sampled_tokens_at_the_sampling_temperature(folder, form):
    model = AutoModelForCausalLM.from_pretrained(folder)

    async def scenario(s):
        return (await collect(s.engine, [request(0, prompt(0, 9), 40, temperature=0.7, top_k=50)]))[0]

    found = served(folder, scenario, log_probs=form)
    context = torch.tensor([[*prompt(0, 9), *found.token_ids.tolist()]])
    with torch.no_grad():
        log_probs = (model(context).logits[0, 8:-1] / 0.7).log_softmax(-1)
    expected = log_probs.gather(1, context[0, 9:, None])[:, 0]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)


# --- requests --------------------------------------------------------------------------------------------------------


def test_an_abort_that_overtakes_its_request_is_repeated(folder):
    def lose(fake):
        fake.loses_aborts = 1

    async def scenario(s):
        chunks = []
        async for chunk in s.engine.generate([request(0, prompt(0, 8), 240, temperature=2.0)]):
            chunks.append(chunk)
            if len(chunks) == 1:
                s.fake._engine._runner.step = slowed(s.fake._engine._runner.step, 0.05)  # it outlives the lost abort
                await s.engine.abort([0])
        return joined(chunks), s.fake.loses_aborts

    found, left = served(folder, scenario, before=lose)
    assert found.ending is Ending.ABORT and left == 0


def slowed(step, seconds):
    def slow_step():
        time.sleep(seconds)
        return step()

    return slow_step


def test_requests_beyond_the_bound_wait_here_and_can_be_aborted_there(folder):
    async def scenario(s):
        most, endings = 0, {}
        async for chunk in s.engine.generate([request(i, prompt(i, 8), 60) for i in range(6)]):
            most = max(most, len(s.fake._running))
            if chunk.ending is Ending.LENGTH:
                endings[chunk.trajectory_id] = chunk.ending
                if len(endings) == 2:
                    await s.engine.abort([3, 4, 5])
            elif chunk.ending is not None:
                endings[chunk.trajectory_id] = chunk.ending
        return most, endings

    most, endings = served(folder, scenario, max_concurrent=2)
    assert most <= 2 and {endings[i] for i in (4, 5)} == {Ending.ABORT} and endings[0] is Ending.LENGTH


def test_requests_go_together_as_far_as_a_post_holds_and_are_refused_together(folder, monkeypatch):
    async def scenario(s):
        requests = [request(i, prompt(i, 8), 5) for i in range(7)]
        num_posts = []
        for most, num_tokens in ((256, 1000), (3, 1000), (256, 17), (256, 1)):
            monkeypatch.setattr(sglang_posts, "_MAX_REQUESTS", most)
            monkeypatch.setattr(sglang_posts, "_MAX_TOKENS", num_tokens)
            before = s.fake.num_posts
            found = await collect(s.engine, requests)
            assert [len(found[i].token_ids) for i in range(7)] == [5] * 7
            num_posts.append(s.fake.num_posts - before)
        monkeypatch.setattr(sglang_posts, "_MAX_TOKENS", 1000)
        s.engine._context_tokens = 400  # more than the server has
        with pytest.raises(EngineError, match=r"trajectories 0, 1, 2, 3, 4, 5, 6, 7 .* refused: The input \(300 tokens\)"):
            await collect(s.engine, [*requests, request(7, prompt(7, 300), 5)])
        assert not s.fake._running, "none of them runs"
        assert len(await collect(s.engine, requests)) == 7, "their places are free again"
        return num_posts

    assert served(folder, scenario, max_concurrent=8) == [1, 3, 4, 7]


def test_a_silent_request_beside_others_that_are_answered_is_missed_by_its_own_deadline(folder):
    async def scenario(s):
        s.fake._engine._runner.step = slowed(s.fake._engine._runner.step, 0.02)
        with pytest.raises(EngineGoneError, match=r"no answer to /generate for 0\.3 s \(rollout\.request_timeout_s\)"):
            await collect(s.engine, [request(i, prompt(i, 9), 200) for i in range(3)])
        return s.fake._num_events

    assert served(folder, scenario, before=lambda fake: fake.says_nothing_of.add(1), silence_s=0.3) < 3 * 50


def test_what_is_asked_of_the_server(folder):
    async def scenario(s):
        await collect(
            s.engine, [request(i, prompt(1, 9), 3, seed=1, top_p=0.9, stop_token_ids=(4,), kv_key="p") for i in (1, 10)]
        )
        again = (await collect(s.engine, [request(1, prompt(1, 9), 3, kv_key="p")]))[1]
        other = (await collect(s.engine, [request(2, prompt(1, 9), 3, kv_key="q")]))[2]
        return s.fake.requests, again, other

    bodies, again, other = served(folder, scenario)
    ids = [body["rid"] for body in bodies]
    assert len({len(rid) for rid in ids}) == 1 and len(set(ids)) == len(ids), "of one length: no id begins with another"
    first = bodies[0]
    assert first["return_logprob"] and first["logprob_start_len"] == -1 and first["extra_key"] == "0/0/p"
    assert first["sampling_params"]["top_k"] == -1 and first["sampling_params"]["stop_token_ids"] == [4]
    assert bodies[0]["sampling_params"]["sampling_seed"] != bodies[1]["sampling_params"]["sampling_seed"]
    assert (again.cached_tokens, other.cached_tokens) == (8, 0)


# --- weights and memory ----------------------------------------------------------------------------------------------


def scaled(folder, factor):
    tensors = [(name, tensor * factor) for name, tensor in read_folder(folder)]
    return [tensors[:2], tensors[2:5], tensors[5:]]


def test_a_published_version_is_what_is_sampled_and_no_older_cache_serves_it(folder):
    async def scenario(s):
        context = prompt(0, 11)
        before = (await collect(s.engine, [request(0, context, 6)]))[0]
        await s.engine.load_weights(scaled(folder, 1.1), 1)
        after = (await collect(s.engine, [request(0, context, 6, weight_version=1)]))[0]
        return before, after, s.fake

    before, after, fake = served(folder, scenario)
    assert after.weight_version == 1 and after.cached_tokens == 0 and (before.log_probs != after.log_probs).any()
    expected = dict(read_folder(folder))
    assert all(torch.equal(fake.weights[name], tensor * 1.1) for name, tensor in expected.items())


def test_the_first_publish_is_checked_against_what_the_server_read_itself(folder, tmp_path):
    async def publish_as_fresh(s, buckets, version):
        s.fake.weight_version = "default"
        await s.engine.load_weights(buckets, version)
        return len((await collect(s.engine, [request(0, [1], 3, weight_version=version)]))[0].token_ids)

    assert served(folder, lambda s: publish_as_fresh(s, scaled(folder, 1.0), 0)) == 3
    with pytest.raises(EngineError, match=r"after publishing the model folder's weights .* differ"):
        served(folder, lambda s: publish_as_fresh(s, scaled(folder, 1.01), 0))
    with pytest.raises(EngineError, match=r"the publish did not reach model.norm.weight \(rank 0\); .*verify_weights"):
        served(
            folder,
            lambda s: publish_as_fresh(s, scaled(folder, 1.1), 4),
            before=lambda fake: fake.ignored_tensors.add("model.norm.weight"),
        )


def test_an_engine_that_dies_in_delivery_costs_the_others_nothing(folder):
    taken = []

    def buckets():
        for bucket in scaled(folder, 1.1):
            taken.append(len(bucket))
            yield bucket

    async def scenario():
        small = 1 << 14  # several calls
        async with fake_server(folder) as dying, fake_server(folder) as living:
            dying.engine.name = "sglang-1"
            update, num_updates = dying.fake._on_update_weights_from_tensor, 0

            async def update_once(query, body):
                nonlocal num_updates
                num_updates += 1
                if num_updates > 1:
                    raise dying.fake.die("killed")
                return await update(query, body)

            dying.fake._on_update_weights_from_tensor = update_once
            engines = [dying.engine, living.engine]
            failed = await load_weights(engines, buckets(), 1, living.engine.transport, bucket_bytes=small)
            assert list(failed) == ["sglang-1"] and isinstance(failed["sglang-1"], EngineGoneError) and num_updates == 2
            assert (dying.engine.weight_version, living.engine.weight_version) == (-1, 1)
            return living.fake.weights

    weights = run(scenario())
    assert taken == [len(bucket) for bucket in scaled(folder, 1.1)], "the other ranks gather to the end"
    assert all(torch.equal(weights[name], tensor * 1.1) for name, tensor in read_folder(folder))


def test_weights_of_another_shape_are_refused_by_name_and_the_iterator_is_still_emptied(folder):
    taken = []

    def buckets():
        for i, bucket in enumerate(scaled(folder, 1.0)):
            taken.append(i)
            yield [(name, tensor[:-1]) if i == 0 else (name, tensor) for name, tensor in bucket]

    async def scenario(s):
        with pytest.raises(
            EngineError, match=r"refused /update_weights_from_tensor .HTTP 400.: \S+: loaded \[.*the parameter has"
        ):
            await s.engine.load_weights(buckets(), 1)
        with pytest.raises(EngineError, match="asks for weight version 0, loaded is -1"):
            await collect(s.engine, [request(0, [1], 3)])

    served(folder, scenario)
    assert taken == [0, 1, 2], "a collective: the other ranks wait for every bucket"


def test_memory_goes_and_comes_by_tag_and_the_server_survives_doing_it_twice(folder):
    async def scenario(s):
        await collect(s.engine, [request(0, prompt(0, 9), 5)])
        for _ in range(2):
            await s.engine.release_memory(["kv_cache", "weights"])
            await s.engine.release_memory(["kv_cache"])
            with pytest.raises(EngineError, match="memory of kv_cache, weights is released"):
                await collect(s.engine, [request(0, [1], 3)])
            await s.engine.health()
            await s.engine.resume_memory(["weights"])
            await s.engine.load_weights(scaled(folder, 1.0), 1)
            await s.engine.resume_memory(["weights", "kv_cache"])
            found = (await collect(s.engine, [request(0, prompt(0, 9), 5, weight_version=1)]))[0]
            assert np.isfinite(found.log_probs).all() and found.cached_tokens == 0
        with pytest.raises(EngineError, match="memory tag 'cuda' is unknown; there are kv_cache and weights"):
            await s.engine.release_memory(["cuda"])

    served(folder, scenario)


# --- bad servers -----------------------------------------------------------------------------------------------------


def test_a_server_of_another_version_or_model_is_named(folder, model_folder, tmp_path):
    with pytest.raises(EngineError, match=r"engine sglang-0 at http://127.*runs SGLang 0\.4\.9; supported are 0\.5\.15"):
        served(folder, None, version="0.4.9")

    async def other(s):
        await connect(s.url, model_folder("qwen3-tied"))

    with pytest.raises(EngineError, match=r"serves .*, a model of another shape than model\.folder"):
        served(folder, other)

    async def elsewhere(s):
        s.fake.folder = tmp_path / "of another machine"
        await connect(s.url, save_random_model("qwen2", tmp_path / "qwen2"))

    with pytest.raises(EngineError, match=r"of type llama; model\.folder is of type qwen2"):
        served(folder, elsewhere)


def test_nobody_there_a_silent_server_and_one_that_dies_are_gone(folder):
    with pytest.raises(EngineGoneError, match=r"at http://127\.0\.0\.1:9: the connection for /server_info failed"):
        run(connect("http://127.0.0.1:9", folder))

    async def dying(s):
        s.fake.dies_after = 3
        await collect(s.engine, [request(i, prompt(i, 9), 200) for i in range(3)])

    with pytest.raises(EngineGoneError, match="the connection for /generate failed"):
        served(folder, dying)

    async def silent(s):
        s.fake._engine._runner.step = slowed(s.fake._engine._runner.step, 1.0)
        await collect(s.engine, [request(0, prompt(0, 9), 200)])

    with pytest.raises(EngineGoneError, match=r"no answer to /generate for 0\.3 s \(rollout\.request_timeout_s\)"):
        served(folder, silent, silence_s=0.3)
