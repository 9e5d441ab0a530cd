"""The requests of a `generate` call on their way to an SGLang server: few streamed POSTs, each of as many as it may hold.

    calls -> slots (`max_concurrent` at the server, whoever asks) -> POST /generate of up to 256 -> one stream of all their events

Requests sent together are scheduled together: the server's first batches are full, where single POSTs arrive one by one. What the
server refuses of one it refuses of all in its POST, and a broken stream is the end of all in it; an abort is of one alone. Each
request has its own deadline, though their events share a stream. What is asked, and what an event says: `sglang_call.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.base import Chunk
from megatron_rl.rollout.engines.sglang_call import Call, body
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.types import Ending

_MAX_REQUESTS = 256  # in a POST: whenever events are ready, the server looks at all of its requests
_MAX_TOKENS = 1 << 17  # of their contexts: while the server reads about 1 MB of JSON, it does nothing else

Heard = Callable[[Call, Chunk], None]


class Posts:
    """Of one engine, from one event loop."""

    def __init__(self, client: SGLangClient, max_concurrent: int) -> None:
        self._client = client
        self._slots = asyncio.Semaphore(max_concurrent)

    async def run(self, calls: Sequence[Call], heard: Heard) -> None:
        """All of `calls` to their last chunks; `heard` is told each chunk as it comes.

        Raises EngineError for the first thing that goes wrong; whoever has not ended then has no more chunks."""
        left: deque[Call] = deque()
        for call in calls:
            heard(call, call.empty(Ending.LENGTH)) if call.room <= 0 else left.append(call)
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as posts:
                while left:
                    if together := await self._admitted(left, heard):
                        posts.create_task(self._post(together, heard))
        except* EngineError as group:
            error = group.exceptions[0]
        if error is not None:
            raise error

    async def _admitted(self, left: deque[Call], heard: Heard) -> list[Call]:
        """Off the front of `left`: as many as have slots now, and fit one POST. Waits for the first slot only."""
        taken: list[Call] = []
        num_tokens = 0
        while left:
            num_tokens += len(left[0].request.token_ids)
            if taken and (self._slots.locked() or num_tokens > _MAX_TOKENS or len(taken) == _MAX_REQUESTS):
                break
            await self._slots.acquire()
            call = left.popleft()
            if call.is_aborted:
                self._slots.release()
                heard(call, call.empty(Ending.ABORT))
            else:
                taken.append(call)
        return taken

    async def _post(self, calls: Sequence[Call], heard: Heard) -> None:
        """A slot is held by each of `calls`, until it ends."""
        clock = asyncio.get_running_loop()
        open_calls = {call.rid: call for call in calls}  # the longest silent first
        last_heard = dict.fromkeys(open_calls, clock.time())
        for call in calls:
            call.is_sent = True
        try:
            async with aclosing(self._client.stream("/generate", body(calls))) as stream:
                async for events in stream:
                    now = clock.time()
                    for event in events:
                        call = _named(event, open_calls)
                        chunk = call.chunk(event)
                        del open_calls[call.rid]
                        if chunk.ending is None:
                            open_calls[call.rid], last_heard[call.rid] = call, now
                        else:
                            self._slots.release()
                        if chunk.ending is not None or len(chunk.token_ids):
                            heard(call, chunk)
                    if open_calls and now - last_heard[next(iter(open_calls))] > self._client.silence_s:
                        raise self._client.silent("/generate")
        finally:
            for _ in open_calls:
                self._slots.release()
        if open_calls:
            where = f"engine {self._client.name}: ended its answer for request {next(iter(open_calls))}"
            raise EngineError(f"{where} without an ending; see its log")


def _named(event: dict[str, Any], open_calls: Mapping[str, Call]) -> Call:
    """Whose event it is. Raises EngineError for a refusal, which is of all, or an event of nobody."""
    if "error" in event:
        ids = [call.request.trajectory_id for call in open_calls.values()]
        named = f"trajectories {', '.join(map(str, ids[:8]))}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
        raise EngineError(f"{named} (request {next(iter(open_calls))}): refused: {event['error'].get('message', event['error'])}")
    rid = event["meta_info"]["id"]
    if rid not in open_calls:
        raise EngineError(f"request {rid}: an answer to what was not asked, or has ended; this server streams in another way")
    return open_calls[rid]
