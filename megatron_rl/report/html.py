"""report.html: one file that shows a whole run, with nothing to fetch and nothing to install.

This puts the page together; what is on it: `sections.py` and `samples.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from megatron_rl.report import sections
from megatron_rl.report.charts import number
from megatron_rl.report.run_data import RunData, Trained, read_run
from megatron_rl.report.samples import samples_card
from megatron_rl.report.style import SCRIPT, style
from megatron_rl.run_folder import write_atomically

FILE_NAME = "report.html"


def write_report(run_folder: str | Path) -> Path:
    """Write, or replace, the report of a run, also while it goes on. Returns the file.

    Raises DataError when the folder is not a run's, BufferFileError when its replay buffer cannot be read."""
    run = read_run(run_folder)
    path = run.folder / FILE_NAME
    write_atomically(path, page(run))
    return path


def page(run: RunData) -> str:
    cards = (
        sections.reward_card(run),
        sections.length_card(run),
        sections.evaluation_curve_card(run),
        sections.evaluation_card(run),
        sections.success_card(run),
        sections.phases_card(run),
        sections.tokens_card(run),
        sections.endings_card(run),
        sections.staleness_card(run),
        sections.mismatch_card(run),
        sections.kv_card(run),
        sections.shared_gpu_card(run),
        sections.conservation_card(run),
        sections.config_card(run),
        samples_card(run),
        sections.others_card(run),
    )
    name = escape(run.folder.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · megatron_rl</title><style>{style()}</style></head><body><main>{_header(run, name)}{_tiles(run)}"
        f'<div class="grid2">{"".join(cards)}</div></main><div id="tip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _header(run: RunData, name: str) -> str:
    c = run.config
    source = c.data.set or c.data.task or (c.data.path.name if c.data.path else c.data.source)
    facts = [
        f"model {c.model.folder.name}",
        f"prompts {source}",
        f"{c.rollout.groups_per_iteration} groups of {c.rollout.group_size} an iteration",
        f"budget {c.rollout.token_budget:,} of {c.rollout.max_response_tokens:,} tokens",
        f"{c.algorithm.name.replace('_', ' ')}, tau {c.algorithm.tau:g}",
        f"learning rate {c.training.optimizer.lr:g}",
    ]
    about = f'<p class="sub">{escape(" · ".join(facts))}</p>'
    return f'<header><div class="kind">megatron_rl · run report</div><h1>{name}</h1>{about}</header>'


def _tiles(run: RunData) -> str:
    early, late = sections.quarters(run)
    tiles = [("correct, first to last quarter", _change(_correct(early), _correct(late)))]
    before, after = (run.evaluation.get(moment, {}).get("mean") for moment in ("before", "after"))
    if before is not None and after is not None:
        tiles.append(("correct on held-out prompts", _change(before, after)))
    total = run.config.run.iterations
    done = min(run.rows[-1]["iteration"] + 1, total) if run.rows else 0  # the last row may hold an evaluation alone
    tiles.append(("iterations", f"{done} <em>of {total}</em>"))
    trained = sum(t.num_tokens for t in run.trained)
    tiles.append(("response tokens trained on", number(trained)))
    if run.trained:
        mixed = fmean(t.num_versions > 1 for t in run.trained)
        tiles.append(("trained with several weight versions", f"{mixed:.0%} <em>of {number(len(run.trained))}</em>"))
    seconds = [_seconds(row) for row in run.rows if "time/rollout_s" in row]
    if seconds:
        tiles.append(("an iteration, mean", f"{fmean(seconds):.3g} <em>s</em>"))
    cells = (f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "–"
    css = "up" if after > before else "down" if after < before else ""
    return f'<em>{before:.2f} →</em> <span class="{css}">{after:.2f}</span>'


def _correct(trained: Sequence[Trained]) -> float | None:
    return fmean(t.correct for t in trained) if trained else None


def _seconds(row: dict) -> float:
    return sum(v for k, v in row.items() if k.startswith("time/") and k.endswith("_s") and v is not None)
