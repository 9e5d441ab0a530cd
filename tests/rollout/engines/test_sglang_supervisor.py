"""Servers started as processes: they die, do not start, or outlive nobody; no trajectory is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, closing, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_scenarios import collect, prompt, request, run, save_random_model
from fake_process import FakeProcess
from sglang_scenarios import connect, fake_server

from megatron_rl.config import KVStoreConfig, SGLangConfig
from megatron_rl.errors import EngineError, EngineGoneError, EngineLostError
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.rollout.engines.sglang_kv import KeepOnServer
from megatron_rl.rollout.engines.sglang_server import ServerProcess, _is_group_alive, arguments, choose_port
from megatron_rl.rollout.engines.sglang_supervisor import SupervisedEngine
from megatron_rl.types import Ending

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_sglang.py")))


def settings(folder, run_folder, *, kv_policy="recompute", **options):
    """What a server is started from; only these sections are read."""
    sglang = SGLangConfig(**{"ready_timeout_s": 50, **options})
    return SimpleNamespace(
        rollout=SimpleNamespace(sglang=sglang, kv_policy=kv_policy, kv_store=KVStoreConfig(host_bytes=1 << 20)),
        model=SimpleNamespace(folder=folder, dtype="float32"),
        run=SimpleNamespace(folder=run_folder, seed=0),
    )


def process(folder, run_folder, **options) -> ServerProcess:
    return ServerProcess(settings(folder, run_folder, **options), name="sglang-0", index=0, program=PROGRAM)


@pytest.fixture
def folder(tmp_path):
    """Of this test alone: a fake that dies once leaves a mark there."""
    return save_random_model("llama-tied", tmp_path / "model")


@asynccontextmanager
async def supervised(folder, run_folder, *, export=None, max_restarts=1, version=0, **options):
    server = process(folder, run_folder, **options)

    async def connect_here(url):
        return await connect(url, folder, keep=KeepOnServer(server.plugin_folder, 1) if server.plugin_folder else None)

    engine = SupervisedEngine(server, connect_here, max_restarts=max_restarts, export=export)
    try:
        await engine.start()
        if export is None:
            await engine.engine.adopt(0)
            engine.loaded(0)
        else:
            with export() as buckets:
                await engine.load_weights(buckets, version)
        yield engine
    finally:
        await engine.close()


def changed(folder):
    return [[(name, tensor * 1.03) for name, tensor in read_folder(folder)]]


def test_a_server_does_not_take_itself_for_a_rank_of_the_trainer_and_has_its_nccl_settings(folder, tmp_path, monkeypatch):
    of_torchrun = {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (of_torchrun | {"NCCL_NVLS_ENABLE": "0", "RANKING": "kept"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    shared, own = (process(folder, tmp_path, colocated=colocated)._surroundings() for colocated in (True, False))
    assert not of_torchrun.keys() & own.keys() and own["RANKING"] == "kept"
    assert (own["NCCL_NVLS_ENABLE"], own["NCCL_CUMEM_ENABLE"]) == ("0", "-2") and "NCCL_CUMEM_ENABLE" not in shared


def test_a_server_that_dies_while_the_trainer_has_the_gpu_is_there_again_for_the_publish(folder, tmp_path):
    """Also where other ranks would have to export its weights: a publish brings them."""

    async def scenario():
        async with supervised(folder, tmp_path / "run") as engine:
            await engine.load_weights(changed(folder), 1)
            os.kill(engine._server.pid, signal.SIGKILL)
            await engine.release_memory(["kv_cache", "weights"])
            assert engine.is_lost and not _is_group_alive(engine._server.pid), "nothing of it holds memory"
            await engine.resume_memory(["weights"])
            await engine.revive()
            await engine.load_weights(changed(folder), 2)
            await engine.resume_memory(["kv_cache"])
            await engine.revive()
            found = await collect(engine, [request(0, prompt(0, 9), 5, weight_version=2)])
            return engine.num_restarts, len(found[0].token_ids)

    assert run(scenario()) == (1, 5)


@asynccontextmanager
async def quickly_supervised(folder, faults, **options):
    """A fake server inside this process. faults: what its starts bring, called with the process."""
    server = FakeProcess(SimpleNamespace(model=SimpleNamespace(folder=folder)), name="sglang-0")
    starts = iter(faults)
    server.on_start = lambda process: next(starts)(process)
    engine = SupervisedEngine(server, partial(connect, folder=folder, **options), max_restarts=2, export=None)
    try:
        await engine.start()
        await engine.engine.adopt(0)
        engine.loaded(0)
        yield engine, server
    finally:
        await engine.close()


def fine(process):
    pass


def dies_at_once(process):
    process.kill()
    raise EngineGoneError("engine sglang-0: the server ended with signal 9")


def has_another_version(process):
    process.fake.version = "0.4.1"


def knows_no_such_argument(process):
    raise EngineError("engine sglang-0: the server ended with exit code 2; unrecognized arguments: --x")


def says_nothing(process):
    process.fake._generate = lambda body: silence()


async def silence():
    await asyncio.Event().wait()
    yield


@pytest.mark.parametrize(
    "faults, message, num_starts",
    [
        ([fine, has_another_version], "runs SGLang 0.4.1; supported are", 2),
        ([fine, knows_no_such_argument], "unrecognized arguments", 2),
        ([fine, dies_at_once, dies_at_once], r"gone, after 2 restarts \(rollout\.sglang\.max_restarts\)", 3),
    ],
)
@pytest.mark.parametrize("is_generating", [True, False])
def test_a_refusal_is_not_tried_again_and_a_death_not_for_ever(folder, is_generating, faults, message, num_starts):
    async def scenario():
        async with quickly_supervised(folder, faults) as (engine, server):
            server.kill()
            try:
                if is_generating:
                    await collect(engine, [request(0, prompt(0, 9), 5)])
                await engine.release_memory(["kv_cache", "weights"])
                await engine.revive()
            finally:
                assert server.num_starts == num_starts

    with pytest.raises(EngineError, match=message):
        run(scenario())


def test_a_refused_call_to_a_living_server_is_an_error_and_no_death(folder):
    async def scenario():
        async with quickly_supervised(folder, [fine]) as (engine, server):
            server.fake._on_flush_cache = refuse
            with pytest.raises(EngineError, match="refused /flush_cache.*: not now"):
                await engine.release_memory(["kv_cache"])
            return engine.is_lost, server.num_starts

    assert run(scenario()) == (False, 1)


async def refuse(query, body):
    return 400, {"message": "not now"}


def test_requests_of_a_server_that_hangs_or_will_not_start_at_once_are_answered_by_the_next(folder):
    async def scenario():
        async with quickly_supervised(folder, [says_nothing, dies_at_once, fine], silence_s=0.5) as (engine, server):
            found = await collect(engine, [request(i, prompt(i, 9), 20) for i in range(3)])
            assert not engine.is_restarting and not engine.is_lost
            return [len(found[i].token_ids) for i in range(3)], server.num_starts

    assert run(scenario()) == ([20, 20, 20], 3)


def test_several_calls_that_a_lost_server_refuses_wait_for_one_restart(folder):
    """Each finds out by itself, and one of them only when the next server is up."""

    async def scenario():
        async with quickly_supervised(folder, [fine, fine]) as (engine, server):
            server.kill()
            await engine.release_memory(["kv_cache", "weights"])
            engine.engine.weight_version = -1  # a publish did not reach it
            calls = [collect(engine, [request(i, prompt(i, 9), 5)]) for i in range(4)]
            found = await asyncio.gather(*calls)
            return [len(f[i].token_ids) for i, f in enumerate(found)], server.num_starts

    assert run(scenario()) == ([5] * 4, 2)


def test_requests_of_a_dead_server_go_on_where_they_were_under_the_same_weights(folder, tmp_path):
    requests = [request(i, prompt(i, 9 + i), 60, seed=3, weight_version=2) for i in range(4)]

    async def undisturbed():
        async with fake_server(folder) as s:
            await s.engine.load_weights(changed(folder), 2)
            return await collect(s.engine, requests)

    async def disturbed():
        options = {"server_arguments": {"fake_fault": 20}, "export": lambda: nullcontext(changed(folder)), "version": 2}
        async with supervised(folder, tmp_path / "run", **options) as engine:
            found = await collect(engine, requests)
            return found, engine.num_restarts

    expected, (found, num_restarts) = run(undisturbed()), run(disturbed())
    assert num_restarts == 1
    for i in range(4):
        assert found[i].token_ids.tolist() == expected[i].token_ids.tolist() and found[i].ending is Ending.LENGTH
        assert found[i].log_probs == pytest.approx(expected[i].log_probs, abs=1e-4)


def test_a_server_that_gives_a_request_up_as_it_dies_is_started_again(folder, tmp_path):
    async def scenario():
        async with supervised(folder, tmp_path / "run") as engine:

            async def give_up(requests):
                os.killpg(engine._server.pid, signal.SIGKILL)
                raise EngineError("the server gave it up: Aborted")
                yield

            engine.engine.generate = give_up
            found = await collect(engine, [request(0, prompt(0, 9), 5)])
            return engine.num_restarts, len(found[0].token_ids)

    assert run(scenario()) == (1, 5)


def test_a_stopped_server_leaves_no_process_of_its_group(tmp_path):
    async def scenario():
        server = ServerProcess(settings(tmp_path, tmp_path / "run"), name="sglang-0", index=0, program=PROGRAM)
        code = "import os, time; os.fork(); os.write(1, b'up\\n'); time.sleep(60)"
        command = [sys.executable, "-c", code]
        server._process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert [server._process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2 and _is_group_alive(server.pid)
        server._process.kill()  # the main process alone
        await server.stop()
        server._process.stdout.close()
        return _is_group_alive(server.pid)

    assert not run(scenario())


def test_a_server_that_keeps_dying_is_given_up_with_its_log(folder, tmp_path):
    async def scenario():
        async with supervised(folder, tmp_path / "run", max_restarts=0, server_arguments={"fake_fault": 3}) as engine:
            await collect(engine, [request(i, prompt(i, 9), 60) for i in range(3)])

    with pytest.raises(EngineError, match=r"(?s)after 0 restarts \(rollout\.sglang\.max_restarts\).*exit code 3.*killed"):
        run(scenario())


def test_a_server_with_newer_weights_that_other_ranks_must_export_is_lost_until_it_is_published_to(folder):
    async def scenario():
        async with quickly_supervised(folder, [fine, fine]) as (engine, server):
            await engine.load_weights(changed(folder), 1)
            server.kill()
            calls = [collect(engine, [request(i, prompt(i, 9), 5, weight_version=1)]) for i in range(2)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(e) for e in found] == [EngineLostError] * 2 and engine.is_lost and server.num_starts == 1
            await engine.revive()
            await engine.load_weights(changed(folder), 1)
            again = await collect(engine, [request(0, prompt(0, 9), 5, weight_version=1)])
            engine._max_restarts = engine.num_restarts
            server.kill()
            with pytest.raises(EngineError, match="gone, after 1 restarts") as refusal:
                await collect(engine, [request(0, prompt(0, 9), 5, weight_version=1)])
            assert type(refusal.value) is EngineError, "no rank is asked in vain"
            return len(again[0].token_ids), server.num_starts

    assert run(scenario()) == (5, 2)


def test_kv_dies_with_its_server_and_the_next_one_keeps_it_again(folder, tmp_path):
    async def scenario():
        async with supervised(folder, tmp_path / "run", kv_policy="keep") as engine:
            assert engine.capabilities.kv_snapshot
            await collect(engine, [request(0, prompt(0, 9), 6)])
            (snapshot,) = await engine.snapshot_kv([0])
            first_folder, num_bytes = engine._server.plugin_folder, (await engine.kv_usage()).snapshot_bytes
            os.kill(engine._server.pid, signal.SIGKILL)
            assert await engine.restore_kv([snapshot]) == [True], "it is on the device, as far as anybody knows"
            await engine.health()
            assert engine.num_restarts == 1 and not first_folder.exists()
            assert await engine.restore_kv([snapshot]) == [False] and await engine.snapshot_kv([0]) == []
            chunk = (await collect(engine, [request(0, prompt(0, 9), 6)]))[0]
            assert (chunk.cached_tokens, chunk.kv_versions.tolist()) == (0, [0] * 6)
            assert len((await engine.snapshot_kv([0]))[0].token_ids) == 14
            usage = await engine.kv_usage()
            assert usage.snapshot_bytes == 2 * num_bytes > 0, "of both servers"
            os.kill(engine._server.pid, signal.SIGKILL)
            assert await engine.snapshot_kv([0]) == [], "a dead server keeps nothing, and that is no reason to stop"

    run(scenario())


def test_an_end_before_readiness_is_one_error_with_the_log_and_a_remedy(folder, tmp_path):
    with pytest.raises(EngineGoneError, match=r"(?s)exit code 1; lower rollout\.sglang\.mem_fraction.*CUDA out of memory"):
        run(process(folder, tmp_path, server_arguments={"fake_fault": "oom"}).start())
    refusing = process(folder, tmp_path)
    for code, words in ((2, "exit code 2"), ("No module named 'sglang'", "exit code 1; install sglang")):
        refusing._program = (sys.executable, "-c", f"raise SystemExit({code!r})")
        with pytest.raises(EngineError, match=words) as refusal:
            run(refusing.start())
        assert type(refusal.value) is EngineError, "the same command would end the same way"
    late = process(folder, tmp_path, server_arguments={"fake_fault": "hang"}, ready_timeout_s=6)
    with pytest.raises(EngineError, match=r"not ready within rollout\.sglang\.ready_timeout_s=6"):
        run(late.start())
    assert not late.is_running


def test_a_taken_port_is_an_error_before_anything_starts():
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(EngineError, match=rf"rollout\.sglang\.port={port}: 127\.0\.0\.1:{port} cannot be used"):
            choose_port(SGLangConfig(port=port), 0)


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'megatron_rl.rollout.engines.sglang_launch', str(os.getpid()), '/bin/sleep', '600']\n"
        "print(subprocess.Popen(command).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 30
    while "sleep" not in Path(f"/proc/{child}/comm").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_arguments_are_the_servers_own_names(tmp_path):
    extra = {"grammar_backend": "none", "disable_radix_cache": False, "cuda_graph_bs": [1, 2]}
    words = arguments(settings(tmp_path, tmp_path, tensor_parallel=2, server_arguments=extra), 30000, 1)
    text = " ".join(words)
    assert "--tp-size 2" in text and "--base-gpu-id 2" in text and "--cuda-graph-bs 1 2" in text
    assert "--enable-memory-saver" in words and "--grammar-backend none" in text
    assert not {"--disable-radix-cache", "--attention-backend", "False", "None"} & set(words)
