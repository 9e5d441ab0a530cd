"""Folders that are either whole or absent: written beside their place under a hidden name, then renamed.

A kill at any moment leaves at most a hidden `.NAME.partial`, which `remove_leftovers` deletes. The rename is the only
moment at which the new folder comes to be; before it every file is on the disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_rl.errors import CheckpointError


def begin(target: Path) -> Path:
    """A fresh, empty folder to fill before `commit`; what an earlier attempt left there is gone."""
    folder = partial(target)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def commit(target: Path) -> None:
    """Make the filled folder current. An existing `target` is replaced."""
    folder = partial(target)
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)
    if target.exists():
        discard(target)
    folder.rename(target)
    _sync(target.parent)


def abandon(target: Path) -> None:
    """Delete what was written since `begin`."""
    shutil.rmtree(partial(target), ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a whole folder; it is hidden first, so that a kill leaves no half of it under its name."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(parent: Path) -> list[Path]:
    """Delete what killed processes left in `parent`; returns what was found. Call it only where nobody is writing."""
    found = sorted(parent.glob(".*.partial"))
    for path in found:
        shutil.rmtree(path)
    return found


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises CheckpointError where the file system of `folder` has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(f"{folder}: needs {num_bytes:,} bytes, the disk has {free:,} free; make room or move run.folder")


def partial(target: Path) -> Path:
    """Where `target` is written until `commit`."""
    return target.with_name(f".{target.name}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
