"""Work that goes on in its folder after a kill: `settings.json` binds the folder to its settings, a JSONL log holds what is done.

Users: `curate.py`, `rejection.py`. A training run resumes by its checkpoints and buffer instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import Prompt


def bind_settings(folder: Path, text: str, *, conflict: str) -> None:
    """Write `text`, or find it there. Raises DataError that begins with `conflict` where the folder was begun with another."""
    file = folder / "settings.json"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise DataError(f"{folder}: {conflict}; choose another folder, or remove it")
    write_atomically(file, text)


def digest(prompts: Sequence[Prompt]) -> str:
    """Of what work on prompts depends on beside the settings: which they are, in order, and how responses are judged."""
    told = json.dumps([(p.id, p.answer, p.verifier) for p in prompts])
    return hashlib.sha256(told.encode()).hexdigest()


def read_log(file: Path) -> list[Any]:
    """The values of its lines, none without a file; a last line that a kill cut short is removed, and its work done again."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomically(file, whole)
    return [json.loads(line) for line in whole.splitlines()]
