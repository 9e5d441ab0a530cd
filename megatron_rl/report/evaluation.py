"""An evaluation as a table and as a page, and `evaluation.json` of a run folder: what the held-out prompts said of the model
before and after training.

The file is `{"before": {...}, "after": {...}}`, each the result of one greedy evaluation, with `sampled_mean`, `sampled_low` and
`sampled_high` from a sampled one. How they are measured: `megatron_rl/evaluate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_rl.errors import DataError
from megatron_rl.report.charts import interval
from megatron_rl.report.style import style
from megatron_rl.run_folder import write_atomically

FILE_NAME = "evaluation.json"
MOMENTS = ("before", "after")


def read_evaluation(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Empty when nothing was evaluated. Raises DataError for a file of another form."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e}); evaluate again, or remove the file") from e
    if not isinstance(found, dict) or not all(isinstance(result, dict) for result in found.values()):
        raise DataError(f"{path}: expected an object with `before` and `after`; evaluate again, or remove the file")
    return {moment: found[moment] for moment in MOMENTS if moment in found}


def record_evaluation(folder: str | Path, moment: str, result: Mapping[str, Any]) -> None:
    """Add one result under `before` or `after`; a sampled one joins the greedy one of the same moment."""
    results = read_evaluation(folder)
    if result["greedy"]:
        entry = {**results.get(moment, {}), **result}
    else:
        sampled = {f"sampled_{key}": result[key] for key in ("mean", "low", "high", "samples")}
        entry = {"model": result["model"], "n": result["n"], **results.get(moment, {}), **sampled}
    write_atomically(Path(folder) / FILE_NAME, json.dumps({**results, moment: entry}, indent=2) + "\n")


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """One evaluation for the terminal."""
    table = Table(f"{result['split']}, {_way(result)}", "mean", "95 % interval", box=None, pad_edge=False)
    for score in result["scores"]:
        table.add_row(score["name"], f"{score['mean']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}")
    table.add_row("tokens", f"{result['mean_tokens']:.1f}", "")
    return table


def evaluation_page(result: Mapping[str, Any]) -> str:
    """One evaluation as a page of its own, with nothing to fetch."""
    rows = "".join(
        f'<tr><td>{escape(s["name"])}</td><td class="n">{s["mean"]:.3f}</td><td>{interval(s["mean"], s["low"], s["high"])}</td>'
        f'<td class="n">{s["low"]:.3f} to {s["high"]:.3f}</td></tr>'
        for s in result["scores"]
    )
    facts = (
        f"{result['split']}: {result['n']} prompts, {result['samples']} responses each, {_way(result)}, "
        f"{result['mean_tokens']:.1f} tokens a response"
    )
    name = escape(str(result["model"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name} · evaluation</title><style>{style()}</style>'
        f'</head><body><main><header><div class="kind">megatron_rl · evaluation</div><h1>{name}</h1><p class="sub">'
        f'{escape(facts)}</p></header><section class="card"><table><tr><th></th><th class="n">mean</th><th></th>'
        f'<th class="n">95 % interval</th></tr>{rows}</table></section></main></body></html>\n'
    )


def _way(result: Mapping[str, Any]) -> str:
    return "greedy" if result["greedy"] else f"temperature {result['temperature']:g}"
