"""Checkpoints of a run: sharded float32 weights, and what the loop wants to remember, made current by one rename.

`RUN/checkpoints/iteration_000123/` is a checkpoint if and only if it is there: it is written as
`.iteration_000123.partial`, put on the disk, then renamed. There is no pointer to keep in step with it; the current one is
the highest number. Adam's moments are in it only where they outlive an iteration (`keeps_moments`). Each holds its model's
config and tokenizer in `hf/`, so that `weights/convert.py` needs nothing else. The format of the weights: `weights/sharded.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_rl.errors import CheckpointError
from megatron_rl.training.optimizer import MOMENTS
from megatron_rl.weights import atomic, sharded
from megatron_rl.weights.folder import copy_companions

if TYPE_CHECKING:
    from megatron_rl.training.model import PolicyModel
    from megatron_rl.training.trainer import Trainer

log = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
MODEL_FOLDER = "hf"
_PREFIX = "iteration_"
_ADAM_STEPS = "adam_steps"  # in `extra`, beside the moments


def save(trainer: Trainer, run_folder: Path, iteration: int, extra: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of an iteration boundary and delete all but the newest `keep`. Collective.

    `extra` is JSON-able and rank 0's counts. A checkpoint of this iteration that is already there is left as it is:
    nothing was trained since. Raises CheckpointError on every rank where one cannot write; then the checkpoints that
    were there still are, and what was written is gone."""
    parent = run_folder / "checkpoints"
    target = parent / f"{_PREFIX}{iteration:06}"
    if _on_rank_0(target, target.exists):
        return target
    _on_rank_0(target, lambda: remove_leftovers(run_folder))
    optimizer = trainer.optimizer
    moments = {name: partial(optimizer.moment, name) for name in MOMENTS if trainer.config.keeps_moments and optimizer.num_steps}
    if moments:
        extra = extra | {_ADAM_STEPS: optimizer.num_steps}
    write(target, trainer.chunks, optimizer.main_weight, trainer.config.model.folder, extra, moments)
    _on_rank_0(target, lambda: _delete_old(parent, keep))
    return target


def latest(run_folder: Path) -> Path | None:
    """The current checkpoint; None before the first. Reads only."""
    found = _numbered(run_folder / "checkpoints")
    return found[-1] if found else None


def latest_iteration(run_folder: Path) -> int:
    """At which a resumed run goes on; 0 before the first checkpoint. Reads only."""
    newest = latest(run_folder)
    return int(newest.name.removeprefix(_PREFIX)) if newest else 0


def load(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Main weights and model weights from a checkpoint of any layout, and the moments it holds where the trainer keeps them;
    returns `extra`. Collective.

    Raises CheckpointError where it is damaged, of a newer format or of another model."""
    extra = read_extra(path)
    for parameter, value in sharded.load(trainer.chunks, path):
        trainer.optimizer.set_main_weight(parameter, value)
    num_steps = extra.pop(_ADAM_STEPS, 0)
    for name in MOMENTS if trainer.config.keeps_moments and num_steps else ():
        for parameter, value in sharded.load(trainer.chunks, path / name):
            trainer.optimizer.set_moment(name, parameter, value, num_steps)
    return extra


def remove_leftovers(run_folder: Path) -> None:
    """Delete what a killed save left. Rank 0 only, at the start of a run."""
    for path in atomic.remove_leftovers(run_folder / "checkpoints"):
        log.info("removed %s, left by a save that was interrupted", path)


def write(
    target: Path,
    chunks: list[PolicyModel],
    values: Callable[[torch.nn.Parameter], torch.Tensor],
    model_folder: Path,
    extra: dict[str, Any],
    others: Mapping[str, Callable[[torch.nn.Parameter], torch.Tensor]] | None = None,
) -> None:
    """One checkpoint folder, whole or not at all; `others` are further float32 tensors of each parameter, each kind in a folder
    of its own. Collective; raises CheckpointError on every rank."""
    others = others or {}
    needed = sharded.num_bytes(chunks[0].model_config) * (1 + len(others))
    folder = _on_rank_0(target, lambda: _begin(target, needed))
    try:
        sharded.save(chunks, folder, values)
        for name, of_parameter in others.items():
            _on_rank_0(target, (folder / name).mkdir)
            sharded.save(chunks, folder / name, of_parameter)
        _on_rank_0(target, lambda: _commit(target, model_folder, extra))
    except CheckpointError as e:
        if dist.get_rank() == 0:
            atomic.abandon(target)
        free = shutil.disk_usage(target.parent).free
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({e}); it needs {needed:,} bytes, the disk has {free:,} free; "
            "make room and run again: earlier checkpoints are intact"
        ) from e


def read_extra(path: Path) -> dict[str, Any]:
    """What was saved beside the weights. Raises CheckpointError where this is no checkpoint of ours."""
    file = path / STATE_FILE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{file}: cannot read ({e}); delete {path} to continue from the checkpoint before it") from e
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format {state.get('format')!r}, this version reads {FORMAT}; use a newer megatron_rl")
    return dict(state["extra"])


def _begin(target: Path, needed: int) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.require_space(target.parent, needed)
    return atomic.begin(target)


def _commit(target: Path, model_folder: Path, extra: dict[str, Any]) -> None:
    folder = atomic.partial(target)
    (folder / STATE_FILE).write_text(json.dumps({"format": FORMAT, "extra": extra}, indent=2), encoding="utf-8")
    (folder / MODEL_FOLDER).mkdir()
    copy_companions(model_folder, folder / MODEL_FOLDER)
    atomic.commit(target)


def _delete_old(parent: Path, keep: int) -> None:
    for path in _numbered(parent)[:-keep]:
        atomic.discard(path)


def _numbered(parent: Path) -> list[Path]:
    """Checkpoints by rising iteration."""
    found = [p for p in parent.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def _on_rank_0(target: Path, action: Callable[[], Any]) -> Any:
    """Rank 0's result on every rank, and its failure too: all go on, or all raise CheckpointError."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box = [action(), None]
        except (OSError, CheckpointError) as e:
            box = [None, str(e)]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise CheckpointError(f"{target}: {box[1]}")
    return box[0]
