"""Weights to servers with GPUs of their own: a group over gloo in place of NCCL's, and fakes that take part in it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
import torch
from engine_scenarios import collect, prompt, request, run
from fake_sglang import GlooGroup
from sglang_scenarios import fake_server

from megatron_rl.errors import EngineError, EngineGoneError
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang import load_weights
from megatron_rl.rollout.engines.sglang_transport import Broadcast


@pytest.fixture
def folder(model_folder):
    return model_folder("llama-tied")


def scaled(folder, factor):
    return [[(name, tensor * factor)] for name, tensor in read_folder(folder)]


def holds(fake, folder, factor):
    return all(torch.equal(fake.weights[name], tensor * factor) for name, tensor in read_folder(folder))


async def publish(engines, buckets, version):
    for error in (await load_weights(engines, buckets, version, engines[0].transport, bucket_bytes=1 << 14)).values():
        raise error


def served(folder, scenario, *, timeout_s=20.0, num_servers=2):
    """Runs `scenario(transport, servers, stack)`; buckets are small enough that a publish takes several."""

    async def body():
        transport = Broadcast(GlooGroup, timeout_s)
        async with AsyncExitStack() as stack:
            names = [f"sglang-{i}" for i in range(num_servers)]
            servers = [await stack.enter_async_context(another(folder, transport, name)) for name in names]
            await scenario(transport, servers, stack)
            await transport.close()

    run(body())


def another(folder, transport, name):
    return fake_server(folder, transport=transport, name=name, bucket_bytes=1 << 14)


def test_one_broadcast_reaches_all_servers_and_a_new_one_joins_in_a_new_group(folder):
    async def scenario(transport, servers, stack):
        first, second = servers
        first.fake.weight_version = "default"  # its first publish is checked against what it read itself
        await publish([first.engine, second.engine], scaled(folder, 1.0), 0)
        assert holds(first.fake, folder, 1.0) and holds(second.fake, folder, 1.0)
        (group,) = first.fake.groups
        assert list(second.fake.groups) == [group]
        await publish([first.engine, second.engine], scaled(folder, 1.1), 1)
        assert list(first.fake.groups) == [group], "a group is kept as long as its members are"
        await second.fake.close()  # and another is started in its place
        third = await stack.enter_async_context(another(folder, transport, "sglang-2"))
        await third.engine.load_weights(scaled(folder, 1.1), 1)
        assert holds(third.fake, folder, 1.1) and not first.fake.groups
        await publish([first.engine, third.engine], scaled(folder, 1.2), 2)
        assert holds(first.fake, folder, 1.2) and holds(third.fake, folder, 1.2)
        assert list(first.fake.groups) == list(third.fake.groups) and len(third.fake.groups) == 1
        found = await collect(third.engine, [request(0, prompt(0, 9), 5, weight_version=2)])
        assert len(found[0].token_ids) == 5
        await transport.close()
        assert not first.fake.groups and not third.fake.groups, "servers that live on keep nothing of it"

    served(folder, scenario)


def test_servers_that_are_loaded_at_the_same_time_each_get_their_own(folder):
    """Two that died together are started again side by side."""

    async def scenario(transport, servers, stack):
        loads = [s.engine.load_weights(scaled(folder, 1.0 + i), 1) for i, s in enumerate(servers)]
        await asyncio.gather(*loads)
        assert holds(servers[0].fake, folder, 1.0) and holds(servers[1].fake, folder, 2.0)

    served(folder, scenario)


def test_a_publish_left_out_tensors_is_found_by_its_checksums_here_too(folder):
    async def scenario(transport, servers, stack):
        servers[0].fake.ignored_tensors.add("model.norm.weight")
        with pytest.raises(EngineError, match=r"the publish did not reach model.norm.weight \(rank 0\)"):
            await servers[0].engine.load_weights(scaled(folder, 1.1), 4)

    served(folder, scenario, num_servers=1)


def test_the_end_of_a_server_in_a_broadcast_is_no_fault_of_the_others_which_are_published_to_again(folder):
    async def scenario(transport, servers, stack):
        engines, dying = [s.engine for s in servers], servers[1].fake
        update, num_updates, taken = dying._on_update_weights_from_distributed, 0, []

        async def update_once(query, body):
            nonlocal num_updates
            num_updates += 1
            if num_updates > 1:
                raise dying.die("killed")
            return await update(query, body)

        def buckets():
            for bucket in scaled(folder, 1.1):
                taken.append(bucket)
                yield bucket

        dying._on_update_weights_from_distributed = update_once
        failed = await load_weights(engines, buckets(), 1, transport, bucket_bytes=1 << 14)
        assert list(failed) == ["sglang-1"] and isinstance(failed["sglang-1"], EngineGoneError)
        assert len(taken) == len(scaled(folder, 1.1)), "the other ranks gather to the end"
        assert engines[0].weight_version == -1, "it lacks what was left"
        await publish(engines[:1], scaled(folder, 1.1), 1)
        assert holds(servers[0].fake, folder, 1.1)

    served(folder, scenario)


def test_whoever_is_late_or_refuses_is_named_and_the_next_publish_has_a_new_group(folder):
    async def scenario(transport, servers, stack):
        engines = [s.engine for s in servers]
        await publish(engines, scaled(folder, 1.0), 1)
        servers[1].fake.misses_broadcasts = True
        late = r"by broadcast: no answer of .*sglang-1; waited up to training\.collective_timeout_s=1; .*NCCL_CUMEM_ENABLE"
        with pytest.raises(EngineError, match=late):
            await publish(engines, scaled(folder, 1.1), 2)
        servers[1].fake.misses_broadcasts = False
        wrong = [[(name, tensor[:-1]) for name, tensor in bucket] for bucket in scaled(folder, 1.0)]
        with pytest.raises(EngineError, match=r"sglang-\d at .*refused /update_weights_from_distributed .*the parameter has"):
            await publish(engines, wrong, 3)
        await publish(engines, scaled(folder, 1.2), 4)
        assert all(holds(s.fake, folder, 1.2) and len(s.fake.groups) == 1 for s in servers)
        await servers[0].fake.close()
        with pytest.raises(EngineGoneError, match="engine sglang-0 at .*: the connection for /.* failed"):
            await publish(engines, scaled(folder, 1.3), 5)
        assert engines[1].weight_version == 5 and holds(servers[1].fake, folder, 1.3), "found before the group was formed"

    served(folder, scenario, timeout_s=1.0)
