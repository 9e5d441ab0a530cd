"""`megatron-rl inspect`: a run, a group or a trajectory as tables in the terminal, read while the run may go on.

The same facts with pictures: `html.py`.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.config import Config
from megatron_rl.errors import DataError
from megatron_rl.report.charts import number
from megatron_rl.report.metrics import read_metrics
from megatron_rl.report.run_data import open_buffer, run_config
from megatron_rl.report.samples import load_decoder
from megatron_rl.types import Outcome, OutcomeKind, Trajectory

RECENT = 10  # iterations shown
COLUMNS = (
    ("reward", "reward/mean"),
    ("correct", "reward/correct"),
    ("length", "length/mean"),
    ("generated", "tokens/generated"),
    ("trained on", "tokens/trained"),
    ("staleness", "staleness/mean"),
    ("mismatch", "mismatch/logp_abs_mean"),
)


def show_run(folder: Path, console: Console) -> None:
    """Conservation table, counts and the last iterations. Checks no law by itself: `ReplayBuffer.check` does."""
    config = run_config(folder)
    rows = read_metrics(folder)
    with open_buffer(config) as buffer:
        terms, drawn, open_groups = buffer.conservation(), buffer.num_drawn, len(buffer.open_groups())
        mixed, run_id, lineage = buffer.mixed_version_share(), buffer.run_id, buffer.lineage
    done = min(rows[-1]["iteration"] + 1, config.run.iterations) if rows else 0
    facts = Table(show_header=False, box=None)
    facts.add_row("run", f"{folder} ({run_id})")
    facts.add_row("iterations", f"{done} of {config.run.iterations}")
    facts.add_row("groups", f"{drawn:,} drawn, {open_groups:,} unfinished, of {config.rollout.group_size} trajectories each")
    facts.add_row(
        "several weight versions", "no trained trajectory yet" if mixed is None else f"{mixed:.1%} of the trained trajectories"
    )
    if lineage:
        facts.add_row("lineage", f"{lineage}: resumes whose replay was not bit-exact")
    console.print(facts)
    table = Table(title="Conservation", title_justify="left")
    table.add_column("term")
    table.add_column("count", justify="right")
    table.add_column("unit")
    for term in terms:
        table.add_row(term.name, f"{term.count:,}", term.unit)
    console.print(table)
    if rows:
        recent = Table(
            "iteration", "version", *(name for name, _ in COLUMNS), "seconds", title="Last iterations", title_justify="left"
        )
        for column in recent.columns:
            column.justify = "right"
        for row in rows[-RECENT:]:
            seconds = sum(v for k, v in row.items() if k.startswith("time/") and v is not None)
            cells = [number(row.get(key)) for _, key in COLUMNS]
            recent.add_row(str(row["iteration"]), str(row.get("weight_version", "–")), *cells, number(seconds))
        console.print(recent)


def show_group(folder: Path, group_id: int, console: Console) -> None:
    """The prompt and all members, dropped ones too. Raises DataError for an id that was never drawn."""
    config = run_config(folder)
    with open_buffer(config) as buffer:
        statuses = buffer.statuses(group_id)
        if not statuses:
            raise DataError(f"group {group_id}: not in {config.buffer_path}; {_range(buffer.num_drawn)}")
        prompt = buffer.groups([group_id])[0].prompt
        members = buffer.trajectories([status.id for status in statuses])
    console.print(
        Text.assemble(("group ", "bold"), (str(group_id), "bold"), f"  prompt {prompt.id}, {len(prompt.token_ids)} tokens")
    )
    for message in prompt.messages:
        console.print(Text.assemble((f"{message.role}: ", "cyan"), message.content))
    console.print(Text.assemble(("right answer: ", "cyan"), prompt.answer))
    tags = ", ".join(f"{key} {value}" for key, value in prompt.tags.items())
    console.print(Text(f"verifier {prompt.verifier}{', ' + tags if tags else ''}"))
    table = Table("trajectory", "state", "reward", "tokens", "versions", "segments end as")
    for status, trajectory in zip(statuses, members, strict=True):
        state = status.state + (f": {status.dropped_reason}" if status.dropped_reason else "")
        versions = ", ".join(str(v) for v in sorted({s.weight_version for s in trajectory.segments}))
        endings = ", ".join(s.ending for s in trajectory.segments)
        table.add_row(str(status.id), state, _reward(trajectory.outcome), str(trajectory.num_tokens), versions, endings)
    console.print(table)


def show_trajectory(folder: Path, trajectory_id: int, console: Console) -> None:
    """All its segments with their text. Raises DataError for an id that was never drawn."""
    config = run_config(folder)
    with open_buffer(config) as buffer:
        found = buffer.trajectories([trajectory_id])
        if not found:
            size = config.rollout.group_size
            raise DataError(f"trajectory {trajectory_id}: not in {config.buffer_path}; {_range(buffer.num_drawn * size)}")
        trajectory = found[0]
        status = next(s for s in buffer.statuses(trajectory.group_id) if s.id == trajectory_id)
        prompt = buffer.groups([trajectory.group_id])[0].prompt
    state = status.state + (f": {status.dropped_reason}" if status.dropped_reason else "")
    title = f"  group {trajectory.group_id}, {state}, {trajectory.num_tokens} tokens"
    console.print(Text.assemble((f"trajectory {trajectory_id}", "bold"), title))
    question = next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")
    console.print(Text.assemble(("prompt: ", "cyan"), question))
    console.print(Text.assemble(("right answer: ", "cyan"), prompt.answer))
    console.print(Text.assemble(("reward: ", "cyan"), _reward(trajectory.outcome), _terms(trajectory.outcome)))
    console.print(_segments(config, trajectory))


def _segments(config: Config, trajectory: Trajectory) -> Table:
    decoder = load_decoder(config)
    table = Table("segment", "iteration", "version", "lineage", "engine", "ending", "tokens", "mean log-prob", "text")
    table.columns[-1].overflow = "fold"
    for i, s in enumerate(trajectory.segments):
        ids = s.token_ids.tolist()
        text = " ".join(map(str, ids)) if decoder is None else decoder.decode(ids, skip_special_tokens=False)
        mean = f"{s.log_probs.mean():.3f}" if len(ids) else "–"
        facts = (str(i), str(s.iteration), str(s.weight_version), str(s.lineage), s.engine, str(s.ending), str(len(ids)), mean)
        table.add_row(*facts, Text(text))
    return table


def _reward(outcome: Outcome | None) -> str:
    if outcome is None:
        return "–"
    if outcome.kind is OutcomeKind.FAILED:
        return f"failed: {outcome.detail}"
    return number(outcome.reward) + (" (wrong format)" if outcome.kind is OutcomeKind.WRONG_FORMAT else "")


def _terms(outcome: Outcome | None) -> str:
    return "".join(f", {name} {number(value)}" for name, value in outcome.terms.items()) if outcome else ""


def _range(count: int) -> str:
    return f"it holds 0 to {count - 1}" if count else "nothing was drawn yet"
