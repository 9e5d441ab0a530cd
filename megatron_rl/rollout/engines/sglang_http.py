"""HTTP calls to one SGLang server; every failure becomes an EngineError that names the server and the call.

A server that cannot be reached, breaks the connection or says nothing for `silence_s` raises EngineGoneError: what was
asked may be asked again elsewhere. A server that answers with a refusal raises EngineError with its words. What the calls
mean: `sglang.py`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from megatron_rl.errors import EngineError, EngineGoneError

_DETAIL = 500  # characters of a server's own words that an error quotes


class SGLangClient:
    """Calls to `url`, from one event loop; `post_blocking` from any thread."""

    def __init__(self, url: str, *, name: str, silence_s: float) -> None:
        """silence_s: longest wait for an answer, or for the next piece of one [s]."""
        self.url, self.name, self.silence_s = url.rstrip("/"), name, silence_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(base_url=self.url, timeout=silence_s, limits=limits, trust_env=False)
        self._blocking = httpx.Client(base_url=self.url, timeout=silence_s, trust_env=False)

    async def get(self, path: str, timeout_s: float | None = None) -> Any:
        return await self._call("GET", path, None, timeout_s)

    async def post(self, path: str, body: Any, timeout_s: float | None = None) -> Any:
        return await self._call("POST", path, body, timeout_s)

    def post_blocking(self, path: str, body: Any) -> Any:
        try:
            return self._answer(path, self._blocking.post(path, json=body))
        except httpx.TransportError as e:
            raise self._gone(path, e) from e

    async def stream(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The server-sent events of one POST, until its `[DONE]`."""
        self._check_open(path)
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    self._answer(path, response)
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield json.loads(line[6:])
        except httpx.TransportError as e:
            raise self._gone(path, e) from e
        raise EngineGoneError(f"engine {self.name} at {self.url}: ended its answer to {path} before its [DONE]; see its log")

    async def close(self) -> None:
        await self._client.aclose()
        self._blocking.close()

    async def _call(self, method: str, path: str, body: Any, timeout_s: float | None) -> Any:
        self._check_open(path)
        try:
            response = await self._client.request(method, path, json=body, timeout=timeout_s or self.silence_s)
        except httpx.TransportError as e:
            raise self._gone(path, e) from e
        return self._answer(path, response)

    def _answer(self, path: str, response: httpx.Response) -> Any:
        """Its JSON, or None where it is plain text."""
        try:
            content = response.json()
        except ValueError:
            content = None
        refused = isinstance(content, dict) and content.get("success") is False
        if response.is_error or refused:
            words = content.get("message") or content.get("error") or content if isinstance(content, dict) else response.text
            raise EngineError(
                f"engine {self.name} at {self.url}: refused {path} (HTTP {response.status_code}): {str(words)[:_DETAIL]}"
            )
        return content

    def _check_open(self, path: str) -> None:
        if self._client.is_closed:
            raise EngineGoneError(f"engine {self.name} at {self.url}: closed before {path}")

    def _gone(self, path: str, error: httpx.TransportError) -> EngineGoneError:
        if isinstance(error, httpx.TimeoutException):
            return EngineGoneError(
                f"engine {self.name} at {self.url}: no answer to {path} for {self.silence_s:g} s (rollout.request_timeout_s); "
                "see its log, or raise the setting"
            )
        return EngineGoneError(
            f"engine {self.name} at {self.url}: the connection for {path} failed ({type(error).__name__}: {error}); "
            "see its log, and whether it still runs"
        )
