"""The process of one SGLang server: its command line, its start with a deadline, its log, its end.

It refuses to start on a port that is taken, and never waits longer than `rollout.sglang.ready_timeout_s`. An end before it is
ready is one error with the last lines of its log and what they suggest: EngineGoneError where the same command might do better
next time, EngineError where it cannot. Requests: `sglang.py`.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import aiohttp

from megatron_rl.config import Config, SGLangConfig
from megatron_rl.errors import EngineError, EngineGoneError
from megatron_rl.rollout.engines.sglang_plugin.install import install

_HOST = "127.0.0.1"
_POLL_S = 0.2
_END_S = 2.5  # of a process that breaks its connections; SGLang looks after its children once a second
_STOP_S = 10.0  # between SIGTERM and SIGKILL
_TAIL_LINES = 12
_LAUNCH = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_(ADDR|PORT)$|TORCHELASTIC_")
_HINTS = {  # words of a log, lower case: what to do
    "out of memory": "lower rollout.sglang.mem_fraction, or free the GPU",
    "not enough memory": "raise rollout.sglang.mem_fraction, or free the GPU",
    "address already in use": "set rollout.sglang.port to a free one, or leave it unset",
    "no module named 'sglang'": "install sglang in this environment",
    "unrecognized arguments": "see rollout.sglang.server_arguments and the server's version",
}
_USAGE = 2  # exit code of a program that does not take its arguments
_FINAL = ("no module named 'sglang'",)  # words of a log after which the same command ends the same way


# NCCL's own defaults, in place of SGLang's for its processes: both ends of a broadcast must be alike.
_NCCL = {"NCCL_CUMEM_ENABLE": "-2", "NCCL_NVLS_ENABLE": "2"}


def arguments(config: Config, port: int, index: int, first_gpu: int = 0) -> list[str]:
    """Command-line arguments of the `index`-th server on this machine, whose servers' GPUs begin with `first_gpu`."""
    s = config.rollout.sglang
    values = {
        "model_path": str(config.model.folder),
        "dtype": config.model.dtype,
        "host": _HOST,
        "port": port,
        "tp_size": s.tensor_parallel,
        "base_gpu_id": first_gpu + index * s.tensor_parallel,
        "skip_tokenizer_init": True,  # token ids in and out: text is none of its business
        "incremental_streaming_output": True,
        "stream_interval": s.stream_interval,
        "mem_fraction_static": s.mem_fraction,
        "enable_memory_saver": s.takes_turns,
        "attention_backend": s.attention_backend,
        "sampling_backend": s.sampling_backend,
        "enable_deterministic_inference": s.deterministic,
        "random_seed": config.run.seed,
        "log_level_http": "warning",  # a line a request costs time and says nothing
        **s.server_arguments,
    }
    return [word for name, value in values.items() for word in _flag(name, value)]


def without_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what a launcher told the trainer of its ranks: torch.distributed inside the server, whose ranks are its own, would
    look for torchrun's store (TORCHELASTIC_USE_AGENT_STORE) and wait until it gives up."""
    return {name: value for name, value in environment.items() if not _LAUNCH.match(name)}


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    return [flag, *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]


def choose_port(config: SGLangConfig, index: int) -> int:
    """The configured port, or a free one. Raises EngineError for one that is taken."""
    wanted = 0 if config.port is None else config.port + index
    with closing(socket.socket()) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((_HOST, wanted))
        except OSError as e:
            raise EngineError(
                f"rollout.sglang.port={config.port}: {_HOST}:{wanted} cannot be used ({e.strerror}); "
                "name a free one, or leave it unset"
            ) from e
        return s.getsockname()[1]


