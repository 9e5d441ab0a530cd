"""Make the virtual environment that the Makefile's targets run in; the standard library only, any Python 3.8 or later.

Checks everything it will need before it fetches a byte, says how many bytes come, and can be repeated. torch is settled
first: one that is already importable and in range is kept, else the given requirement is installed, alone. Its version
joins the constraints of every later install. Refuses to install system packages; it prints the one line that does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
REQUIREMENTS = PROJECT / "requirements"
MIN_PYTHON = (3, 11)
TORCH_RANGE = ((2, 11), (2, 14))  # as in pyproject.toml: first accepted, first refused
TORCH_MB = 192  # the CPU wheel; where an index offers only the CUDA build it is gigabytes
PACKAGES_MB = 148  # all of requirements/constraints-cpu.txt
DISK_MB = 2000  # of the environment, with what pip unpacks on the way


@dataclass(frozen=True)
class Machine:
    """What matters of this machine, so that the rules can be tried on others."""

    python: tuple[int, int]
    has_venv: bool
    has_compiler: bool
    has_headers: bool
    free_mb: int


class SetUpError(Exception):
    """Something the user has to change first."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make megatron_rl's virtual environment.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install where no torch in range is importable")
    args = parser.parse_args()
    try:
        set_up(args.venv.resolve(), args.torch)
    except SetUpError as e:
        print(f"set-up: {e}", file=sys.stderr)
        return 1
    return 0


def set_up(venv: Path, torch_requirement: str) -> None:
    problem = find_problem(this_machine(venv))
    if problem:
        raise SetUpError(problem)
    python = venv / "bin" / "python"
    if not python.exists():
        make_venv(venv)
    torch = importable_torch(python)
    if torch:
        print(f"set-up: torch {torch} is there and used; to fetch: at most {PACKAGES_MB} MB of other packages")
    else:
        print(f"set-up: to fetch: {torch_requirement} ({TORCH_MB} MB if a CPU build) and {PACKAGES_MB} MB of other packages")
        print("set-up: [1/3] torch", flush=True)
        pip(python, torch_requirement)
        torch = importable_torch(python)
        if not torch:
            raise SetUpError(f"TORCH={torch_requirement}: not in the supported range >= 2.11, < 2.14; give one that is")
    print("set-up: [2/3] the other packages; pycosat is compiled", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        pinned = (REQUIREMENTS / "constraints-cpu.txt").read_text(encoding="utf-8")
        constraints.write_text(f"{pinned}\ntorch=={torch}\n", encoding="utf-8")
        pip(python, "-r", str(REQUIREMENTS / "cpu.txt"), "-c", str(constraints))
    compile_packages(python)
    print("set-up: [3/3] megatron_rl itself; its C++ kernels are compiled, about a minute", flush=True)
    pip(python, "--no-build-isolation", "--no-deps", "-e", str(PROJECT))
    if importable_torch(python) != torch:
        raise SetUpError(f"{venv}: torch changed from {torch} during the set-up; remove the folder and try again")


def this_machine(venv: Path) -> Machine:
    def found(module: str) -> bool:
        return subprocess.run([sys.executable, "-c", f"import {module}"], stderr=subprocess.DEVNULL, check=False).returncode == 0

    existing = next(p for p in [venv, *venv.parents] if p.exists())
    return Machine(
        python=sys.version_info[:2],
        has_venv=found("venv") and found("ensurepip"),
        has_compiler=all(shutil.which(name) for name in ("gcc", "g++")),
        has_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        free_mb=DISK_MB if (venv / "bin").exists() else shutil.disk_usage(existing).free >> 20,
    )


def find_problem(m: Machine) -> str | None:
    """The first thing in the way, with its remedy; None when nothing is."""
    version = ".".join(map(str, m.python))
    if m.python < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return f"Python {version} is too old; megatron_rl needs {wanted} or later. Give another: make PYTHON=python{wanted}"
    missing = {f"python{version}-venv": m.has_venv, "g++": m.has_compiler, f"python{version}-dev": m.has_headers}
    packages = [name for name, present in missing.items() if not present]
    if packages:
        why = "the venv module makes the environment; g++ and Python.h build our kernels and reasoning-gym's pycosat"
        return f"missing {', '.join(packages)} ({why}). Install with:\n  apt-get install {' '.join(packages)}"
    if m.free_mb < DISK_MB:
        return f"{m.free_mb} MB free here; the environment needs {DISK_MB} MB. Free some, or give VENV=FOLDER on another disk"
    return None


def make_venv(venv: Path) -> None:
    """A fresh environment; it sees the calling Python's packages only where torch among them is in range."""
    torch = importable_torch(Path(sys.executable))
    in_venv = sys.prefix != sys.base_prefix
    share = ["--system-site-packages"] if torch and not in_venv else []
    run(sys.executable, "-m", "venv", *share, str(venv))
    if torch and in_venv:
        # --system-site-packages would mean the base Python's, not those of the environment we are called from.
        inside = Path(output(venv / "bin" / "python", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
        outside = output(Path(sys.executable), "import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent)")
        (inside / "calling_environment.pth").write_text(outside + "\n", encoding="utf-8")


def importable_torch(python: Path) -> str | None:
    """Version of the torch that `python` imports, without the local part; None when absent or out of range."""
    version = output(python, "import torch; print(torch.__version__)")
    numbers = tuple(int(part) for part in version.split(".")[:2]) if version else (0, 0)
    if not TORCH_RANGE[0] <= numbers < TORCH_RANGE[1]:
        return None
    return version.split("+")[0]


def output(python: Path, code: str) -> str:
    """What `code` prints under `python`; empty when it fails."""
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def compile_packages(python: Path) -> None:
    """To bytecode, on all cores; pip would take one. A file of another Python's syntax fails, and is never imported."""
    packages = output(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    subprocess.run([str(python), "-m", "compileall", "-qq", "-j", "0", packages], stdout=subprocess.DEVNULL, check=False)


def pip(python: Path, *arguments: str) -> None:
    quietly = ["--no-compile", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    run(str(python), "-m", "pip", "install", *quietly, *arguments)


def run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env={**os.environ, "PIP_NO_INPUT": "1"}, check=False)
    if done.returncode:
        raise SetUpError(f"this command failed, its message is above:\n  {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
