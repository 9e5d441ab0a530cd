"""Start ranks of one machine and run every layout of that many ranks in them: `python -m tests.distributed.launch RANKS FOLDER`.

The imports, which cost more than the tests, are paid once: the ranks are forked before any thread is started. Results go
to FOLDER/results_RANKS.pt. The ranks join through the same `parallel.initialize` as under torchrun.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_rl.training import parallel
from tests.distributed.layouts import LAYOUTS, MAX_TOKENS, PREFERENCE, config_of, prefer, refuse, round_trip, train
from tests.distributed.ranks import run_ranks
from tests.training.material import make_config


def run_rank(rank: int, num_ranks: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel.initialize(make_config(folder / "qwen3"))
    results = {}
    for name, (ranks, model, training) in LAYOUTS.items():
        if ranks == num_ranks:
            config = config_of(folder / model, training | {"max_tokens_per_micro_batch": MAX_TOKENS})
            place_again(config)
            results[name] = train(config)
    if num_ranks == 2:
        for name, training in PREFERENCE.items():
            config = config_of(folder / "qwen3", training | {"max_tokens_per_micro_batch": MAX_TOKENS})
            place_again(config)
            results[name] = prefer(config)
        config = config_of(folder / "qwen3", {"pipeline_parallel": 2, "max_tokens_per_micro_batch": MAX_TOKENS})
        place_again(config)
        results["refused"] = refuse(config)
        config = make_config(folder / "qwen3", dtype="bfloat16", training={"distributed_optimizer": True})
        place_again(config)
        results["round trip"] = round_trip(config)
    if rank == 0:
        torch.save(results, folder / f"results_{num_ranks}.pt")
    parallel.shutdown()


def place_again(config) -> None:
    parallel_state.destroy_model_parallel()
    parallel.place_ranks(config)


def main() -> int:
    num_ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return run_ranks(run_rank, [(rank, num_ranks, port, folder) for rank in range(num_ranks)])


if __name__ == "__main__":
    sys.exit(main())
