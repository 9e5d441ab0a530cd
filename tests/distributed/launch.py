"""All layouts of so many ranks in one launch, forked from the zygote; results go to FOLDER/results_RANKS.pt.

The ranks join through the same `parallel.initialize` as under torchrun.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rl.training import parallel
from tests.distributed.layouts import LAYOUTS, MAX_TOKENS, PREFERENCE, config_of, prefer, refuse, round_trip, train
from tests.distributed.ranks import Meeting, run_ranks
from tests.training.material import make_config


def train_layouts(num_ranks: int, folder: str) -> int:
    return run_ranks(run_rank, num_ranks, num_ranks, Path(folder))


def run_rank(meeting: Meeting, num_ranks: int, folder: Path) -> None:
    meeting.prepare()
    parallel.initialize(make_config(folder / "qwen3"))
    results = {}
    for name, (ranks, model, training) in LAYOUTS.items():
        if ranks == num_ranks:
            config = config_of(folder / model, training | {"max_tokens_per_micro_batch": MAX_TOKENS})
            parallel.place_ranks(config)
            results[name] = train(config)
    if num_ranks == 2:
        for name, training in PREFERENCE.items():
            config = config_of(folder / "qwen3", training | {"max_tokens_per_micro_batch": MAX_TOKENS})
            parallel.place_ranks(config)
            results[name] = prefer(config)
        config = config_of(folder / "qwen3", {"pipeline_parallel": 2, "max_tokens_per_micro_batch": MAX_TOKENS})
        parallel.place_ranks(config)
        results["refused"] = refuse(config)
        config = make_config(folder / "qwen3", dtype="bfloat16", training={"distributed_optimizer": True})
        parallel.place_ranks(config)
        results["round trip"] = round_trip(config)
    if meeting.rank == 0:
        torch.save(results, folder / f"results_{num_ranks}.pt")
    parallel.shutdown()
