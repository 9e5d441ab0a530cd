"""What differs between SGLang versions, and the one place that imports SGLang itself.

Tried: 0.5.15. Known of 0.5.23 and handled here: `meta_info.weight_versions` beside `weight_version` (`weight_version_of`).
SGLang is imported only by `cuda_ipc_serializer`, when weights are first published to a server on the same GPU, and inside the
server's own processes (`radix_types`, `sglang_plugin/`); the engine itself speaks HTTP (`sglang.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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
        raise EngineError(
            f"rollout.engine=sglang: the trainer cannot import SGLang, whose serializer carries the weights ({e}); "
            f"install sglang=={TRIED} in this environment"
        ) from e
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
