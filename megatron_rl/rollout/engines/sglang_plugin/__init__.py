"""A plugin inside SGLang's scheduler processes that keeps KV of unfinished trajectories over the training phase.

    SGLangEngine --Unix socket of each scheduler process, between two batches--> KVPlugin (`plugin.py`)
                                  prefix tree and pool (`cache.py`) <--pages--> pinned host memory (`store.py`)

SGLang finds it as an entry point of the group `sglang.srt.plugins`, which `install.py` puts on the server's PYTHONPATH: so it is
found in every process that the server spawns, installed or not, and in no server that we did not start. It is told what it needs
by a file beside the entry point. The other end of the socket: `sglang_kv.py`.
"""

from __future__ import annotations

import sys

from megatron_rl.rollout.engines.sglang_plugin.install import read_settings
from megatron_rl.rollout.engines.sglang_plugin.plugin import KVPlugin

_SCHEDULER = "sglang.srt.managers.scheduler"


def register() -> None:
    """The entry point. SGLang calls it in every process before work begins; only those that hold a scheduler get the plugin."""
    if _SCHEDULER not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    plugin = KVPlugin(read_settings())
    HookRegistry.register(f"{_SCHEDULER}.Scheduler.run_event_loop", plugin.start, HookType.BEFORE)
    HookRegistry.register(f"{_SCHEDULER}.Scheduler.process_input_requests", plugin.poll, HookType.BEFORE)
