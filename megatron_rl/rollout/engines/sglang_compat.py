"""What differs between SGLang versions, and the one place that imports SGLang itself.

Tried: 0.5.15. Known of 0.5.23 and handled here: `meta_info.weight_versions` beside `weight_version` (`weight_version_of`).
SGLang is imported only by `cuda_ipc_serializer` and `NCCLGroup`, when weights are first published to a server, on the same GPU or
another, and inside the server's own processes (`radix_types`, `sglang_plugin/`); the engine itself speaks HTTP (`sglang.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.version import InvalidVersion, Version

from megatron_rl.errors import EngineError
from megatron_rl.weights.transport import FlatBucket

SUPPORTED = (Version("0.5.15"), Version("0.5.24"))  # from the first on, below the second
TRIED = Version("0.5.15")

# Fewer than context_length - 6 prompt tokens are taken, and prompt and response together stop at context_length - 2.
PROMPT_MARGIN = 6
CONTEXT_MARGIN = 2


def check_version(found: str, where: str) -> None:
    """Raises EngineError for a version whose behaviour was never looked at."""
    try:
        version = Version(found)
    except InvalidVersion:
        version = Version("0")
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise EngineError(
            f"{where}: runs SGLang {found}; supported are {SUPPORTED[0]} up to, not including, {SUPPORTED[1]}; "
            f"install sglang=={TRIED} there"
        )


def weight_version_of(meta: dict[str, Any]) -> str:
    """The version of the newest token of an answer. From 0.5.23 on there are spans beside the one string."""
    spans = meta.get("weight_versions")
    return str(spans[-1]["version"] if spans else meta["weight_version"])


class RadixTypes(NamedTuple):
    """What the methods of SGLang's prefix cache take."""

    RadixKey: Any
    MatchPrefixParams: Any
    InsertParams: Any


def radix_types() -> RadixTypes:
    """Inside a process of the server."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixTypes(RadixKey, MatchPrefixParams, InsertParams)


def cuda_ipc_serializer() -> Callable[[FlatBucket], str]:
    """Serializes a bucket on a GPU as SGLang's `flattened_bucket`: an IPC handle and a table, no tensor data.

    Raises EngineError where SGLang is not installed beside the trainer."""
    try:
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata
    except ImportError as e:
        raise _not_importable("serializer carries the weights", e) from e
    monkey_patch_torch_reductions()  # handles name the GPU by its UUID: numbers differ between processes

    def serialize(bucket: FlatBucket) -> str:
        metadata = [
            FlattenedTensorMetadata(
                name=p.name,
                shape=torch.Size(p.shape),
                dtype=p.dtype,
                start_idx=p.start,
                end_idx=p.stop,
                numel=p.stop - p.start,
            )
            for p in bucket.pieces
        ]
        payload = {"flattened_tensor": bucket.data, "metadata": metadata}
        return MultiprocessingSerializer.serialize(payload, output_str=True)

    return serialize


class NCCLGroup:
    """See `sglang_transport.Group`: rank 0's end, formed as SGLang forms the others, whose key in the store has to be the same.

    Raises EngineError where SGLang is not installed beside the trainer."""

    def __init__(self, store: dist.Store, world_size: int, name: str, timeout_s: float) -> None:
        try:
            from sglang.srt.utils import init_custom_process_group
        except ImportError as e:
            raise _not_importable("way of forming a group carries the weights", e) from e
        self._group = init_custom_process_group(
            backend="nccl",
            store=dist.PrefixStore(name, store),
            world_size=world_size,
            rank=0,
            group_name=name,
            timeout=timedelta(seconds=2 * timeout_s),  # NCCL's own watchdog ends the process: whoever waits here comes first
        )
        self._stream: torch.cuda.Stream | None = None

    def broadcast(self, data: torch.Tensor) -> None:
        with torch.cuda.device(data.device):
            self._stream = self._stream or torch.cuda.Stream()  # not behind what gathers the next bucket
            with torch.cuda.stream(self._stream):
                dist.broadcast(data, group=self._group, group_src=0)
            self._stream.synchronize()

    def close(self, *, abort: bool) -> None:
        if abort:
            dist.distributed_c10d._abort_process_group(self._group)
        else:
            dist.destroy_process_group(self._group)


def _not_importable(what: str, error: ImportError) -> EngineError:
    return EngineError(
        f"rollout.engine=sglang: the trainer cannot import SGLang, whose {what} ({error}); "
        f"install sglang=={TRIED} in this environment"
    )
