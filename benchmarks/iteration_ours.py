"""Our side of `iteration_vs_trl.py`: whole iterations through buffer, engine, rewards, Megatron-Core and publish, as
`loop.py` does them with one optimizer step. Prints one JSON object. End of text is ignored, so lengths are forced.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_rl import config as configuration
from megatron_rl.run import Run, open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path, help="JSON written by iteration_vs_trl.py")
    job = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))
    seconds, tokens = [], []
    with open_run(configuration.load(write_config(job))) as run:
        master = run.master
        assert master is not None, "one rank is rank 0"
        master.rollout.sampling = replace(master.rollout.sampling, stop_token_ids=())
        prompts = {p.messages[-1].content: p.token_ids.tolist() for p in master.prompts.train}
        for iteration in range(job["iterations"]):
            start = time.perf_counter()
            tokens.append(iterate(run, iteration))
            seconds.append(time.perf_counter() - start)
    found = {
        "seconds": seconds,
        "prompt_ids": [prompts[p["messages"][-1]["content"]] for p in job["prompts"]],
        "completion_tokens": tokens,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


def iterate(run: Run, iteration: int) -> int:
    """Generate and score, one optimizer step, new weights to the engine; returns the number of response tokens."""
    assert run.master is not None
    with run.master.phase("rollout"):
        groups = run.master.batch(iteration, run.version)
    batch = run.trainer.distribute(run.master.sequences(groups, run.iteration, run.version))
    run.trainer.step(batch, run.objective, None)
    run.publish(run.version + 1)
    return sum(t.num_tokens for group in groups for t in group.trajectories)


def write_config(job: dict[str, Any]) -> Path:
    scratch = Path(job["scratch"])
    lines = [json.dumps({"messages": p["messages"], "answer": p["answer"]}) for p in job["prompts"]]
    (scratch / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    groups, length = len(job["prompts"]), job["response_tokens"]
    settings = {
        "run": {"folder": str(scratch / "run"), "iterations": job["iterations"], "threads": job["threads"]},
        "model": {"folder": job["model"], "dtype": job["dtype"]},
        "data": {"source": "jsonl", "path": str(scratch / "prompts.jsonl"), "max_prompt_tokens": 256},
        "rollout": {
            "group_size": job["group_size"],
            "groups_per_iteration": groups,
            "max_open_groups": groups,
            "token_budget": length,
            "max_response_tokens": length,
            "repetition": {"enabled": False},
        },
        "rewards": {"terms": [{"name": "exact", "options": {"prefix": "Answer:"}}]},
        "training": {"minibatches": 1, "optimizer": {"lr": 1e-6}},
        "report": {"tensorboard": False},
    }
    path = scratch / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
