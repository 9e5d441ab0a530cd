"""Trained tokens per GPU-second and MFU of the training step on one GPU, and on two, four and eight where they are there.

Eight layers of Qwen3-8B's shape with random weights; one optimizer step on the same groups of 8 responses for every layout (32k
packed tokens, then 64k), micro-batches of at most 8k, from a distributed batch to the weights' update: gradients are reduced,
Adam's moments made and thrown away as in a run. No activations are recomputed. MFU counts the model's own products
(`model_flops.py`) against the vendor's peak. A row's limit is one GPU's rate, or for MFU the matrix product of this machine in
this run. What an iteration with generation makes of it: `demo_two_gpus.py`. Unattended:

    python benchmarks/scaling.py [--out DIR] [--seconds 150]         # GPUs of 80 GB, no model folder needed
    python benchmarks/scaling.py --small --out DIR                   # a tiny model, on a CPU; no numbers worth reading

One process a GPU for everything (`scaling_rank.py`): the first measures one GPU alone while the others wait, then the first two,
and so on, since imports take longer than any layout. Rows are printed and the file is written as each is measured. With
`--after FILE` the processes start and import at once; they measure, and the seconds count, once the file is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launched import Job, ending, num_gpus
from unattended import Clock, command_line

SIZES = (1, 2, 4, 8)  # numbers of ranks; scaling_rank.py has their layouts
TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
TINY |= {"intermediate_size": 128}
RANK = Path(__file__).parent / "scaling_rank.py"
LAST_ROW_S = 4.0  # for the row that is being measured when the time is over


def main() -> int:
    parser = command_line(__doc__, seconds=150, then="the ranks are ended", small="a tiny model, on a CPU if there is no GPU")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--after", type=Path, help="a file: nothing is measured before it is there")
    options = parser.parse_args()
    num_ranks = 2 if options.small else num_gpus()
    if not num_ranks:
        parser.error("no GPU here; --small tries the code on a CPU")
    plan = plan_of(options.out, num_ranks, options.layers, small=options.small)
    with tempfile.TemporaryDirectory() as name, ending([]) as jobs:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        for rank in range(plan["sizes"][-1]):
            jobs.append(Job([sys.executable, "-W", "ignore", str(RANK), str(folder), str(rank)], folder / f"rank{rank}.log"))
        while options.after and not options.after.exists() and all(job.code is None for job in jobs):
            time.sleep(0.2)
        return watch(jobs, folder, Clock.of(options.seconds))


def plan_of(out: Path, num_ranks: int, layers: int, *, small: bool) -> dict[str, Any]:
    """What the ranks read: what to measure, and where results go."""
    plan: dict[str, Any] = {
        "sizes": [size for size in SIZES if size <= num_ranks],
        "command": sys.argv,
        "out": str(out.absolute()),
    }
    if small:
        return plan | {"layers": 2, "shape": TINY, "tokens": [512, 1024], "micro_batch": 256}
    return plan | {"layers": layers, "shape": {}, "tokens": [1 << 15, 1 << 16], "micro_batch": 1 << 13}


def watch(jobs: list[Job], folder: Path, clock: Clock) -> int:
    """Tell what the first rank tells until all have ended, one has failed or the time is over; 1 where anything is missing."""
    begin = folder / "begin"
    begin.with_suffix(".part").write_text(str(time.time() + clock.left - LAST_ROW_S))
    begin.with_suffix(".part").rename(begin)
    with jobs[0].log.open(errors="replace") as told:
        while True:
            codes = [job.code for job in jobs]
            print(told.read(), end="", flush=True)
            if all(code == 0 for code in codes):
                return 0
            if any(codes) or clock.left < 0:
                break
            time.sleep(0.2)
    clock.tell(f"exit codes {codes}: the time was over or a rank failed")
    for rank, job in enumerate(jobs):
        if rank:
            print(f"--- end of rank {rank}\n{job.tail(40)}", flush=True)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
