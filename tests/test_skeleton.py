"""What stands around the package: pinned versions, set-up, launch scripts, examples, house rules."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_rl import config as configuration

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted(
    p for folder in ("megatron_rl", "tools", "benchmarks", "examples", "tests") for p in (ROOT / folder).rglob("*.py")
)


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def set_up() -> ModuleType:
    return load_script(ROOT / "tools" / "set_up.py")


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pinned_versions() -> dict[str, Version]:
    pairs = [line.split("==") for line in lines("constraints-cpu.txt")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_dependency_is_installed_at_a_pinned_version_inside_its_range() -> None:
    pins, installed = pinned_versions(), {canonicalize_name(name) for name in lines("cpu.txt")}
    assert installed <= pins.keys()
    declared = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    for requirement in declared:
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert name in installed, f"requirements/cpu.txt lacks {name}"
            assert pins[name] in requirement.specifier, f"{name} is pinned to {pins[name]}, outside {requirement.specifier}"


def test_no_requirement_file_names_torch() -> None:
    assert "torch" not in {canonicalize_name(name) for name in lines("cpu.txt")} | pinned_versions().keys()


def test_set_up_and_package_accept_the_same_torch(set_up: ModuleType) -> None:
    specifier = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch").specifier
    first, refused = (Version(".".join(map(str, numbers))) for numbers in set_up.TORCH_RANGE)
    assert first in specifier and refused not in specifier
    assert Version(f"{refused.major}.{refused.minor - 1}") in specifier


def test_set_up_names_everything_that_is_missing_in_one_line(set_up: ModuleType) -> None:
    good = set_up.Machine(python=(3, 12), has_venv=True, has_compiler=True, has_headers=True, free_mb=10**6)
    assert set_up.find_problem(good) is None
    bare = replace(good, has_venv=False, has_compiler=False, has_headers=False)
    assert set_up.find_problem(bare).endswith("\n  apt-get install python3.12-venv g++ python3.12-dev")
    assert set_up.find_problem(replace(good, has_compiler=False)).endswith("\n  apt-get install g++")
    assert "Python 3.9 is too old" in set_up.find_problem(replace(bare, python=(3, 9)))
    assert f"needs {set_up.DISK_MB} MB" in set_up.find_problem(replace(good, free_mb=10))


@pytest.mark.parametrize(
    ("printed", "accepted"),
    [("2.13.0+cpu", "2.13.0"), ("2.11.1", "2.11.1"), ("2.10.9", None), ("2.14.0", None), ("", None)],
)
def test_a_torch_is_used_only_inside_the_range(
    printed: str, accepted: str | None, set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if printed:
        (tmp_path / "torch.py").write_text(f"__version__ = {printed!r}\n", encoding="utf-8")
    else:
        (tmp_path / "torch.py").write_text("raise ImportError\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert set_up.importable_torch(Path(sys.executable)) == accepted


def test_the_command_is_the_module() -> None:
    assert PROJECT["scripts"]["megatron-rl"] == "megatron_rl.cli:main"


CONFIGS = sorted({*ROOT.glob("examples/*/config.yaml"), *ROOT.glob("examples/sft/*.yaml")})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_example_configs_are_valid(path: Path) -> None:
    sections = {"sft": configuration.SFTConfig, "dpo": configuration.DPOConfig}
    kind = next((kind for kind in sections if f"\n{kind}:" in path.read_text(encoding="utf-8")), None)
    config = configuration.load_supervised(sections[kind], path) if kind else configuration.load(path)
    assert config.run.folder.parts[0] == "runs"


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("examples/*/*.sh")), ROOT / "examples/launch/slurm.sbatch", ROOT / ".ci/run"])
def test_shell_scripts_parse_and_stop_at_the_first_error(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], timeout=30).returncode == 0
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_no_script_ends_processes_by_name() -> None:
    scripts = [ROOT / "Makefile", ROOT / ".ci/run", *ROOT.glob("examples/**/*.s*"), *(p for p in SOURCES if p != Path(__file__))]
    by_name = re.compile(r"\b(pkill|killall|fuser\s+-k)\b")
    assert [str(p) for p in scripts if p.is_file() and by_name.search(p.read_text(encoding="utf-8"))] == []


def test_files_and_functions_fit_on_their_screens() -> None:
    too_long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert too_long == []


def test_every_module_of_the_package_says_what_it_is_for() -> None:
    modules = [p for p in SOURCES if p.is_relative_to(ROOT / "megatron_rl") and p.stat().st_size]
    assert [str(p) for p in modules if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []


def test_the_benchmark_table_is_made_from_the_result_files() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "table.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_result_becomes_one_line_of_the_table() -> None:
    table = load_script(ROOT / "benchmarks" / "table.py")
    result = json.loads(
        '{"name": "n", "device": "d", "date": "2030-01-02", "rows": [{"case": "c", "unit": "tokens/s", "ours": 9.5, "peer": 3,'
        ' "peer_name": "p", "limit": null, "ratio_to_peer": 3.17, "ratio_to_limit": null, "spread": {"ours": [9, 10]}}]}'
    )
    text = f"before\n{table.BEGIN}stale\n{table.END}after\n"
    fresh = table.with_table(text, [result])
    assert "| n | c | tokens/s | 9.5 (9 to 10) | 3 | p | 3.17 |  |  | d | 2030-01-02 |" in fresh
    assert "stale" not in fresh and fresh.startswith("before\n") and fresh.endswith(f"{table.END}after\n")
    assert table.with_table(fresh, [result]) == fresh
