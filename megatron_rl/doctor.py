"""`megatron-rl doctor`: is this machine, and this config, fit for a run? Each finding with its remedy.

It looks and changes nothing. Requirements are those of the installed package itself, so they are written down once
(`pyproject.toml`). With a config it also reads model folder, tokenizer, prompts and rewards, as a run would.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.errors import MegatronRLError
from megatron_rl.file_system import file_system_kind, network_advice

LEAST_PYTHON = (3, 11)
GIB = 1 << 30
LEAST_DISK_BYTES = 2 * GIB  # for buffer, log and report, without any model
LEAST_MEMORY_BYTES = 4 * GIB  # what the SmolLM2 example needs
LEAST_SHARED_BYTES = 1 * GIB  # NCCL and torch workers exchange tensors there


class State(StrEnum):
    OK = "ok"
    ADVICE = "advice"  # a run works, or may; better to follow the remedy
    MISSING = "missing"  # a run cannot work


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    found: str
    remedy: str = ""


def examine(config_path: Path | None = None, overrides: list[str] | None = None) -> list[Finding]:
    """All findings: of the machine, and of a config where one is given."""
    findings, config = [], None
    if config_path is not None:
        try:
            config = configuration.load(config_path, overrides)
            findings.append(Finding("config", State.OK, str(config_path)))
        except MegatronRLError as e:
            findings.append(Finding("config", State.MISSING, str(config_path), str(e)))
    folder = config.run.folder if config else Path.cwd()
    findings = [python(), torch(), kernels(), *packages(), engines(), adam(), *machine(), *storage(folder, config), *findings]
    if config:
        findings += contents(config)
    return findings


def show(findings: list[Finding], console: Console) -> None:
    colours = {State.OK: "green", State.ADVICE: "yellow", State.MISSING: "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for f in findings:
        text = Text(f.found)
        if f.remedy:
            text.append(f"{chr(10) if f.found else ''}{f.remedy}", style=colours[f.state])
        table.add_row(Text(f.state, style=colours[f.state]), f.name, text)
    console.print(table)


def python() -> Finding:
    found = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        return Finding("Python", State.MISSING, found, f"install Python {'.'.join(map(str, LEAST_PYTHON))} or newer")
    return Finding("Python", State.OK, found)


def torch() -> Finding:
    found = _installed("torch")
    wanted = _requirement("torch")
    remedy = f"install {wanted or 'torch'}, for a CPU or with the machine's CUDA"
    if found is None:
        return Finding("torch", State.MISSING, "not installed", remedy)
    if wanted and not wanted.specifier.contains(found, prereleases=True):
        return Finding("torch", State.MISSING, f"{found}, outside {wanted.specifier}", remedy)
    try:
        import torch as library
    except (ImportError, OSError) as e:
        return Finding("torch", State.MISSING, f"{found} cannot be imported: {e}", remedy)
    build = f"CUDA {library.version.cuda}" if library.version.cuda else "CPU build"
    text = f"{found}, {build}, supported {wanted.specifier if wanted else 'range unknown'}"
    if library.version.cuda and not library.cuda.is_available():
        return Finding("torch", State.ADVICE, text, "no CUDA device is visible: check the driver, or install the CPU build")
    if not library.version.cuda and Path("/proc/driver/nvidia/version").exists():
        return Finding("torch", State.ADVICE, text, "there is an NVIDIA driver: install a CUDA build of torch to use it")
    return Finding("torch", State.OK, text)


def kernels() -> Finding:
    """csrc/ is compiled, and loads under the torch at hand."""
    try:
        from megatron_rl.kernels.build import load_operators, state

        load_operators()
    except MegatronRLError as e:
        return Finding("kernels", State.MISSING, "", str(e))
    except ImportError:
        return Finding("kernels", State.MISSING, "need torch", "install torch first")
    return Finding("kernels", State.OK, f"built with torch {state.built_with_torch}")


def packages() -> Iterator[Finding]:
    """What the package requires, from its own metadata."""
    requirements = _requirements()
    if not requirements:
        yield Finding(
            "megatron_rl", State.MISSING, "its metadata are not installed", "run `pip install -e .` in the project's folder"
        )
    for wanted in requirements:
        if wanted.name == "torch":  # has its own line
            continue
        found = _installed(wanted.name)
        remedy = f"pip install '{wanted.name}{wanted.specifier}'"
        if found is None:
            yield Finding(wanted.name, State.MISSING, "not installed", remedy)
        elif not wanted.specifier.contains(found, prereleases=True):
            yield Finding(wanted.name, State.MISSING, f"{found}, outside {wanted.specifier}", remedy)
        else:
            yield Finding(wanted.name, State.OK, found)


def engines() -> Finding:
    if _installed("torch") is None:
        return Finding("engine embedded", State.MISSING, "needs torch", "see torch")
    import torch as library

    if not library.cuda.is_available():
        return Finding("engine embedded", State.OK, "on the CPU")
    names = [library.cuda.get_device_name(i) for i in range(library.cuda.device_count())]
    return Finding("engine embedded", State.OK, f"on CUDA: {len(names)} x {names[0]}")


def adam() -> Finding:
    """Which Adam Megatron-Core will take; all of them compute the same."""
    if importlib.util.find_spec("transformer_engine"):
        return Finding("Adam", State.OK, "TransformerEngine's")
    if importlib.util.find_spec("apex"):
        return Finding("Adam", State.OK, "apex's")
    return Finding("Adam", State.OK, "torch's (TransformerEngine and apex, both optional, are not installed)")


def machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # the former: Linux
    threads = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores, OMP_NUM_THREADS {threads or 'not set'}"
    if threads and threads.isdigit() and int(threads) > cores:
        yield Finding("threads", State.ADVICE, text, f"more threads than cores: unset OMP_NUM_THREADS or set it to {cores}")
    else:
        yield Finding("threads", State.OK, text)
    if _installed("psutil"):
        yield memory()
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        remedy = "" if size >= LEAST_SHARED_BYTES else "several ranks need more: start the container with --shm-size=1g or larger"
        yield Finding("shared memory", State.ADVICE if remedy else State.OK, f"{size / GIB:.1f} GiB in /dev/shm", remedy)


def memory() -> Finding:
    """Of the container, where it has a limit of its own."""
    import psutil  # may be the package that is missing

    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        available = min(available, max(0, total - int(used.read_text())))
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    short = available < LEAST_MEMORY_BYTES
    remedy = "the SmolLM2 example needs 4 GiB: end other programs, or use a smaller model" if short else ""
    return Finding("memory", State.ADVICE if short else State.OK, text, remedy)


def storage(folder: Path, config: Config | None) -> Iterator[Finding]:
    """Of the run folder, or of the working folder without a config."""
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    if not os.access(place, os.W_OK):
        yield Finding("run folder", State.MISSING, str(folder), f"{place} cannot be written: set run.folder to one of your own")
    buffer = config.buffer_path if config else folder / "buffer.sqlite"
    advice = network_advice(buffer)
    yield Finding(
        "file system", State.ADVICE if advice else State.OK, f"{file_system_kind(buffer) or 'unknown'}: {buffer}", advice or ""
    )
    free, needed = shutil.disk_usage(place).free, LEAST_DISK_BYTES
    if config:
        needed += _checkpoint_bytes(config)
    text = f"{free / GIB:.1f} GiB free in {place}"
    remedy = "" if free >= needed else f"a run may need {needed / GIB:.1f} GiB: free some, or lower run.keep_checkpoints"
    yield Finding("disk", State.ADVICE if remedy else State.OK, text, remedy)


def contents(config: Config) -> Iterator[Finding]:
    """What the config points at, read as a run reads it."""

    def model() -> str:
        from megatron_rl.model_config import ModelConfig

        shape = ModelConfig.from_folder(config.model.folder)
        configuration.check_model(config, shape)
        return f"{config.model.folder}: {shape.family}, {shape.num_layers} layers of {shape.hidden_size}"

    def algorithm() -> str:
        from megatron_rl.algorithms import make_algorithm

        make_algorithm(config.algorithm)
        return config.algorithm.name

    def prompts() -> str:
        from megatron_rl.data.sources import load_prompts
        from megatron_rl.data.tokenizer import ChatTokenizer

        tokenizer = ChatTokenizer.from_folder(config.model.folder)
        found = load_prompts(config.data, tokenizer, terms=config.rewards.names)
        return f"{len(found.train):,} to train on, {len(found.held_out):,} held out"

    def rewards() -> str:
        from megatron_rl.rewards.scorer import Scorer

        asyncio.run(Scorer(config.rewards, config.rollout.repetition.penalty).close())
        return (
            ", ".join(term.name for term in config.rewards.terms)
            or f"each prompt's own verifier, {config.data.verifier} by default"
        )

    yield _tried("model", model)
    yield _tried("algorithm", algorithm)
    yield _tried("prompts", prompts)
    yield _tried("rewards", rewards)


def _tried(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, State.OK, look())
    except MegatronRLError as e:
        return Finding(name, State.MISSING, "", str(e))


def _checkpoint_bytes(config: Config) -> int:
    """Upper bound: float32 weights in every kept checkpoint and the one being written, and the exported model."""
    weights = sum(path.stat().st_size for path in Path(config.model.folder).glob("*.safetensors"))
    return weights * (2 * (config.run.keep_checkpoints + 1) + 1)


def _requirement(name: str) -> Requirement | None:
    return next((r for r in _requirements() if r.name == name), None)


def _requirements() -> list[Requirement]:
    """Of megatron_rl without its extras; empty when it is not installed."""
    try:
        texts = metadata.requires("megatron_rl") or []
    except metadata.PackageNotFoundError:
        return []
    return [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
