"""`ServerProcess` with the fake server inside this process: it dies at any call, and is started again, in no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.rollout.engines.fake_sglang import FakeSGLang


class FakeProcess:
    def __init__(self, config: Any, *, name: str, index: int = 0, program: Sequence[str] = (), first_gpu: int = 0) -> None:
        self.name, self.plugin_folder = name, None
        self.num_starts = 0
        self.on_start: Callable[[FakeProcess], None] = lambda process: None  # sets faults of the fake, or raises
        self._folder = Path(config.model.folder)
        self.fake: FakeSGLang | None = None
        self.is_running = False

    async def start(self) -> str:
        self.num_starts += 1
        self.fake = FakeSGLang(self._folder)
        self.fake.on_death = self.kill
        self.is_running = True
        self.on_start(self)
        return await self.fake.http.listen()

    def kill(self) -> None:
        self.is_running = False
        if self.fake is not None:
            self.fake.http.die()

    def dies_in(self, call: str, when: Callable[[Any], bool]) -> None:
        """Of the fake started now: it is gone when `call` comes, before it is obeyed, if `when(body)`."""
        fake = self.fake
        assert fake is not None, "started before"
        obey = getattr(fake, f"_on_{call}")

        async def call_or_die(query: dict[str, str], body: dict[str, Any]) -> Any:
            if when(body):
                raise fake.die("killed")
            return await obey(query, body)

        setattr(fake, f"_on_{call}", call_or_die)

    async def epitaph(self) -> str:
        return "ended with signal 9; its log says why"

    async def outlives_its_error(self) -> bool:
        return self.is_running

    async def stop(self) -> None:
        self.is_running = False
        if self.fake is not None:
            await self.fake.close()
            self.fake = None
