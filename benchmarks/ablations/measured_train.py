"""One run of an ablation: train, count the engine's steps, score what came out. `measured_train.py CONFIG [KEY=VALUE ...]`

Leaves outcome.json in the run folder: `steps` of the engine, each a prefill and a decode pass as far as there is work; `rows`
decoded, padding included (the sum over steps of the padded batch); `prefill_tokens`; all three without evaluations; `evaluation`,
the trained model on each of evaluation.sets, sampled at temperature 1; and the `machine`. Counting needs the whole run in one
process: `run.py` begins an interrupted one anew.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from benchmarks.result_file import machine
from megatron_rl import config as configuration
from megatron_rl.answering import EVALUATION_IDS
from megatron_rl.config import Config
from megatron_rl.evaluate import evaluate
from megatron_rl.loop import train
from megatron_rl.rollout.engines.embedded import runner
from megatron_rl.rollout.engines.embedded.scheduler import Plan, Scheduler
from megatron_rl.run_folder import write_atomically

RESPONSES = 640  # to each set
PACKAGES = ("torch", "megatron-core", "transformers")


def counted(config: Config) -> dict[str, int]:
    """Counts that grow from now on: every engine of this process plans with a scheduler that counts."""
    counts = {"steps": 0, "rows": 0, "prefill_tokens": 0}
    sizes = config.rollout.embedded.batch_sizes

    class Counted(Scheduler):
        def plan(self) -> Plan:
            plan = super().plan()
            work = [*plan.decode, *(piece.trajectory for piece in plan.prefill)]
            if all(trajectory.request.trajectory_id < EVALUATION_IDS for trajectory in work):
                counts["steps"] += 1
                counts["rows"] += next(size for size in sizes if size >= len(plan.decode)) if plan.decode else 0
                counts["prefill_tokens"] += sum(piece.end - piece.start for piece in plan.prefill)
            return plan

    runner.Scheduler = Counted
    return counts


def scores(config: Config, model: Path) -> dict[str, dict[str, object]]:
    """Of a model folder on each of evaluation.sets, by its name."""
    sampled = config.model_copy(update={"rollout": config.rollout.model_copy(update={"temperature": 1.0})})
    found = {}
    for name, path in zip(config.evaluation.names, config.evaluation.sets, strict=True):
        samples = max(1, RESPONSES // len(Path(path).read_text(encoding="utf-8").splitlines()))
        found[name] = evaluate(sampled, model, split=path, greedy=False, samples=samples)
    return found


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    config = configuration.load(sys.argv[1], sys.argv[2:])
    counts = counted(config)
    if code := train(config):
        sys.exit(code)
    outcome = {**counts, "evaluation": scores(config, config.run.folder / "hf"), "machine": machine(PACKAGES)}
    write_atomically(config.run.folder / "outcome.json", json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main()
