"""Two ranks of a run whose servers are SGLang's fake, forked from the zygote. Judged by `test_served.py`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from megatron_rl import config as configuration
from megatron_rl import loop, run
from megatron_rl.serving_sglang import SGLangServing
from tests.distributed.ranks import Meeting, run_ranks
from tests.resume.recipe import write_recipe

FAKE = Path(__file__).parents[1] / "rollout" / "engines" / "fake_sglang.py"
LAYOUT = ["training.tensor_parallel=2", "rollout.sglang.tensor_parallel=2"]  # one server of two ranks
BUCKETS = ["weights.bucket_bytes=4096", "rollout.sglang.bucket_bytes=16384"]
FAULTS = "rollout.sglang.server_arguments={fake_fault: 'delivery,generating'}"


def train_served(folder: str) -> int:
    write_recipe(Path(folder), iterations=3)
    return run_ranks(run_rank, 2, Path(folder))


def run_rank(meeting: Meeting, folder: Path) -> None:
    from tests.rollout.engines.fake_sglang import serialize

    program = (sys.executable, str(FAKE))
    run.SGLangServing = partial(SGLangServing, program=program, serialize=lambda: serialize)  # type: ignore[misc,assignment]
    settings = [f"run.folder={folder / 'run'}", "rollout.engine=sglang", *LAYOUT, *BUCKETS, FAULTS]
    meeting.prepare()
    assert loop.train(configuration.load(folder / "config.yaml", settings)) == 0
