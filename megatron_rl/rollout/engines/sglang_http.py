"""HTTP calls to one SGLang server; every failure becomes an EngineError that names the server and the call.

A server that cannot be reached, breaks the connection or says nothing for `silence_s` raises EngineGoneError: what was
asked may be asked again elsewhere. A server that answers with a refusal raises EngineError with its words. What the calls
mean: `sglang.py`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from megatron_rl.errors import EngineError, EngineGoneError

_DETAIL = 500  # characters of a server's own words that an error quotes
_IDLE_S = 2.0  # an idle connection is not used again after this: the server ends its side after 5 s, unasked


class EventReader:
    """Server-sent events out of the pieces in which they come."""

    def __init__(self) -> None:
        self.is_done = False  # all events are there
        self._cut = b""  # a line whose end has not come; that of a dying server never does

    def feed(self, piece: bytes) -> list[Any]:
        *lines, self._cut = (self._cut + piece).split(b"\n")
        found = [line[6:] for line in lines if line.startswith(b"data: ")]
        if found[-1:] == [b"[DONE]"]:
            self.is_done = True
            found.pop()
        return [json.loads(text) for text in found]


class SGLangClient:
    """Calls to `url`, from one event loop; `post_blocking` from any thread."""

    def __init__(self, url: str, *, name: str, silence_s: float) -> None:
        """silence_s: longest wait for an answer, or for the next piece of one [s]."""
        self.url, self.name, self.silence_s = url.rstrip("/"), name, silence_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s),
        )

    async def get(self, path: str, timeout_s: float | None = None) -> Any:
        return await self._call("GET", path, None, timeout_s)

    async def post(self, path: str, body: Any, timeout_s: float | None = None) -> Any:
        return await self._call("POST", path, body, timeout_s)

    def post_blocking(self, path: str, body: Any) -> Any:
        self._check_open(path)
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=self.silence_s)
        try:
            connection.request("POST", parts.path + path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return self._answer(path, response.status, response.read())
        except (OSError, http.client.HTTPException) as e:
            raise self._gone(path, e) from e
        finally:
            connection.close()

    async def stream(self, path: str, body: Any) -> AsyncGenerator[list[Any], None]:
        """The server-sent events of one POST, until its `[DONE]`; together those that came together."""
        self._check_open(path)
        try:
            async with self._session.post(self.url + path, json=body) as response:
                if response.status >= 400:
                    self._answer(path, response.status, await response.read())
                reader = EventReader()
                async for piece in response.content.iter_any():
                    if events := reader.feed(piece):
                        yield events
                    if reader.is_done:
                        return
        except (aiohttp.ClientError, OSError) as e:
            raise self._gone(path, e) from e
        raise EngineGoneError(f"engine {self.name} at {self.url}: ended its answer to {path} before its [DONE]; see its log")

    async def close(self) -> None:
        await self._session.close()

    async def _call(self, method: str, path: str, body: Any, timeout_s: float | None) -> Any:
        self._check_open(path)
        wait_s = timeout_s or self.silence_s
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=wait_s, sock_read=wait_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                return self._answer(path, response.status, await response.read())
        except (aiohttp.ClientError, OSError) as e:
            raise self._gone(path, e) from e

    def _answer(self, path: str, status: int, body: bytes) -> Any:
        """Its JSON, or None where it is plain text."""
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        refused = isinstance(content, dict) and content.get("success") is False
        if status >= 400 or refused:
            words = content if content is not None else body.decode(errors="replace")
            if isinstance(content, dict):
                words = content.get("message") or content.get("error") or content
            raise EngineError(f"engine {self.name} at {self.url}: refused {path} (HTTP {status}): {str(words)[:_DETAIL]}")
        return content

    def _check_open(self, path: str) -> None:
        if self._session.closed:
            raise EngineGoneError(f"engine {self.name} at {self.url}: closed before {path}")

    def silent(self, path: str) -> EngineGoneError:
        """What a missed `silence_s` means."""
        return EngineGoneError(
            f"engine {self.name} at {self.url}: no answer to {path} for {self.silence_s:g} s (rollout.request_timeout_s); "
            "see its log, or raise the setting"
        )

    def _gone(self, path: str, error: Exception) -> EngineGoneError:
        if isinstance(error, TimeoutError):
            return self.silent(path)
        return EngineGoneError(
            f"engine {self.name} at {self.url}: the connection for {path} failed ({type(error).__name__}: {error}); "
            "see its log, and whether it still runs"
        )
