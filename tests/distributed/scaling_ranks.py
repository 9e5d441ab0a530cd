"""Two ranks of benchmarks/scaling.py on a tiny model, forked from the zygote. Judged by `test_scaling.py`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.distributed.ranks import Meeting, run_ranks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measure(folder: str) -> int:
    sys.path.insert(0, str(BENCHMARKS))
    from scaling import plan_of

    plan = plan_of(Path(folder), num_ranks=2, layers=8, small=True) | {"tokens": [256]}
    (Path(folder) / "plan.json").write_text(json.dumps(plan))
    (Path(folder) / "begin").write_text(str(time.time() + 100))
    return run_ranks(run_rank, 2, Path(folder))


def run_rank(meeting: Meeting, folder: Path) -> None:
    import scaling_rank

    scaling_rank.LAYOUTS[2] = {"TP=2": scaling_rank.LAYOUTS[2]["TP=2"]}
    scaling_rank.REPEATS = 2
    sys.exit(scaling_rank.run_rank(folder, meeting.rank))
