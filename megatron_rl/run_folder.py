"""The folder of a run: its resolved configuration, its identity, and whether it may be continued.

`runs/<name>/`: config.yaml, run.json, metrics.jsonl, buffer.sqlite, checkpoints/, report.html, hf/, log/; a supervised run has
course.json in place of the buffer; one with a PTX term has ptx.json, what it draws from.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from megatron_rl import config as configuration
from megatron_rl.config import Config, SupervisedConfig
from megatron_rl.errors import ConfigError

# What the recorded trajectories and draws depend on; other settings may change between two starts of a run.
FIXED = ("run.seed", "model.folder", "rollout.group_size", "data")


def open_folder(config: Config | SupervisedConfig) -> str:
    """Create or reopen the folder; returns the run id. Raises ConfigError when a fixed setting changed, or the folder holds a
    run of another kind."""
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log").mkdir(exist_ok=True)
    saved, identity = folder / "config.yaml", folder / "run.json"
    if identity.exists():
        _check_kind(folder, config)
        before = _load(config, saved).model_dump(mode="json")
        now = config.model_dump(mode="json")
        for key in config.fixed if isinstance(config, SupervisedConfig) else FIXED:
            if _at(before, key) != _at(now, key):
                raise ConfigError(
                    f"{key}={_at(now, key)!r}: the run in {folder} was started with {_at(before, key)!r}, and what "
                    "it holds depends on it; restore the setting, or give the new run another run.folder"
                )
        run_id = str(json.loads(identity.read_text())["run_id"])
    else:
        run_id = uuid.uuid4().hex
    write_atomically(saved, configuration.dump(config))
    write_atomically(identity, json.dumps({"run_id": run_id, "kind": config.kind}))
    return run_id


def _check_kind(folder: Path, config: Config | SupervisedConfig) -> None:
    kind = kind_of(folder)
    if kind != config.kind:
        raise ConfigError(f"run.folder={folder}: holds a run of kind {kind}, not {config.kind}; give the new run another folder")


def kind_of(folder: Path) -> str:
    """Of the run in a folder: train, sft or dpo; train where nothing is said."""
    identity = folder / "run.json"
    return str(json.loads(identity.read_text(encoding="utf-8")).get("kind", "train")) if identity.exists() else "train"


def _load(config: Config | SupervisedConfig, saved: Path) -> Config | SupervisedConfig:
    return (
        configuration.load_supervised(type(config), saved) if isinstance(config, SupervisedConfig) else configuration.load(saved)
    )


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a start after a kill, sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def _at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
