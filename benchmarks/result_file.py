"""Writes `benchmarks/results/<name>.json`: what was measured, where, with which versions and command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from unattended import FOLDER

sys.path.append(str(Path(__file__).parents[1]))  # for what benchmarks borrow from tests/ and examples/; their own folder is there


@dataclass(frozen=True)
class Row:
    """One measured case. Ratios above 1 mean that we are ahead; a limit is what the hardware allows.

    peer: None where nothing else does this, or where it failed; then peer_name says why."""

    case: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str | None
    limit: float | None
    ratio_to_peer: float | None
    ratio_to_limit: float | None
    spread: Mapping[str, tuple[float, float]]  # lowest and highest of the repeats, by side; on a GPU, p10 and p90


def write_result(
    name: str,
    rows: Sequence[Row],
    *,
    ceilings: Mapping[str, float],
    packages: Sequence[str],
    curves: Mapping[str, Sequence[float]] | None = None,
    device: torch.device | None = None,
    measured_on: Mapping[str, Any] | None = None,
    folder: Path = FOLDER,
) -> Path:
    """`curves`: what rows sum up, one list a run, e.g. correctness of every iteration. `device`: a GPU, if one was measured.
    `measured_on`: `machine()` of the processes that measured, where this one only writes down what they found."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=10
    )
    content = {
        "name": name,
        **(measured_on or machine(packages, device)),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
        "ceilings": dict(ceilings),
        "rows": [asdict(row) for row in rows],
        **({"curves": {name: list(curve) for name, curve in curves.items()}} if curves else {}),
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def machine(packages: Sequence[str], device: torch.device | None = None) -> dict[str, Any]:
    """What this process measures on: `device` and `versions` of a result."""
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {"device": device_name(device), "versions": {**versions, **gpu_versions(device)}}


def device_name(device: torch.device | None) -> str:
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def gpu_versions(device: torch.device | None) -> dict[str, str]:
    """CUDA that torch was built with, and the driver's version where nvidia-smi tells it."""
    if device is None or device.type != "cuda":
        return {}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    return {"cuda": str(torch.version.cuda), "driver": told.stdout.split("\n")[0].strip() or "unknown"}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
