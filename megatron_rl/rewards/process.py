"""The owner's side of one scoring worker: start, ask under a deadline, kill, start afresh.

A plain child process over pipes, never a fork of this one: forking a process with threads and a GPU is not safe.
After any failure the process is killed, with everything it started, and the next call gets a fresh one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

from megatron_rl.errors import RewardError
from megatron_rl.rewards.wire import Call, Cause, Reply, Setup, failed, send
from megatron_rl.types import OutcomeKind

START_S = 60.0  # a user's module may import much
WALL_FACTOR = 6.0  # wall clock a call may take, in its CPU time: waiting is no fault on a busy machine
LONGEST_PART = 1 << 16


class Worker:
    """Used by one thread at a time; `interrupt` may be called by any."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def launch(self) -> None:
        """Start the process without waiting for it, so that several start together."""
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each reserves memory for every thread
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._send(self._setup)

    def wait_ready(self) -> Reply:
        """A failed reply, and no process any more, where the set-up failed."""
        reply = self._receive(START_S)
        if reply.kind is OutcomeKind.FAILED:
            self.kill()
        return reply

    def check_ready(self) -> None:
        """Raises RewardError where the set-up failed."""
        reply = self.wait_ready()
        if reply.kind is not OutcomeKind.FAILED:
            return
        if reply.cause is Cause.UNUSABLE:
            raise RewardError(reply.detail)
        raise RewardError(f"rewards.terms: a scoring worker could not load them: {reply.detail}; correct the function's module")

    def ask(self, call: Call) -> Reply:
        """The term's verdict; failures are replies too, and leave no process behind."""
        if self._closed:
            return failed(Cause.CRASH, "the scorer is closed")
        if self._process is None:
            self.launch()
            reply = self.wait_ready()
            if reply.kind is OutcomeKind.FAILED:
                return reply
        self._send(call)
        reply = self._receive(WALL_FACTOR * call.cpu_s)
        if reply.kind is OutcomeKind.FAILED:
            self.kill()
        return reply

    def interrupt(self) -> None:
        """End the call that is running, and refuse later ones; another thread's `ask` returns a failed reply."""
        self._closed = True
        if self._process is not None:
            _kill_session(self._process.pid)

    def kill(self) -> int | None:
        """End the process and all it started; its exit status, None where there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        _kill_session(process.pid)
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def _send(self, message: Setup | Call) -> None:
        assert self._process is not None and self._process.stdin is not None, "the worker was launched with a pipe"
        try:
            send(self._process.stdin, message)
        except BrokenPipeError:
            return  # it has died; `_receive` finds its last words and its exit status

    def _receive(self, wall_s: float) -> Reply:
        process = self._process
        assert process is not None and process.stdout is not None, "the worker was launched with a pipe"
        deadline = time.monotonic() + wall_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                return failed(Cause.DEADLINE, f"no answer within {wall_s:g} s of wall clock")
            part = os.read(process.stdout.fileno(), LONGEST_PART)
            if not part:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it closes its pipe a little before it ends
                    process.wait(max(0.0, deadline - time.monotonic()))
                return _obituary(self.kill())
            line += part
        try:
            return Reply.from_json(line)
        except (ValueError, KeyError, TypeError) as e:
            return failed(Cause.CRASH, f"the worker's answer was damaged: {e!r}")


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has been reaped already
        os.killpg(pid, signal.SIGKILL)


def _obituary(status: int | None) -> Reply:
    assert status is not None, "a worker that closed its pipe had a process"
    if status == -signal.SIGPROF:
        return failed(Cause.DEADLINE, "rewards.timeout_s of CPU time is spent")
    if status < 0:
        return failed(Cause.CRASH, f"the worker was ended by {signal.Signals(-status).name}")
    return failed(Cause.CRASH, f"the worker ended with exit status {status}")
