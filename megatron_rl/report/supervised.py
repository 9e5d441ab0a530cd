"""report.html of a supervised run: its loss, learning rate and whatever else its metrics hold, from metrics.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from megatron_rl import config as configuration
from megatron_rl.config import DPOConfig, SFTConfig, SupervisedConfig
from megatron_rl.errors import DataError
from megatron_rl.report import charts
from megatron_rl.report.charts import Line
from megatron_rl.report.metrics import Row, read_metrics
from megatron_rl.report.style import SCRIPT, style
from megatron_rl.run_folder import kind_of, write_atomically

FILE_NAME = "report.html"
COURSE = "course.json"
FIRST = ("loss", "lr", "accuracy", "margin", "grad_norm")  # the order of the charts; others follow
WINDOW = 20  # steps of the moving average


def write_course(folder: Path, facts: Mapping[str, int | str]) -> None:
    """What a run goes through: steps, examples, examples left out."""
    write_atomically(folder / COURSE, json.dumps(facts, indent=2) + "\n")


def write_supervised_report(folder: str | Path) -> Path:
    """Write, or replace, the report of a run. Returns the file. Raises DataError for a folder without a run."""
    folder = Path(folder)
    if not (folder / COURSE).is_file():
        raise DataError(f"{folder}: not the folder of a supervised run ({COURSE} is missing)")
    root = {root.kind: root for root in (SFTConfig, DPOConfig)}[kind_of(folder)]
    config = configuration.load_supervised(root, folder / "config.yaml", [f"run.folder={json.dumps(str(folder))}"])
    course = json.loads((folder / COURSE).read_text(encoding="utf-8"))
    write_atomically(folder / FILE_NAME, _page(config, read_metrics(folder), course))
    return folder / FILE_NAME


def _page(config: SupervisedConfig, rows: list[Row], course: Mapping[str, int]) -> str:
    found = {key for row in rows for key in row} - {"iteration", "stage", "epoch"}
    keys = [key for key in FIRST if key in found] + sorted(found - set(FIRST))
    name = escape(config.run.folder.resolve().name)
    tokens = sum(row["tokens/trained"] for row in rows)
    facts = f"model {config.model.folder.name} · {len(config.stages)} stage{'s' if len(config.stages) > 1 else ''}"
    tiles = [
        ("steps", f"{len(rows)} <em>of {course['steps']}</em>"),
        ("examples", charts.number(course["examples"])),
        ("tokens that bore loss", charts.number(tokens)),
        ("examples too long, left out", charts.number(course["dropped"])),
    ]
    if rows:
        tiles.insert(0, ("loss, first and last step", f"<em>{_fixed(rows[0]['loss'])} →</em> {_fixed(rows[-1]['loss'])}"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{title}</span></div>' for title, value in tiles)
    cards = "".join(_card(key, rows) for key in keys)
    settings = f"<pre>{escape(configuration.dump(config))}</pre>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · megatron_rl</title><style>{style()}</style></head><body><main>"
        f'<header><div class="kind">megatron_rl · supervised run</div><h1>{name}</h1><p class="sub">{escape(facts)}</p></header>'
        f'<div class="tiles">{cells}</div><div class="grid2">{cards}</div>'
        f'<section class="card wide"><h2>Configuration</h2>{settings}</section>'
        f'</main><div id="tip"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _card(key: str, rows: list[Row]) -> str:
    values = [row.get(key) for row in rows]
    lines = [Line(key, values, 0)]
    if len(rows) > 2 * WINDOW and key != "lr":
        lines = [Line(key, values, 0, faint=True), Line(f"mean of {WINDOW}", charts.moving_average(values, WINDOW), 0)]
    chart = charts.line_chart([row["iteration"] for row in rows], lines)
    return f'<section class="card"><h2>{escape(key)}</h2><p class="note">of each optimizer step</p>{chart}</section>'


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
