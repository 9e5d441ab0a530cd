"""The socket between ranks: late, dead and confused peers. What it carries is tested with `test_engine_protocol.py`."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from engine_scenarios import collect, open_engine, prompt, request, run

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines import wire
from megatron_rl.rollout.engines.base import Chunk, KVSnapshot, KVUsage
from megatron_rl.rollout.engines.remote import RemoteEngine, serve
from megatron_rl.types import Ending


def through_the_wire(message):
    async def scenario():
        reader = asyncio.StreamReader()
        reader.feed_data(wire.encode(7, message))
        call, found = await wire.receive(reader)
        assert call == 7
        return found

    return run(scenario())


def test_messages_come_out_as_they_went_in():
    sent = request(3, [5, 6, 7], 9, temperature=0.5, stop_token_ids=(1, 2), kv_key="ä")
    found = through_the_wire(wire.Generate([sent])).requests[0]
    assert found.token_ids.dtype == np.int32 and found.token_ids.tolist() == [5, 6, 7]
    assert (found.sampling, found.kv_key, found.trajectory_id) == (sent.sampling, sent.kv_key, 3)
    empty = np.zeros(0, np.float32)
    chunk = through_the_wire(Chunk(1, np.zeros(0, np.int32), empty, 4, np.zeros(0, np.int32), 0, Ending.ABORT))
    assert chunk.ending is Ending.ABORT and chunk.log_probs.dtype == np.float32 and len(chunk.log_probs) == 0
    snapshot = KVSnapshot(1, np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.arange(2), "f")
    (back,) = through_the_wire(wire.RestoreKV([snapshot])).snapshots
    assert back.pages.dtype == np.int64 and back.pages.tolist() == [0, 1] and (back.trajectory_id, back.fingerprint) == (1, "f")
    usage = KVUsage(snapshot_bytes=1 << 40, snapshot_s=0.5)
    assert through_the_wire(usage) == usage


@pytest.mark.parametrize("tree", ['{"type": "os", "fields": {}}', '{"type": "Done", "fields": {"a": 1}}', '{"array": 0}', "{}"])
def test_a_frame_of_unknown_types_is_refused(tree):
    async def scenario():
        header = f'{{"call": 1, "message": {tree}, "arrays": [["__loader__", [2]]]}}'.encode()
        reader = asyncio.StreamReader()
        reader.feed_data(len(header).to_bytes(4, "big") + bytes(8) + header)
        await wire.receive(reader)

    with pytest.raises(EngineError, match="cannot be read"):
        run(scenario())


def test_a_silent_engine_is_named_after_its_deadline():
    """The fake rank says who it is, then nothing more."""

    async def scenario():
        async def answer_once(reader, writer):
            call, _ = await wire.receive(reader)
            description = wire.Description("rank 3", wire.Capabilities(True, True, True, True), 0)
            writer.write(wire.encode(call, description))
            await reader.read()  # until the other side leaves
            writer.close()

        listener = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        engine = await RemoteEngine.connect("127.0.0.1", listener.sockets[0].getsockname()[1], silence_s=0.2)
        with pytest.raises(EngineError, match="engine rank 3: silent for 0.2 s"):
            await collect(engine, [request(0, [1], 3)])
        await engine.close()
        listener.close()

    run(scenario())


def test_a_slow_engine_that_gives_signs_of_life_is_waited_for(model_folder):
    async def scenario():
        embedded = open_engine(model_folder("llama-tied"))
        server = await serve(embedded, host="127.0.0.1", port=0, heartbeat_s=0.01)
        engine = await RemoteEngine.connect("127.0.0.1", server.port, silence_s=1.0)
        awaiting = asyncio.create_task(engine.generate([request(0, prompt(0, 5), 100)]).__anext__())
        waiting = asyncio.create_task(engine._hear(asyncio.Queue()))  # a call whose answer takes longer than silence_s
        await asyncio.wait([waiting], timeout=1.3)
        assert not waiting.done()
        waiting.cancel()
        await awaiting
        await engine.close()
        await server.close()
        await embedded.close()

    run(scenario())


def test_a_connection_that_breaks_fails_running_calls_and_frees_the_engine(model_folder):
    async def scenario():
        embedded = open_engine(model_folder("llama-tied"), name="rank 1")
        server = await serve(embedded, host="127.0.0.1", port=0)
        engine = await RemoteEngine.connect("127.0.0.1", server.port, silence_s=30)
        stream = engine.generate([request(0, prompt(0, 5), 240)])
        await anext(stream)
        await server.close()
        with pytest.raises(EngineError, match="rank 1: the connection broke"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="rank 1: the connection broke"):
            await engine.health()
        await embedded.health()
        assert not embedded._runner.has_work, "the request of the lost connection was aborted"
        await engine.close()
        await embedded.close()

    run(scenario())


def test_a_version_that_does_not_come_is_an_error_that_names_both(model_folder):
    async def scenario():
        embedded = open_engine(model_folder("llama-tied"), name="rank 1")
        server = await serve(embedded, host="127.0.0.1", port=0, heartbeat_s=0.05)
        engine = await RemoteEngine.connect("127.0.0.1", server.port, silence_s=0.3)
        with pytest.raises(EngineError, match="rank 1: still at weight version 0 after .* awaited is 5"):
            await engine.load_weights([], 5)
        await engine.close()
        await server.close()
        await embedded.close()

    run(scenario())


def test_a_rank_that_never_listens_is_named():
    async def scenario():
        listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()
        await RemoteEngine.connect("127.0.0.1", port, silence_s=1, connect_s=0.2)

    with pytest.raises(EngineError, match=r"engine at 127.0.0.1:\d+: no connection within"):
        run(scenario())
