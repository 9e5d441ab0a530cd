"""Becomes an SGLang server that dies with the process that started it. Run as a program by `sglang_server.py`.

    python -m megatron_rl.rollout.engines.sglang_launch <parent pid> <program> <arguments...>

A trainer ended by `kill -9` cannot stop its servers; the kernel does it, for what asked for it before it began: at once, since
the same command run again needs the GPU memory. Imports nothing heavy, since it is replaced at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this server is gone already")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
