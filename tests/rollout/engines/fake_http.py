"""A small HTTP/1.1 server on asyncio streams for fakes: JSON in, JSON or server-sent events out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

Handler = Callable[[str, dict[str, str], Any], Awaitable[tuple[int, Any] | AsyncIterator[Any]]]


class FakeHTTPServer:
    """`handler(path, query, body)` gives (status, JSON content) or an iterator of events; a client that leaves closes it."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def listen(self, port: int = 0) -> str:
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", port)
        return f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def die(self) -> None:
        """As a killed process: nobody listens, every connection breaks."""
        if self._listener is not None:
            self._listener.close()
        for writer in list(self._connections):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                _, target, _ = head[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                path, _, text = target.partition("?")
                query = dict(pair.split("=") for pair in text.split("&") if pair)
                answer = await self._handler(path, query, json.loads(content) if content and content != b"null" else None)
                if isinstance(answer, tuple):
                    await self._send_json(writer, *answer)
                else:
                    await self._send_events(reader, writer, answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _send_json(self, writer: asyncio.StreamWriter, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    async def _send_events(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, events: AsyncIterator[Any]) -> None:
        writer.write(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n")
        sending = asyncio.ensure_future(self._pump(writer, events))
        leaving = asyncio.ensure_future(reader.read(1))  # answers only when the client leaves
        await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, leaving):
            if not task.done():
                task.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
        with suppress(asyncio.CancelledError):
            await sending
            return
        raise ConnectionError("left in the middle of an answer")

    async def _pump(self, writer: asyncio.StreamWriter, events: AsyncIterator[Any]) -> None:
        try:
            async for event in events:
                await self._send_event(writer, json.dumps(event))
            await self._send_event(writer, "[DONE]")
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _send_event(self, writer: asyncio.StreamWriter, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()
