"""One request at an SGLang server: what is asked, alone or with others, and how its events become chunks.

Token ids and log-probs are read from `meta_info.output_token_logprobs`, counted by `completion_tokens`; `output_ids` only
confirms them. The reason: an event may hold all tokens so far or only the new ones (a server setting), several events may
be merged into one, and a request aborted in the queue repeats its last token. Who sends it: `sglang_posts.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rl.errors import EngineError
from megatron_rl.rollout.engines.base import Chunk, Request
from megatron_rl.rollout.engines.sglang_compat import CONTEXT_MARGIN, PROMPT_MARGIN, weight_version_of
from megatron_rl.rollout.engines.sglang_kv import Origin, fresh
from megatron_rl.types import Ending

_ENDINGS = {"stop": Ending.STOP, "length": Ending.LENGTH, "abort": Ending.ABORT}


class Call:
    """State of one request. `rid` has a fixed length: a server aborts all requests whose id begins with the one named."""

    def __init__(
        self,
        request: Request,
        client: str,
        number: int,
        context_tokens: int,
        stream_interval: int,
        origin: Origin | None = None,
    ) -> None:
        """client: of fixed length, unlike that of any other who asks this server, whose requests may still run there;
        number: unique among the calls of this client; context_tokens: the server's context [tokens]; origin: of KV that may
        be found, by default that of the request's own weights."""
        self.request, self.origin = request, origin or fresh(request)
        self.rid = f"{request.trajectory_id:012d}-{client}-{number:010d}"
        self.num_received = 0
        self.num_cached: int | None = None  # context tokens that the server found in its cache; None: it has not said so
        self.made: list[np.ndarray] = []  # int32 [tokens] of each chunk
        self.is_aborted = False  # somebody asked for it
        self.is_sent = False
        self.ended = asyncio.Event()
        self._interval = stream_interval
        self.room = min(request.max_new_tokens, context_tokens - CONTEXT_MARGIN - len(request.token_ids))
        if len(request.token_ids) >= context_tokens - PROMPT_MARGIN:
            self.room = 0  # the server would refuse it; there is no room worth a request anyway

    def sampling_params(self) -> dict[str, Any]:
        sampling = self.request.sampling
        return {
            "max_new_tokens": self.room,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop_token_ids": list(sampling.stop_token_ids),
            "sampling_seed": seed_of(sampling.seed, self.request.trajectory_id),
            "stream_interval": self._interval,
        }

    def chunk(self, event: dict[str, Any]) -> Chunk:
        """The new tokens of an event. Raises EngineError for a request given up, a wrong weight version or a broken count."""
        meta = event["meta_info"]
        reason = meta.get("finish_reason")
        ending = _ENDINGS.get(reason["type"]) if reason else None
        if reason and (ending is None or (ending is Ending.ABORT and not self.is_aborted)):
            raise EngineError(f"{self._who}: the server gave it up: {reason.get('message') or reason}; see its log")
        version = weight_version_of(meta)
        if version != str(self.request.weight_version):
            raise EngineError(f"{self._who}: answered under weight version {version}, asked was {self.request.weight_version}")
        if self.num_cached is None and meta.get("cached_tokens") is not None:
            self.num_cached = int(meta["cached_tokens"])
        ids, log_probs = self._new_tokens(event, meta)
        tokens = np.array(ids, np.int32)
        self.made.append(tokens)
        return self._chunk(tokens, np.array(log_probs, np.float32), ending)

    def empty(self, ending: Ending) -> Chunk:
        """The last chunk of a request that needs no server."""
        return self._chunk(np.zeros(0, np.int32), np.zeros(0, np.float32), ending)

    @property
    def _who(self) -> str:
        return f"trajectory {self.request.trajectory_id} (request {self.rid})"

    def _new_tokens(self, event: dict[str, Any], meta: dict[str, Any]) -> tuple[list[int], list[float]]:
        total, known = int(meta["completion_tokens"]), self.num_received
        entries = meta.get("output_token_logprobs") or []
        entries = entries[known:total] if len(entries) >= total else entries[len(entries) - (total - known) :]
        ids, named = [entry[1] for entry in entries], event.get("output_ids") or []
        if len(ids) != total - known or (len(named) == len(ids) and named != ids):
            raise EngineError(
                f"{self._who}: {known} tokens received, {total} said to be made, {len(ids)} new ones sent with their "
                "log-probs, or not the ones named; this version of the server streams in another way"
            )
        self.num_received = total
        return ids, [entry[0] for entry in entries]

    def _chunk(self, tokens: np.ndarray, log_probs: np.ndarray, ending: Ending | None) -> Chunk:
        version, cached = self.request.weight_version, self.num_cached or 0
        inherited = self.origin.versions[:cached]  # `extra_key` keeps pages of other versions away
        oldest = int(inherited.min(initial=version)) if len(inherited) else version
        kv_versions = np.full(len(tokens), oldest, np.int32)
        return Chunk(self.request.trajectory_id, tokens, log_probs, version, kv_versions, cached, ending)


def body(calls: Sequence[Call]) -> dict[str, Any]:
    """One POST /generate for all of them. Their events carry `meta_info.id`."""
    return {
        "rid": [call.rid for call in calls],
        "input_ids": [call.request.token_ids.tolist() for call in calls],
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,  # a value of 0 or more would keep the prompt from being found in the cache
        "extra_key": [call.origin.cache_key for call in calls],
        "sampling_params": [call.sampling_params() for call in calls],
    }


def seed_of(seed: int, trajectory_id: int) -> int:
    """One seed per trajectory, 31 bits. The server adds the position, so that a resumed trajectory goes on as it would have;
    it does so only if started with `enable_deterministic_inference`."""
    digest = hashlib.blake2b(f"{seed}/{trajectory_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