class ServerProcess:
    """One server, started any number of times. `program` is what runs it, e.g. (python, -m, sglang.launch_server)."""

    def __init__(self, config: Config, *, name: str, index: int, program: Sequence[str], first_gpu: int = 0) -> None:
        self._config, self._program = config, tuple(program)
        self._index, self._first_gpu = index, first_gpu
        self.name = name
        self.log = config.run.folder / "log" / f"{name}.log"
        self.url = ""
        self.plugin_folder: Path | None = None  # of this start, where the server keeps KV
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "started before"
        return self._process.pid

    async def start(self) -> str:
        """Its URL, once it has generated a first token. Raises EngineGoneError when it ends or is late, EngineError where it
        would do so again: a port that is taken, arguments it does not know, no SGLang."""
        settings = self._config.rollout.sglang
        port = choose_port(settings, self._index)
        self.url = f"http://{_HOST}:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*self._program, *arguments(self._config, port, self._index, self._first_gpu)]
        launch = [sys.executable, "-m", "megatron_rl.rollout.engines.sglang_launch", str(os.getpid()), *command]
        environment = {**self._surroundings(), **self._plugin_path()}
        with self.log.open("ab") as log:
            log.write(f"# {' '.join(command)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._process = subprocess.Popen(launch, stdout=log, stderr=log, start_new_session=True, env=environment)
            self._is_stopped = False
        try:
            await asyncio.wait_for(self._ready(), settings.ready_timeout_s)
        except TimeoutError as e:
            await self.stop()
            raise EngineGoneError(
                f"engine {self.name}: not ready within rollout.sglang.ready_timeout_s={settings.ready_timeout_s:g}; "
                f"raise it, or see {self.log}:\n{self.tail()}"
            ) from e
        except BaseException:
            await self.stop()
            raise
        return self.url

    def _surroundings(self) -> dict[str, str]:
        """This process's environment, without what belongs to its rank."""
        kept = without_launch(os.environ)
        # Log-probs at the sampling temperature, whatever the surroundings say.
        kept["SGLANG_RETURN_ORIGINAL_LOGPROB"] = "0"
        return kept if self._config.rollout.sglang.colocated else _NCCL | kept

    def _plugin_path(self) -> dict[str, str]:
        """Environment by which the server finds our plugin, where KV is to be kept."""
        rollout = self._config.rollout
        if rollout.kv_policy != "keep":
            return {}
        self.plugin_folder = install(rollout.kv_store.host_bytes, rollout.kv_store.compression)
        paths = [str(self.plugin_folder), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    async def _ready(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30.0)) as session:
            while True:
                if not self.is_running:
                    error = EngineError if self._refused else EngineGoneError
                    raise error(f"engine {self.name}: the server {await self.epitaph()}")
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"{self.url}/health_generate") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_POLL_S)

    @property
    def _refused(self) -> bool:
        """Whether it ended for a reason that will be there next time."""
        assert self._process is not None, "started before"
        return self._process.poll() == _USAGE or any(words in self.tail().lower() for words in _FINAL)

    async def epitaph(self) -> str:
        """How its process ended, what its log says, and what to do about it."""
        assert self._process is not None, "started before"
        with suppress(subprocess.TimeoutExpired):  # its connections break a moment before it is gone
            await asyncio.to_thread(self._process.wait, _END_S)
        code = self._process.poll()
        how = "does not answer" if code is None else f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"
        tail = self.tail()
        hints = [hint for words, hint in _HINTS.items() if words in tail.lower()]
        return f"{how}; {hints[0] if hints else 'its log says why'} ({self.log}):\n{tail}"

    async def outlives_its_error(self) -> bool:
        """Whether it still runs, a moment after it gave an answer that a dying server may give as well."""
        process = self._process  # another may have its place soon
        assert process is not None, "started before"
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, _END_S)
        return process.poll() is None

    def tail(self) -> str:
        """The last lines of its log, of this start."""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 16384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])
        return ""

    async def stop(self) -> None:
        """End it and all its children; returns when they are gone. Any number of times."""
        process = self._process
        if process is None or self._is_stopped:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        for _ in range(round(_STOP_S / _POLL_S)):
            if process.poll() is not None:
                break
            await asyncio.sleep(_POLL_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, whatever became of it
        await asyncio.to_thread(process.wait)
        self._is_stopped = True  # from now on its group's number may be another's
        for _ in range(round(_STOP_S / _POLL_S)):  # the next server measures the GPU memory that they leave
            if not _is_group_alive(process.pid):
                break
            await asyncio.sleep(_POLL_S)
        if self.plugin_folder is not None:
            shutil.rmtree(self.plugin_folder, ignore_errors=True)


def _is_group_alive(group: int) -> bool:
    """Whether any of its processes still holds memory: those that only wait to be reaped do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, found = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False


def sglang_program() -> tuple[str, ...]:
    """What starts a real server."""
    return (sys.executable, "-m", "sglang.launch_server")
