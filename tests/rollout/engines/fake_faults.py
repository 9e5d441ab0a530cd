"""Which of the faults after `--fake-fault` a start of the fake server has."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def own_fault(faults: list[str], folder: Path) -> str:
    """The first that no other start of a server has; one that keeps it from starting is for all."""
    for i, fault in enumerate(faults):
        if fault in ("", "oom", "hang"):
            return fault
        with suppress(FileExistsError):  # servers start side by side: whoever makes the file has it
            (folder / f"died.{i}").touch(exist_ok=False)
            return fault
    return ""
