"""One run of an ablation: train, count the engine's steps, score what came out. `measured_train.py CONFIG [KEY=VALUE ...]`

Leaves outcome.json in the run folder: `steps` of the engine, each a prefill and a decode pass as far as there is work; `rows`
decoded, padding included (the sum over steps of the padded batch); `prefill_tokens`; and the `evaluation` of the trained model
on all prompts, sampled. Counting needs the whole run in one process: `run.py` begins an interrupted one anew.
"""

from __future__ import annotations

import json
import logging
import sys

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.evaluate import evaluate
from megatron_rl.loop import train
from megatron_rl.rollout.engines.embedded import runner
from megatron_rl.rollout.engines.embedded.scheduler import Plan, Scheduler
from megatron_rl.run_folder import write_atomically

RESPONSES = 800  # in the evaluation, over all prompts


def counted(config: Config) -> dict[str, int]:
    """Counts that grow from now on: every engine of this process plans with a scheduler that counts."""
    counts = {"steps": 0, "rows": 0, "prefill_tokens": 0}
    sizes = config.rollout.embedded.batch_sizes

    class Counted(Scheduler):
        def plan(self) -> Plan:
            plan = super().plan()
            counts["steps"] += 1
            counts["rows"] += next(size for size in sizes if size >= len(plan.decode)) if plan.decode else 0
            counts["prefill_tokens"] += sum(piece.end - piece.start for piece in plan.prefill)
            return plan

    runner.Scheduler = Counted
    return counts


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    config = configuration.load(sys.argv[1], sys.argv[2:])
    counts = counted(config)
    if code := train(config):
        sys.exit(code)
    outcome = dict(counts)
    assert config.data.path is not None, "the ablations' prompts are a file"
    samples = max(1, RESPONSES // len(config.data.path.read_text(encoding="utf-8").splitlines()))
    evaluation = evaluate(config, config.run.folder / "hf", split="train", greedy=False, samples=samples)
    write_atomically(config.run.folder / "outcome.json", json.dumps({**outcome, "evaluation": evaluation}, indent=1))


if __name__ == "__main__":
    main()
