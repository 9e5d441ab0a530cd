"""What the SGLang benchmarks share: a random model of Qwen3-8B's shape as a folder, its server, and Megatron's copy of it.

The server makes its own random weights (`load_format: dummy`), so no file of 16 GB is read. `small` is the same code on a CPU: a
tiny model, and the tests' fake server in place of SGLang; its numbers mean nothing. It refuses nothing that config would not.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_timing import note_missing, synchronize

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.engines.sglang import SGLangEngine
from megatron_rl.rollout.engines.sglang_compat import NCCLGroup, cuda_ipc_serializer
from megatron_rl.rollout.engines.sglang_http import SGLangClient
from megatron_rl.rollout.engines.sglang_server import ServerProcess, sglang_program
from megatron_rl.rollout.engines.sglang_transport import IPC, Broadcast, Transport
from megatron_rl.training import parallel
from megatron_rl.training.model import PolicyModel
from megatron_rl.weights.handles import Serialize

T = TypeVar("T")
Side = Callable[[], Awaitable[None]]

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "smollm2_gpu" / "config.yaml"
FAKE = ROOT / "tests" / "rollout" / "engines"
SILENCE_S = 120.0

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": None,  # nothing ends a response before its time
}


@dataclass(frozen=True)
class Setup:
    config: Config
    model: ModelConfig
    device: torch.device
    program: tuple[str, ...]  # what starts a server
    serializer: Callable[[], Serialize]
    transport: Transport
    small: bool


def prepare(folder: Path, *, small: bool, layers: int, overrides: Sequence[str], **server_arguments: Any) -> Setup:
    """Model folder and settings under `folder`. server_arguments: of SGLang, besides what it needs on the GPU machine."""
    model_folder = folder / "model"
    if small:
        from examples.quickstart.make_model import make_model

        make_model(model_folder, family="qwen3", hidden=32, layers=2, eos_token_id=None)
        server_arguments = {}
    else:
        model_folder.mkdir(parents=True)
        shape = QWEN3_8B | {"num_hidden_layers": layers}
        (model_folder / "config.json").write_text(json.dumps(shape, indent=1), encoding="utf-8")
        server_arguments = {"grammar_backend": "none", "load_format": "dummy", **server_arguments}
    config = configuration.load(
        RECIPE,
        [
            f"model.folder={model_folder}",
            f"run.folder={folder / 'run'}",
            "model.dtype=bfloat16",
            f"rollout.sglang.server_arguments={json.dumps(server_arguments)}",
            *overrides,
        ],
    )
    device = torch.device("cpu") if small else torch.device("cuda", 0)
    model = ModelConfig.from_folder(model_folder)
    colocated = config.rollout.sglang.colocated
    if not small:
        transport = IPC(cuda_ipc_serializer) if colocated else Broadcast(NCCLGroup, SILENCE_S)
        return Setup(config, model, device, sglang_program(), cuda_ipc_serializer, transport, small)
    sys.path[:0] = [] if str(FAKE) in sys.path else [str(FAKE)]
    from fake_sglang import GlooGroup, serialize

    transport = IPC(lambda: serialize) if colocated else Broadcast(GlooGroup, SILENCE_S)
    program = (sys.executable, str(FAKE / "fake_sglang.py"))
    return Setup(config, model, device, program, lambda: serialize, transport, small)


@asynccontextmanager
async def open_server(setup: Setup) -> AsyncIterator[tuple[SGLangEngine, SGLangClient]]:
    """The engine at version 0, and a client for what only benchmarks ask. Prints the log's last lines where something fails."""
    first_gpu = 0 if setup.config.rollout.sglang.colocated else 1
    server = ServerProcess(setup.config, name="sglang-0", index=0, program=setup.program, first_gpu=first_gpu)
    clients: list[SGLangEngine | SGLangClient] = []
    try:
        url = await server.start()
        sglang = setup.config.rollout.sglang
        engine = await SGLangEngine.connect(
            url, setup.model, sglang, name="sglang-0", silence_s=SILENCE_S, transport=setup.transport
        )
        clients.append(engine)
        client = SGLangClient(url, name="sglang-0", silence_s=SILENCE_S)
        clients.append(client)
        await engine.adopt(0)
        yield engine, client
    except Exception:
        print(f"--- end of {server.log}\n{server.tail()}", flush=True)
        raise
    finally:
        for each in clients:
            await each.close()
        await server.stop()


@torch.no_grad()
def fill_at_random(chunks: Sequence[PolicyModel], seed: int) -> None:
    generator = torch.Generator(device=next(chunks[0].parameters()).device).manual_seed(seed)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.normal_(0, 0.02, generator=generator)


def weight_bytes(chunks: Sequence[PolicyModel]) -> int:
    return sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())


@contextmanager
def megatron_of_one(config: Config) -> Iterator[None]:
    """Megatron's parallel state of one rank, for as long as it is needed."""
    parallel.initialize(config)
    try:
        yield
    finally:
        parallel.shutdown()


async def seconds(side: Side, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    await side()
    synchronize(device)
    return time.perf_counter() - start


def target_seconds(num_bytes: int) -> float:
    """Of a publish of so many bytes: 0.5 s for 16 GB."""
    return 0.5 / 16e9 * num_bytes


async def attempt(what: str, call: Awaitable[T], failures: dict[str, str]) -> T | None:
    """What it gives, or None with the reason printed and kept: `gpu_timing.attempt`, awaited."""
    try:
        return await call
    except Exception as e:  # noqa: BLE001  a peer may fail in any way; its row then says so
        note_missing(what, e, failures)
        return None


class Lap:
    """Seconds by step, nothing overlapped."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        synchronize(device)
        self._last = time.perf_counter()

    def mark(self, step: str) -> None:
        """What was done since the last mark was `step`, perhaps again."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now


class GPUMemory:
    """Bytes; zeros on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"

    @property
    def free(self) -> int:
        """Of the GPU, whoever uses it."""
        return torch.cuda.mem_get_info()[0] if self._is_gpu else 0

    @property
    def allocated(self) -> int:
        """By this process's tensors."""
        return torch.cuda.memory_allocated() if self._is_gpu else 0

    @property
    def peak(self) -> int:
        """Most of `allocated` since `reset_peak`."""
        return torch.cuda.max_memory_allocated() if self._is_gpu else 0

    def reset_peak(self) -> None:
        if self._is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
