"""Answers the engine's commands in one scheduler process, on the scheduler's own thread between two batches.

`start` is called before the scheduler's loop begins, `poll` in each of its rounds. A command that touches KV waits there until
no request runs. Whatever is wrong with this server is kept and told to whoever asks (`wire.PluginState.problem`), so that a
start fails with one error instead of a dead server. Commands: `wire.py`. Who sends them: `sglang_kv.py`.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.errors import EngineError, KernelError, MegatronRLError
from megatron_rl.rollout.engines import wire
from megatron_rl.rollout.engines.sglang_plugin.cache import PrefixCache
from megatron_rl.rollout.engines.sglang_plugin.install import PluginSettings, socket_path
from megatron_rl.rollout.engines.sglang_plugin.store import CachedPages, PageStore

log = logging.getLogger(__name__)

PROTOCOL = 1
_MESSAGE_S = 10.0  # longest time a message takes, in or out
_IDLE_S = 30.0  # longest wait of a command for the server to be idle


class _Command:
    """A connection that brings one message and takes one answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.message: Any = None
        self._data = bytearray()
        self._started = time.monotonic()
        connection.setblocking(False)

    @property
    def age(self) -> float:
        """[s]"""
        return time.monotonic() - self._started

    def read(self) -> None:
        """What has arrived. Raises EOFError or OSError where it ends early or is late, EngineError for other bytes."""
        if self.message is not None:
            return
        try:
            while piece := self.connection.recv(1 << 20):
                self._data += piece
        except BlockingIOError:
            if self.age > _MESSAGE_S:
                raise TimeoutError(f"not whole after {_MESSAGE_S:g} s") from None
            piece = None
        self.message = wire.parse(self._data)
        if self.message is None and piece is not None:
            raise EOFError(f"ended after {len(self._data)} bytes")


class KVPlugin:
    """Of one scheduler process."""

    def __init__(self, settings: PluginSettings) -> None:
        self._settings = settings
        self._problem = ""
        self._place = 0, 1  # rank, ranks of the server's tensor-parallel group
        self._cache: PrefixCache | None = None
        self._store: PageStore | None = None
        self._listener: socket.socket | None = None
        self._command: _Command | None = None  # the one that is read or waits

    def start(self, scheduler: Any) -> None:
        rank, num_ranks = self._place = scheduler.ps.tp_rank, scheduler.ps.tp_size
        try:
            self._cache = PrefixCache(scheduler)
            settings = self._settings
            self._store = PageStore(
                self._cache.pool, host_bytes=settings.host_bytes // num_ranks, compression=settings.compression
            )
        except MegatronRLError as e:
            self._problem = str(e)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(socket_path(Path(self._settings.folder), rank)))
        self._listener.listen()
        self._listener.setblocking(False)
        log.info("keeps KV of unfinished trajectories: %s", self._problem or self._state())

    def poll(self, scheduler: Any, requests: Any) -> None:
        """At most one command a round; never waits for anything."""
        assert self._listener is not None, "started before"
        if self._command is None:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            self._command = _Command(connection)
        command = self._command
        try:
            command.read()
        except (OSError, EOFError, EngineError) as e:
            log.warning("a command that could not be read: %s", e)
            command.connection.close()
            self._command = None
            return
        if command.message is not None and (self._can_act(command.message) or command.age > _IDLE_S):
            self._command = None
            self._reply(command.connection, command.message)

    def _can_act(self, message: Any) -> bool:
        return isinstance(message, wire.AskPlugin) or self._cache is None or self._cache.is_idle

    def _reply(self, connection: socket.socket, message: Any) -> None:
        try:
            answer = self._act(message)
        except MegatronRLError as e:
            log.error("%s failed: %s", type(message).__name__, e)
            answer = wire.Failed(str(e))
        try:
            connection.settimeout(_MESSAGE_S)
            connection.sendall(wire.encode(0, answer))
        except OSError as e:
            log.warning("nobody waits for the answer any more: %s", e)
        finally:
            connection.close()

    def _act(self, message: Any) -> Any:
        if isinstance(message, wire.AskPlugin):
            return self._state()
        if self._cache is None or self._store is None:
            raise EngineError(self._problem)
        if not self._cache.is_idle:
            raise EngineError(f"requests still run after {_IDLE_S:g} s; KV is kept and put back only while none does")
        if isinstance(message, wire.SaveKV):
            return self._save(self._cache, self._store, message)
        if isinstance(message, wire.LoadKV):
            return self._load(self._cache, self._store, message)
        raise EngineError(f"{type(message).__name__} is no command of this plugin; both sides must be of one version")

    def _state(self) -> wire.PluginState:
        where = PROTOCOL, *self._place
        if self._cache is None or self._store is None:
            return wire.PluginState(*where, 0, 0, 0, 0, self._problem)
        store = self._store
        return wire.PluginState(*where, self._cache.page_size, store.num_slots, store.num_slots_used, store.num_kept, "")

    def _save(self, cache: PrefixCache, store: PageStore, message: wire.SaveKV) -> wire.Counts:
        found = [
            CachedPages(c.trajectory_id, c.token_ids, cache.find(c.cache_key, c.token_ids), c.num_stored // cache.page_size)
            for c in message.cached
        ]
        return wire.Counts(*store.save(found, message.keep))

    def _load(self, cache: PrefixCache, store: PageStore, message: wire.LoadKV) -> wire.Counts:
        counts: list[int] = []
        pages: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        for trajectory_id, cache_key in zip(message.trajectory_ids, message.cache_keys, strict=True):
            stored = store.get(trajectory_id)
            new = None if stored is None else cache.place(cache_key, stored.token_ids)
            if stored is None or new is None:
                counts.append(0)
                continue
            counts.append(len(stored.token_ids))
            pages.append(new)
            slots.append(stored.slots[len(stored.slots) - len(new) :])
        try:
            return wire.Counts(counts, store.load(pages, slots))
        except KernelError:
            cache.clear()  # pages stand in the tree without their content
            raise
