"""A made-up run folder: metrics, replay buffer and evaluation, in the shape that a real run leaves.

Its policy gets better over the iterations; some trajectories are cut by the token budget and finished a version later.
As a script, `python tests/report/make_run.py FOLDER TOKENIZER_FOLDER ITERATIONS`, it makes a run to look at.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rl.config import dump, load
from megatron_rl.report.metrics import MetricsLog
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.types import DropReason, Ending, Group, Message, Outcome, OutcomeKind, Prompt

GROUP_SIZE = 4
GROUPS = 3
BUDGET = 24
CONFIG = """
run: {folder: FOLDER, iterations: ITERATIONS}
model: {folder: MODEL}
data: {source: reasoning_gym, task: basic_arithmetic, held_out: 200}
rollout: {group_size: 4, groups_per_iteration: 3, token_budget: 24, max_response_tokens: 96}
report: {tensorboard: false}
training: {optimizer: {lr: 5.0e-6}}
"""


def make_run(folder: Path, model: Path, iterations: int = 8, *, seed: int = 0) -> Path:
    """The last iteration leaves trajectories waiting, one dropped and one group whose reward failed."""
    folder.mkdir(parents=True)
    text = CONFIG.replace("FOLDER", str(folder)).replace("MODEL", str(model)).replace("ITERATIONS", str(max(1, iterations)))
    (folder / "source.yaml").write_text(text)
    (folder / "config.yaml").write_text(dump(load(folder / "source.yaml")))
    (folder / "source.yaml").unlink()
    rng, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(model)
    buffer, metrics = ReplayBuffer(folder / "buffer.sqlite", "run-1"), MetricsLog(folder, tensorboard=False)
    waiting: list[Group] = []
    for iteration in range(iterations):
        with buffer.transaction():
            row = _iteration(buffer, tokenizer, rng, iteration, waiting, iteration / iterations)
        metrics.write({"iteration": iteration, "weight_version": iteration + 1, **row})
    with buffer.transaction():
        failed = _draw(buffer, tokenizer, rng, max(0, iterations - 1)).trajectories[0].id
        buffer.drop([failed], DropReason.REWARD, max(0, iterations - 1))
    buffer.check()
    buffer.close()
    _evaluate(folder, model)
    return folder


def _iteration(
    buffer: ReplayBuffer, tokenizer: PreTrainedTokenizerFast, rng: random.Random, i: int, waiting: list[Group], skill: float
) -> dict[str, float]:
    """Continue what waits, draw new groups, train on the complete ones. Returns the metrics."""
    fresh = [_draw(buffer, tokenizer, rng, i) for _ in range(GROUPS)]
    for group in buffer.groups([g.id for g in waiting + fresh]):
        for trajectory in group.trajectories:
            if trajectory.outcome is None:
                _generate(buffer, tokenizer, rng, group.prompt, trajectory.id, i, skill)
    complete = buffer.complete_groups()[:GROUPS]
    if complete:
        buffer.record_batch(i, [g.id for g in complete])
    waiting[:] = buffer.open_groups()
    members = [t for g in complete for t in g.trajectories]
    counts = {f"trajectories/{name}": count for name, count in buffer.counts(i).items()}
    times = {
        "rollout": 6 + rng.random(),
        "reference": 0.8,
        "train": 3 + rng.random(),
        "publish": 0.3,
        "checkpoint": 0.7 * (i % 5 == 4),
    }
    row = {f"time/{phase}_s": seconds for phase, seconds in times.items()} | counts
    row["tokens/generated"] = buffer.generated_tokens(i)
    if members:
        row |= {
            "reward/mean": float(np.mean([t.outcome.reward for t in members if t.outcome])),
            "reward/correct": float(np.mean([t.outcome.correct for t in members if t.outcome])),
            "length/mean": float(np.mean([t.num_tokens for t in members])),
            "tokens/trained": sum(t.num_tokens for t in members),
            "staleness/mean": float(np.mean([i - t.weight_versions.mean() for t in members])),
            "mismatch/logp_abs_mean": 0.004 + 0.001 * rng.random(),
            "drift/logp_abs_mean": 0.02 + 0.01 * rng.random(),
            "loss/gradient_norm": 0.5 + rng.random(),
            "loss/entropy": 1.2 - 0.7 * skill + 0.1 * rng.random(),
        }
    return row


def _draw(buffer: ReplayBuffer, tokenizer: PreTrainedTokenizerFast, rng: random.Random, iteration: int) -> Group:
    digits = rng.choice([1, 2])
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    question, sign = f"Calculate {a} {{}} {b}.", rng.choice("+-")
    text = question.format(sign)
    answer = str(a + b if sign == "+" else a - b)
    messages = (Message("system", 'Work step by step, then reply "Answer: X".'), Message("user", text))
    tags = {"operator": {"+": "sum", "-": "difference"}[sign], "digits": str(digits)}
    ids = np.array(tokenizer.encode(text), np.int32)
    prompt = Prompt(text, messages, ids, answer, "exact", tags, difficulty=0.62 if digits == 1 else 0.25)
    return buffer.draw(prompt, GROUP_SIZE, iteration)


def _generate(
    buffer: ReplayBuffer,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    prompt: Prompt,
    trajectory_id: int,
    i: int,
    skill: float,
) -> None:
    """Its next segment: of a response that is fixed by the trajectory's id, at most BUDGET tokens."""
    before = buffer.trajectories([trajectory_id])[0].num_tokens
    own = random.Random(trajectory_id)
    correct = own.random() < (0.6 if prompt.tags["digits"] == "1" else 0.3) + 0.45 * skill
    answer = prompt.answer if correct else str(int(prompt.answer) + own.choice([-10, -2, -1, 1, 2, 10]))
    steps = own.choice(["", "", "First the ones, then the tens. ", "Let’s see: the digits add up in two steps, carry included. "])
    question = prompt.messages[1].content.removeprefix("Calculate ").rstrip(".")
    text = f"{steps}{question} = {answer}.\nAnswer: {answer}"
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_token_id], np.int32)[before : before + BUDGET]
    whole = before + len(ids) == len(tokenizer.encode(text)) + 1
    log_probs = np.array([-rng.expovariate(4) if rng.random() < 0.85 else -rng.expovariate(0.6) for _ in ids], np.float32)
    segment = buffer.open_segment(trajectory_id, i, i, 1.0, "embedded-0")
    buffer.append_chunk(segment, ids, log_probs, np.full(len(ids), i, np.int32))
    buffer.close_segment(segment, Ending.STOP if whole else Ending.BUDGET)
    if whole:
        buffer.set_outcome(trajectory_id, Outcome(OutcomeKind.VALUE, float(correct), correct, {"exact": float(correct)}))


def _evaluate(folder: Path, model: Path) -> None:
    before = {"model": str(model), "n": 200, "greedy": True, "mean": 0.47, "low": 0.40, "high": 0.54, "sampled_mean": 0.38}
    after = {
        "model": str(folder / "hf"),
        "n": 200,
        "greedy": True,
        "mean": 0.71,
        "low": 0.645,
        "high": 0.77,
        "sampled_mean": 0.66,
    }
    (folder / "evaluation.json").write_text(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
