"""Commands on several ranks whose data rank 0 cannot use; what each rank raised goes to FOLDER/NAME_RANK."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl import loop
from megatron_rl.config import DPOConfig, SFTConfig, load, load_supervised
from megatron_rl.errors import DataError
from megatron_rl.long2short.dpo import dpo
from megatron_rl.supervised.sft import sft
from tests.distributed.ranks import Meeting, run_ranks

COMMANDS: dict[str, Callable[[Path], int]] = {
    "sft": lambda folder: sft(load_supervised(SFTConfig, folder / "sft" / "config.yaml", ["sft.path=nowhere.jsonl"])),
    "dpo": lambda folder: dpo(load_supervised(DPOConfig, folder / "dpo" / "config.yaml", ["dpo.path=nowhere.jsonl"])),
    "train": lambda folder: loop.train(load(folder / "config.yaml", [f"run.folder={folder}/run", "data.path=nowhere.jsonl"])),
}


def start(num_ranks: int, folder: str) -> int:
    return run_ranks(run_rank, num_ranks, Path(folder))


def run_rank(meeting: Meeting, folder: Path) -> None:
    for name, command in COMMANDS.items():
        meeting.prepare()
        try:
            command(folder)
        except DataError as e:
            (folder / f"{name}_{meeting.rank}").write_text(str(e), encoding="utf-8")
