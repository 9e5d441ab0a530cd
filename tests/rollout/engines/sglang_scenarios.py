"""A fake SGLang server with an engine in front of it, and configurations that start one as a process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_sglang import FakeSGLang, serialize

from megatron_rl.config import SGLangConfig
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.sglang import SGLangEngine


@dataclass
class Served:
    fake: FakeSGLang
    engine: SGLangEngine
    url: str


async def connect(url: str, folder: Path, **options: Any) -> SGLangEngine:
    """options: fields of SGLangConfig, and `silence_s`."""
    silence_s = options.pop("silence_s", 30.0)
    config = SGLangConfig(**{"stream_interval": 4, **options})
    return await SGLangEngine.connect(
        url, ModelConfig.from_folder(folder), config, name="sglang-0", silence_s=silence_s, serialize=lambda: serialize
    )


@asynccontextmanager
async def fake_server(
    folder: Path, *, before: Callable[[FakeSGLang], None] = lambda fake: None, **options: Any
) -> AsyncIterator[Served]:
    """A fake server at weight version 0. before: sets its faults; options: of EmbeddedConfig, SGLangConfig and FakeSGLang."""
    ours = {key: options.pop(key) for key in list(options) if key in SGLangConfig.model_fields or key == "silence_s"}
    fake = FakeSGLang(folder, **options)
    before(fake)
    url = await fake.http.listen()
    engine = None
    try:
        engine = await connect(url, folder, **ours)
        await engine.adopt(0)
        yield Served(fake, engine, url)
    finally:
        if engine is not None:
            await engine.close()
        await fake.close()
