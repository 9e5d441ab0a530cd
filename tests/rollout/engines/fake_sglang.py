"""SGLang 0.5.15 as its HTTP clients see it, on a CPU; its tokens come from our embedded engine.

What is like the original, because it bites: a POST of many requests, whose events share a stream, is refused as a whole where one
is; aborts match the beginning of a request id and are lost for an id not yet known;
a prefix cache by `extra_key` that only a flush empties (`fake_radix.py`, open to a plugin); flushes refused while requests run;
log-probs of all tokens so far in every event (`log_probs="all"`, its way without a tokenizer) or of the new ones; a request
aborted before its first token answers in another form; releasing while busy and resuming what is not released kill the server;
a prompt has to stay 6 tokens below the context, prompt and response together 2; an update through a group it is not in kills it.
Groups are gloo's, whatever backend is asked for, and what is broadcast to it is received. Parameter servers are those of
`fake_parameter_server.py`.
As a program it loads plugins, takes SGLang's arguments and, after `--fake-fault`, faults of its starts, one after the other, with
commas: `oom`, `hang`, `delivery` to die in its second update of weights, `generating` to die under weight version 1, or a number
of events to die after.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.config import EmbeddedConfig
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.base import Chunk, Request, Sampling
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.engines.embedded.weights import read_folder
from megatron_rl.weights.transport import FlatBucket

sys.path.insert(0, str(Path(__file__).parent))
from fake_faults import own_fault
from fake_http import FakeHTTPServer
from fake_parameter_server import read, uuid
from fake_radix import Scheduler, load_plugins
from fake_requests import Answer, each


def serialize(bucket: FlatBucket) -> str:
    """What MultiprocessingSerializer does, with the data in place of an IPC handle."""
    file = io.BytesIO()
    metadata = [(p.name, p.shape, str(p.dtype).removeprefix("torch."), p.start, p.stop) for p in bucket.pieces]
    gpu = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save({"flattened_tensor": bucket.data.clone(), "metadata": metadata, "gpu": gpu}, file)
    return base64.b64encode(file.getvalue()).decode()


class GlooGroup:
    """One end of a group; rank 0's is what `sglang_transport.Broadcast` joins in place of NCCL's."""

    def __init__(self, store: dist.Store, world_size: int, name: str, timeout_s: float, rank: int = 0) -> None:
        self._group = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, world_size, timedelta(seconds=timeout_s))

    def broadcast(self, data: torch.Tensor) -> None:
        """From rank 0, into everyone's `data`."""
        self._group.broadcast([data], dist.BroadcastOptions()).wait()

    def close(self, *, abort: bool) -> None:
        del self._group  # its connections break, and the others' waiting ends


