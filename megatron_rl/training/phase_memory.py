"""The trainer's state off the GPU while engines generate, and back for training (paper 2.6.3).

Three parts: `parameters` and `main_weights` are copied to pinned host memory and back, `gradients` are only freed. What moves
is the storage beneath the tensors: it shrinks to nothing and grows again, so every view of it (DDP's buckets, the distributed
optimizer's shards, gradients inside a flat buffer) stays valid without being known here. A part that is away must not be used.
Adam's moments are thrown away at the end of every iteration (`optimizer.py`) and have no part in this.

    copy stream    | main weights out |      parameters out      |           in
    this thread    offload -----------> deliver weights --------> free       onload

Copies run on their own stream; `begin_copy` starts one before its part may go, so that it costs nothing later. On a CPU the
same bookkeeping moves ordinary memory, which is how it is tested. When which part goes: `serving_sglang.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from megatron_rl.errors import MegatronRLError
from megatron_rl.kernels.snapshot import slab
from megatron_rl.training.model import PolicyModel
from megatron_rl.training.optimizer import PolicyOptimizer

Part = Literal["parameters", "main_weights", "gradients"]
PARTS: tuple[Part, ...] = get_args(Part)
_ALIGNMENT = 512  # bytes; between two storages on the host
_ROOM_S = 5.0  # longest wait for memory: a server of several ranks answers when its first one has let go
_POLL_S = 0.01


class PhaseMemory:
    """Parts of one rank's trainer. Nothing is away at first. Every method returns when memory is what it says."""

    def __init__(self, chunks: Sequence[PolicyModel], optimizer: PolicyOptimizer) -> None:
        self._optimizer = optimizer
        self.device = next(chunks[0].parameters()).device
        known: set[int] = set()
        # A float32 model's parameters are their own main weights: a storage belongs to the first part that names it.
        self._parts: dict[Part, _Storages] = {
            "parameters": _Storages((p for chunk in chunks for p in chunk.parameters()), known, self.device),
            "main_weights": _Storages(optimizer.main_weights, known, self.device),
            "gradients": _Storages(optimizer.gradients, known, self.device, is_kept=False),
        }
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.seconds = {"offload": 0.0, "onload": 0.0}  # spent since `reset_seconds`

    def num_bytes(self, part: Part) -> int:
        return self._parts[part].num_bytes

    def is_away(self, part: Part) -> bool:
        return self._parts[part].is_away

    def reset_seconds(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def begin_copy(self, part: Part) -> None:
        """Start copying a part that stays usable, for reading only, until `offload`."""
        if not self._parts[part].is_away:
            with self._copies():
                self._parts[part].copy_out()

    def offload(self, *parts: Part, changed: bool = True) -> None:
        """Free the parts' memory for others on the GPU. changed False: they are what they were at the last `onload`."""
        start = time.perf_counter()
        here = [part for part in parts if not self._parts[part].is_away]
        for part in here:
            if part == "gradients":
                self._optimizer.forget_gradients()
            elif not self._parts[part].is_copied and (changed or not self._parts[part].has_copy):
                self.begin_copy(part)
        self._settle()
        for part in here:
            self._parts[part].free()
        if here and self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.seconds["offload"] += time.perf_counter() - start

    def onload(self, *parts: Part) -> None:
        """Back to the same tensors; gradients with any content. Raises MegatronRLError where the GPU has no room."""
        start = time.perf_counter()
        away = [part for part in parts if self._parts[part].is_away]
        for part in away:
            self._allocate(part, until=start + _ROOM_S)
        with self._copies():
            for part in away:
                self._parts[part].copy_in()
        self._settle()
        self.seconds["onload"] += time.perf_counter() - start

    def _allocate(self, part: Part, until: float) -> None:
        while True:
            try:
                return self._parts[part].allocate()
            except RuntimeError as e:  # of torch's allocators, whichever the device
                self._parts[part].free()
                if time.perf_counter() > until:
                    raise self._no_room(part) from e
            time.sleep(_POLL_S)

    def memory(self) -> dict[str, int]:
        """Bytes: `free` on the whole GPU, `allocated` by this process's tensors. Empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {"free": torch.cuda.mem_get_info(self.device)[0], "allocated": torch.cuda.memory_allocated(self.device)}

    def _copies(self) -> AbstractContextManager[object]:
        """Copies go to their own stream, behind what the current one has been given."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _settle(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self.device).synchronize()
            self._stream.synchronize()

    def _no_room(self, part: Part) -> MegatronRLError:
        free = self.memory().get("free", 0)
        return MegatronRLError(
            f"training: no room for the trainer's {part} ({self.num_bytes(part):,} bytes; {free:,} are free on the GPU) beside "
            "the engine; lower rollout.sglang.mem_fraction, or share the model among more ranks"
        )


class _Storages:
    """The distinct storages of some tensors, and one slab on the host that holds them all."""

    def __init__(self, tensors: Iterable[torch.Tensor], known: set[int], device: torch.device, *, is_kept: bool = True) -> None:
        """known: storages that other parts have; ours are added."""
        self._bytes: list[torch.Tensor] = []  # uint8, each a whole storage
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage.nbytes():
                known.add(storage._cdata)
                self._bytes.append(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))
        self._sizes = [each.numel() for each in self._bytes]
        self.num_bytes = sum(self._sizes)
        self._device, self._is_kept = device, is_kept
        self._host: list[torch.Tensor] = []
        self.is_away = False
        self.is_copied = False  # since they are here

    @property
    def has_copy(self) -> bool:
        """Of what they were when they last went away."""
        return bool(self._host)

    def copy_out(self) -> None:
        if not self._host and self._bytes:
            self._host = self._allocate_host()
        for source, target in zip(self._bytes, self._host, strict=True):
            target.copy_(source, non_blocking=True)
        self.is_copied = True

    def copy_in(self) -> None:
        if self._is_kept:
            for source, target in zip(self._host, self._bytes, strict=True):
                target.copy_(source, non_blocking=True)

    def free(self) -> None:
        for each in self._bytes:
            if self._device.type == "cuda" or each.untyped_storage().resizable():  # on a CPU numpy may look at it too
                each.untyped_storage().resize_(0)
        self.is_away = True

    def allocate(self) -> None:
        for each, size in zip(self._bytes, self._sizes, strict=True):
            each.untyped_storage().resize_(size)
        self.is_away = self.is_copied = False

    def _allocate_host(self) -> list[torch.Tensor]:
        """uint8, one a storage, pinned for a GPU; kept for good, since pinning takes longer than copying."""
        starts, end = [], 0
        for size in self._sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        whole = slab(1, end, self._device).view(-1)
        return [whole[start : start + size] for start, size in zip(starts, self._sizes, strict=True)]
