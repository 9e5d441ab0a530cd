"""What makes Megatron-Core 0.16 run without CUDA: `install()`, called before the first model is built.

Inside `megatron.core.*` modules alone the name `torch` becomes a view of torch whose `cuda` is the CPU: streams and
events do nothing, devices are the CPU. The only change outside them is `torch.Tensor.cuda`, which would fail anyway and
becomes the identity. Where CUDA is available nothing is touched.
Covered: dense GPT models with TP, SP, PP, VPP, CP, DP, both optimizers, recomputation, dist_checkpointing of weights.
Not covered: mixture of experts, fp16, inference, optimizer moments in checkpoints. Every patched name is checked, so
that another Megatron-Core fails here with a sentence instead of later with a wrong number. Next: `model.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
MEGATRON_VERSION = "0.16"

# Imported before patching, because a module imported afterwards would see the real torch.
_MODULES = (
    "models.gpt.gpt_model",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "optimizer.distrib_optimizer",
    "distributed",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.fully_parallel",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like", "full_like")
_TYPE_NAMES = {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}


def install() -> None:
    """Idempotent; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    import megatron.core

    assert megatron.core.__version__.startswith(MEGATRON_VERSION), (
        f"training/cpu.py fits megatron-core {MEGATRON_VERSION}, found {megatron.core.__version__}"
    )
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    view = _TorchOnCPU()
    fresh = [m for m in _megatron_modules() if vars(m).get("torch") is torch]
    if not fresh:
        return
    for module in fresh:
        vars(module)["torch"] = view
    _patch_random_states()
    _patch_type_names()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def device() -> torch.device:
    """Where this rank computes: its current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def return_freed_memory() -> None:
    """glibc keeps freed blocks for the thread that had them; between a phase in the engine's thread and one in ours that is
    gigabytes. Elsewhere than on glibc, and for a GPU's memory, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _megatron_modules() -> list[types.ModuleType]:
    return [m for name, m in list(sys.modules.items()) if name.startswith("megatron.core") and m is not None]


class _Event:
    """Also serves as a stream: on a CPU everything already happened in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    wait_stream = wait_event = synchronize = wait

    def record_event(self, *args: Any) -> _Event:
        return self


class _CudaOnCPU(types.ModuleType):
    """Stands for `torch.cuda`; what is not named here is the real one (tensor types, nvtx)."""

    Stream = Event = _Event

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return CPU

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def current_stream(self, *args: Any) -> _Event:
        return _Event()

    default_stream = current_stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, *args: Any) -> None: ...

    empty_cache = set_device = synchronize

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *args: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *args: Any) -> None:
        torch.set_rng_state(state)

    def is_current_stream_capturing(self) -> bool:
        return False


class _TorchOnCPU(types.ModuleType):
    """Stands for `torch` inside Megatron-Core."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCPU("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _factory_on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _patch_random_states() -> None:
    """Named random states live in the CPU's generator; Megatron's fork would warn that it moved."""
    from megatron.core.tensor_parallel import random

    class CPUStatesTracker(_attribute(random, "CudaRNGStatesTracker")):  # type: ignore[misc]
        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    _attribute(random, "_get_cuda_rng_state")
    _attribute(random, "_set_cuda_rng_state")
    random.CudaRNGStatesTracker = CPUStatesTracker
    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _patch_type_names() -> None:
    """Both optimizers choose what to do with a parameter by comparing `param.type()` with CUDA's names."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    _rename_types(_attribute(distrib_optimizer.DistributedOptimizer, "_build_model_and_main_param_groups"))
    _rename_types(_attribute(optimizer.Float16OptimizerWithFloat16Params, "__init__"))
    _rename_types(_attribute(clip_grads, "clip_grad_by_total_norm_fp32"))


def _rename_types(function: Any) -> None:
    function = getattr(function, "__func__", function)  # a classmethod hides its function
    before = function.__code__
    function.__code__ = before.replace(co_consts=_renamed(before.co_consts))
    assert function.__code__.co_consts != before.co_consts, (
        f"training/cpu.py fits megatron-core {MEGATRON_VERSION}: {function.__qualname__} no longer compares CUDA type names"
    )


def _renamed(constant: Any) -> Any:
    if isinstance(constant, tuple):
        return tuple(_renamed(c) for c in constant)
    return _TYPE_NAMES.get(constant, constant) if isinstance(constant, str) else constant


def _attribute(owner: Any, name: str) -> Any:
    assert hasattr(owner, name), f"training/cpu.py fits megatron-core {MEGATRON_VERSION}: {owner.__name__} has no {name}"
    return getattr(owner, name)
