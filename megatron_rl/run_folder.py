"""The folder of a run: its resolved configuration, its identity, and whether it may be continued.

`runs/<name>/`: config.yaml, run.json, metrics.jsonl, buffer.sqlite, checkpoints/, report.html, hf/, log/.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.errors import ConfigError

# What the recorded trajectories and draws depend on; other settings may change between two starts of a run.
FIXED = ("run.seed", "model.folder", "rollout.group_size", "data")


def open_folder(config: Config) -> str:
    """Create or reopen the folder; returns the run id. Raises ConfigError when a fixed setting changed."""
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log").mkdir(exist_ok=True)
    saved, identity = folder / "config.yaml", folder / "run.json"
    if identity.exists():
        before = configuration.load(saved).model_dump(mode="json")
        now = config.model_dump(mode="json")
        for key in FIXED:
            if _at(before, key) != _at(now, key):
                raise ConfigError(
                    f"{key}={_at(now, key)!r}: the run in {folder} was started with {_at(before, key)!r} and its trajectories "
                    "depend on it; restore the setting, or give the new run another run.folder"
                )
        run_id = str(json.loads(identity.read_text())["run_id"])
    else:
        run_id = uuid.uuid4().hex
    write_atomically(saved, configuration.dump(config))
    write_atomically(identity, json.dumps({"run_id": run_id}))
    return run_id


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
