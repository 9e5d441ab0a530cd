"""Loads the compiled modules, or says in one sentence why they cannot be and how to build them.

`_ops` holds operators built against one torch; `_state` needs none and is asked first which torch that was.
"""

from __future__ import annotations

from types import ModuleType

import torch

from megatron_rl.errors import KernelError

REBUILD = "build them with `pip install --no-build-isolation -e .` in the project's folder (g++ needed: apt-get install g++)"

try:
    import megatron_rl.kernels._state as state
except ImportError as e:
    raise KernelError(f"megatron_rl's compiled kernels cannot be loaded ({e}); {REBUILD}") from e


def load_operators(built_with: str = state.built_with_torch, running: str = torch.__version__) -> ModuleType:
    """Registers torch.ops.megatron_rl.*. Raises KernelError where the torch at hand is not the one they were built with."""
    if built_with != running:
        raise KernelError(f"megatron_rl's kernels were built with torch {built_with}, running is torch {running}; {REBUILD}")
    try:
        import megatron_rl.kernels._ops as operators
    except ImportError as e:
        raise KernelError(f"megatron_rl's compiled operators cannot be loaded ({e}); {REBUILD}") from e
    return operators
