"""A fake SGLang server with an engine in front of it, and configurations that start one as a process."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_radix
from fake_sglang import FakeSGLang, serialize

from megatron_rl.config import SGLangConfig
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_kv import KeepOnServer
from megatron_rl.rollout.engines.sglang_plugin.install import PluginSettings, install
from megatron_rl.rollout.engines.sglang_plugin.plugin import KVPlugin
from megatron_rl.rollout.engines.sglang_transport import IPC


@dataclass
class Served:
    fake: FakeSGLang
    engine: SGLangEngine
    url: str


async def connect(url: str, folder: Path, **options: Any) -> SGLangEngine:
    """options: fields of SGLangConfig, and arguments of SGLangEngine.connect."""
    ours = {"name": "sglang-0", "silence_s": 30.0, "transport": IPC(lambda: serialize), "keep": None}
    ours |= {key: options.pop(key) for key in list(options) if key in ours}
    config = SGLangConfig(**{"stream_interval": 4, "bucket_bytes": 1 << 20, **options})
    return await SGLangEngine.connect(url, ModelConfig.from_folder(folder), config, **ours)


@contextmanager
def plugin(*, max_age: int = 1, host_bytes: int = 1 << 20) -> Iterator[tuple[KeepOnServer, KVPlugin]]:
    """What an engine is told of a plugin, and the plugin."""
    folder = install(host_bytes, "none")
    with fake_radix.importable():
        yield KeepOnServer(folder, max_age), KVPlugin(PluginSettings(str(folder), host_bytes, "none"))
    shutil.rmtree(folder)


@asynccontextmanager
async def fake_server(
    folder: Path, *, before: Callable[[FakeSGLang], None] = lambda fake: None, **options: Any
) -> AsyncIterator[Served]:
    """A fake server at weight version 0. before: sets its faults; options: of EmbeddedConfig, SGLangConfig and FakeSGLang, and
    with `max_age` or `host_bytes` those of `plugin`."""
    kept = {key: options.pop(key) for key in list(options) if key in ("max_age", "host_bytes")}
    connected = ("name", "silence_s", "transport")
    ours = {key: options.pop(key) for key in list(options) if key in SGLangConfig.model_fields or key in connected}
    fake = FakeSGLang(folder, **options)
    before(fake)
    url = await fake.http.listen()
    engine = None
    stack = ExitStack()
    try:
        if kept:
            ours["keep"], inside = stack.enter_context(plugin(**kept))
            fake.plug(inside.start, inside.poll)
        engine = await connect(url, folder, **ours)
        await engine.adopt(0)
        yield Served(fake, engine, url)
    finally:
        if engine is not None:
            await engine.close()
        await fake.close()
        stack.close()