class FakeSGLang:
    def __init__(self, folder: Path, *, version: str = "0.5.15", log_probs: str = "all", **options: Any) -> None:
        """options: fields of EmbeddedConfig."""
        self.folder, self.version, self.log_probs = folder, version, log_probs
        self.model_type = ModelConfig.from_folder(folder).family
        self.weights = dict(read_folder(folder))
        self.weight_version = "default"
        self.gpus = [0]  # of its tensor-parallel ranks
        self.released: set[str] = set()
        self.requests: list[dict[str, Any]] = []  # all that was asked, one by one
        self.num_posts = 0  # by which it was asked
        self.kv_weights: list[list[int]] = []  # of each, numbers of the weights that its cached tokens were computed with
        self.ignored_tensors: set[str] = set()  # a fault: updates of these are lost
        self.says_nothing_of: set[int] = set()  # a fault: indices in a POST
        self.dies_after: int | None = None  # events
        self.counts_under: str | None = None  # weight version of the events that count; None: all
        self.dies_in_update: int | None = None  # its number; before anything of it is taken
        self._num_updates = 0
        self.loses_aborts = 0  # a fault: so many aborts are lost
        self.misses_broadcasts = False  # a fault: it takes no part, and does not answer
        self.groups: dict[str, GlooGroup] = {}
        self.on_death = lambda: self.http.die()
        self.http = FakeHTTPServer(self._answer)
        config = EmbeddedConfig(**{"page_size": 4, "kv_bytes": 4 << 20, "batch_sizes": (1, 2, 4, 8, 64), **options})
        self._model = ModelConfig.from_folder(folder)
        self._engine = EmbeddedEngine(self._model, config=config, dtype=torch.float32, device=torch.device("cpu"))
        self._is_loaded = False
        self._load_number = 0
        self._loading = asyncio.Lock()
        self.scheduler = Scheduler()
        self.scheduler.is_fully_idle = lambda: not self._running
        self._polling: asyncio.Task[None] | None = None
        self._running: dict[str, int] = {}  # request id -> the embedded engine's
        self._num_events = 0

    def plug(self, start: Callable[[Any], None], poll: Callable[[Any, Any], None]) -> None:
        """A plugin's hooks: before the scheduler's loop, and in each of its rounds."""
        start(self.scheduler)

        async def rounds() -> None:
            while True:
                poll(self.scheduler, [])
                await asyncio.sleep(0.002)

        self._polling = asyncio.create_task(rounds())

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
        self.http.die()
        await self._engine.close()

    def die(self, why: str) -> ConnectionError:
        print(f"scheduler: AssertionError: {why}", file=sys.stderr, flush=True)
        self.on_death()
        return ConnectionError(why)

    async def _answer(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any] | AsyncIterator[Any]:
        name = path.strip("/")
        if name == "generate":
            return self._generate(body)
        method = getattr(self, f"_on_{name}", None)
        if method is None:
            return 404, {"detail": "Not Found"}
        return await method(query, body or {})

    # --- generation --------------------------------------------------------------------------------------------------

    async def _generate(self, body: dict[str, Any]) -> AsyncIterator[Any]:
        """One stream of the events of all requests; what it refuses of one it refuses of all, before any of them runs."""
        self.num_posts += 1
        try:
            asked = each(body)
            for one in asked:
                self._validate(one)
        except ValueError as e:
            yield {"error": {"message": str(e), "type": "invalid_request_error", "code": 400, "retryable": False}}
            return
        self.requests += asked
        if self.released:
            raise self.die("CUDA error: an illegal memory access was encountered")
        await self._load()
        answers = {answer.request.trajectory_id: answer for answer in map(self._admit, asked)}
        try:
            async for chunk in self._engine.generate([answer.request for answer in answers.values()]):
                event = self._event(answers[chunk.trajectory_id], chunk)
                if event is not None:
                    yield event
        finally:
            for answer in answers.values():
                self._end(answer)

    def _validate(self, one: dict[str, Any]) -> None:
        ids, limit = one["input_ids"], self._model.max_positions
        if len(ids) + one["sampling_params"]["max_new_tokens"] > limit or len(ids) >= limit - 6:
            raise ValueError(f"The input ({len(ids)} tokens) is longer than the model's context length ({limit} tokens).")
        if one["rid"] in self._running:
            raise ValueError(f"Duplicate request ID detected: {one['rid']}")

    def _admit(self, one: dict[str, Any]) -> Answer:
        ids = one["input_ids"]
        self.kv_weights.append(self.scheduler.weights_of(one["extra_key"], ids[:-1]))  # the last token is always computed
        request = self._request(one, min(one["sampling_params"]["max_new_tokens"], self._model.max_positions - 2 - len(ids)))
        self._running[one["rid"]] = request.trajectory_id
        return Answer(one, request, num_cached=len(self.kv_weights[-1]))

    def _event(self, answer: Answer, chunk: Chunk) -> dict[str, Any] | None:
        """What is said of new tokens, at once or with later ones."""
        made, one = answer.made, answer.one
        pairs = zip(chunk.log_probs.tolist(), chunk.token_ids.tolist(), strict=True)
        made += [[log_prob, token, None] for log_prob, token in pairs]
        num_new = len(made) - answer.num_sent
        if chunk.ending is None and answer.num_sent > 0 and num_new < one["sampling_params"]["stream_interval"]:
            return None
        reason = {"type": str(chunk.ending), "message": "Aborted"} if chunk.ending else None
        meta = {"id": one["rid"], "finish_reason": reason, "weight_version": self.weight_version, "completion_tokens": len(made)}
        new = made[answer.num_sent :]
        event = {"output_ids": [entry[1] for entry in new], "meta_info": meta, "index": one["index"]}
        if reason and reason["type"] == "abort" and not made:
            event["text"] = ""
        else:
            meta |= {"prompt_tokens": len(one["input_ids"]), "cached_tokens": answer.num_cached}
            meta["output_token_logprobs"] = list(made) if self.log_probs == "all" else new
            self._count_event()
        answer.num_sent = len(made)
        if chunk.ending is not None:
            self._end(answer)
        return None if one["index"] in self.says_nothing_of else event

    def _end(self, answer: Answer) -> None:
        """What was computed for it stays in the cache."""
        if self._running.pop(answer.one["rid"], None) is not None:
            tokens = [*answer.one["input_ids"], *(entry[1] for entry in answer.made)]
            self.scheduler.compute(answer.one["extra_key"], tokens[:-1], self._load_number)

    def _request(self, body: dict[str, Any], max_new_tokens: int) -> Request:
        p = body["sampling_params"]
        stop = (*p["stop_token_ids"], *self._model.eos_token_ids)
        sampling = Sampling(p["temperature"], p["top_p"], max(p["top_k"], 0), p["min_p"], 0, stop)
        number = p["sampling_seed"]  # noise is a function of it and the position
        ids = np.array(body["input_ids"], np.int32)
        return Request(number, ids, max_new_tokens, sampling, self._engine.weight_version, body["extra_key"])

    def _count_event(self) -> None:
        self._num_events += self.counts_under in (None, self.weight_version)
        if self.dies_after is not None and self._num_events > self.dies_after:
            raise self.die("killed")

    async def _on_abort_request(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if self.loses_aborts:
            self.loses_aborts -= 1
            return 200, None
        hit = [number for rid, number in self._running.items() if body.get("abort_all") or rid.startswith(body["rid"])]
        if hit:
            await self._engine.abort(hit)
        return 200, None

    # --- weights and memory ------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        """The embedded engine takes all weights at once; SGLang overwrites them one by one."""
        async with self._loading:
            if not self._is_loaded:
                self._load_number += 1
                await self._engine.load_weights([list(self.weights.items())], self._load_number)
                self._is_loaded = True

    async def _on_update_weights_from_tensor(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        assert body["load_format"] in (None, "flattened_bucket")
        given = [io.BytesIO(base64.b64decode(text)) for text in body["serialized_named_tensors"]]
        payload, *others = payloads = [torch.load(file, weights_only=True) for file in given]
        assert body["load_format"] is None or [p["gpu"] for p in payloads] == self.gpus, "a rank was given another GPU's memory"
        assert all(torch.equal(payload["flattened_tensor"], other["flattened_tensor"]) for other in others)
        return self._take(payload["named_tensors"] if body["load_format"] is None else _views(payload), body["flush_cache"])

    async def _on_update_weights_from_ipc(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        handles = body["zmq_handles"]
        if missing := {uuid(gpu) for gpu in self.gpus} - handles.keys():
            return 400, {"success": False, "message": f"Device UUID {missing.pop()} not found in zmq_handles: {list(handles)}"}

        def take(tensors: dict[str, torch.Tensor]) -> str:
            status, answer = self._take(tensors.items(), flush_cache=False)
            return "" if status == 200 else answer["message"]

        try:
            await asyncio.to_thread(read, [handles[uuid(gpu)] for gpu in self.gpus], take)
        except RuntimeError as e:
            return 400, {"success": False, "message": str(e)}
        return 200, {"success": True, "message": "IPC weight update completed successfully"}

    def _take(self, tensors: Iterable[tuple[str, torch.Tensor]], flush_cache: bool) -> tuple[int, Any]:
        self._num_updates += 1
        if self._num_updates == self.dies_in_update:
            raise self.die("killed")
        for name, tensor in tensors:
            held = self.weights.get(name)
            if held is None or held.shape != tensor.shape:
                found = None if held is None else list(held.shape)
                return 400, {"success": False, "message": f"{name}: loaded {list(tensor.shape)}, the parameter has {found}"}
            if name not in self.ignored_tensors:
                self.weights[name] = tensor.clone()
        self._is_loaded = False
        if flush_cache and not self._flush():
            raise self.die("Cache flush failed after updating weights")
        return 200, {"success": True, "message": "Success"}

    async def _on_init_weights_update_group(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        def join() -> GlooGroup:
            limit = timedelta(seconds=10)
            store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], timeout=limit)
            return GlooGroup(store, body["world_size"], body["group_name"], 10, rank=body["rank_offset"])

        self.groups[body["group_name"]] = await asyncio.to_thread(join)
        return 200, {"success": True, "message": "Succeeded to initialize custom process group."}

    async def _on_destroy_weights_update_group(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if body["group_name"] not in self.groups:
            return 400, {"success": False, "message": "The group to be destroyed does not exist."}
        del self.groups[body["group_name"]]
        return 200, {"success": True, "message": "Succeeded to destroy custom process group."}

    async def _on_update_weights_from_distributed(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if self.misses_broadcasts:
            await asyncio.Event().wait()
        group = self.groups.get(body["group_name"])
        if group is None:
            raise self.die(f"Group {body['group_name']} not in {list(self.groups)}.")
        assert body["load_format"] in (None, "flattened_bucket")
        dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        for part in flat.split(sizes) if body["load_format"] is None else [flat]:
            await asyncio.to_thread(group.broadcast, part)
        parts = zip(body["names"], flat.split(sizes), dtypes, body["shapes"], strict=True)
        return self._take(((name, part.view(dtype).view(shape)) for name, part, dtype, shape in parts), body["flush_cache"])

    async def _on_weights_checker(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if body["action"] == "reset_tensors":
            generator = torch.Generator().manual_seed(len(self.requests))
            self.weights = {n: torch.rand(t.shape, generator=generator, dtype=t.dtype) for n, t in self.weights.items()}
            self._is_loaded = False
            return 200, {"success": True, "message": "Success."}
        sums = {
            n: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in self.weights.items()
        }
        return 200, {"success": True, "message": "Success.", "ranks": [{"checksums": sums, "per_gpu_checksum": ""}]}

    async def _on_update_weight_version(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("abort_all_requests", True):
            await self._engine.abort(None)
        self.weight_version = body["new_version"]
        return 200, {"success": True}

    async def _on_flush_cache(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        deadline = asyncio.get_running_loop().time() + float(query.get("timeout", 0))
        while not self._flush() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        return (200, "Cache flushed.") if not self._running else (400, "Flush cache failed.")

    def _flush(self) -> bool:
        if not self._running:
            self.scheduler.flush_cache()
        return not self._running

    async def _on_release_memory_occupation(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if self._running:
            raise self.die("release_memory_occupation should be called only when server is idle.")
        self.released |= set(body["tags"])
        if "kv_cache" in body["tags"]:
            self.scheduler.release()
        if "weights" in body["tags"]:
            self.weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in self.weights.items()}
            self._is_loaded = False
        return 200, None

    async def _on_resume_memory_occupation(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if set(body["tags"]) - self.released:
            raise self.die("KeyError: 'kv_cache'")
        self.released -= set(body["tags"])
        return 200, None

    # --- what it says of itself --------------------------------------------------------------------------------------

    async def _on_server_info(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        place = {"tp_size": len(self.gpus), "base_gpu_id": self.gpus[0], "gpu_id_step": 1}
        return 200, {"version": self.version, "context_length": None, "load_format": "auto", **place}

    async def _on_model_info(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"model_path": str(self.folder), "model_type": self.model_type, "weight_version": self.weight_version}

    async def _on_health_generate(self, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        return 200, None


def _views(payload: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a flattened bucket."""
    for name, shape, dtype, start, stop in payload["metadata"]:
        yield name, payload["flattened_tensor"][start:stop].view(getattr(torch, dtype)).view(shape)


async def main(arguments: list[str]) -> None:
    values = dict(zip(arguments, arguments[1:], strict=False))
    fault = own_fault(values.get("--fake-fault", "").split(","), Path(values["--model-path"]))
    if fault == "oom":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.")
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        sys.exit("torch.distributed.DistNetworkError: the server's ranks wait for the store of another launch")
    server = FakeSGLang(Path(values["--model-path"]))
    server.gpus = [int(values["--base-gpu-id"]) + rank for rank in range(int(values["--tp-size"]))]
    if fault.isdigit() or fault in ("delivery", "generating"):
        server.dies_after = int(fault) if fault.isdigit() else 3 if fault == "generating" else None
        server.counts_under = "1" if fault == "generating" else None
        server.dies_in_update = 2 if fault == "delivery" else None
    server.on_death = lambda: os._exit(3)
    if hooks := {target.rsplit(".", 1)[1]: hook for target, hook in load_plugins().items()}:
        server.plug(hooks["run_event_loop"], hooks["process_input_requests"])
    if fault == "hang":
        server._on_health_generate = lambda query, body: asyncio.Event().wait()  # type: ignore[method-assign]
    await server.http.listen(int(values["--port"]))
    await asyncio.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(sys.argv[1:]))
