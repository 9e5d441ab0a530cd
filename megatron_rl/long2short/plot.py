"""Tokens against accuracy of several models (paper, figure 7), one panel for each set they were evaluated on.

A result is what `megatron-rl eval` prints. Refuses files of another form, and results that cannot be compared because they
are of different prompts. Drawing: `report/charts.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.report.charts import Point, scatter
from megatron_rl.report.style import SCRIPT, style
from megatron_rl.run_folder import write_atomically

FIELDS = ("split", "n", "mean", "low", "high", "mean_tokens")
ABOUT = "Mean tokens of a response against pass@1, with its 95 % bootstrap interval over prompts; up and to the left is better."


@dataclass(frozen=True)
class Result:
    name: str  # of the model, beside its point
    evaluation: Mapping[str, Any]  # the fields of evaluate.Evaluation


def read_result(path: Path) -> Result:
    """From a file with the output of `megatron-rl eval`; its name without ending is the model's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot read it as JSON ({e}); give files that `megatron-rl eval ... > FILE` wrote") from e
    if isinstance(found, dict) and isinstance(found.get("greedy"), dict):
        raise DataError(f"{path}: holds a greedy and a sampled evaluation; give files of one, from `eval ... --sampled > FILE`")
    if not isinstance(found, dict) or (missing := [name for name in FIELDS if name not in found]):
        lacks = f"lacks {', '.join(missing)}" if isinstance(found, dict) else f"is a {type(found).__name__}"
        raise DataError(f"{path}: {lacks}; give files that `megatron-rl eval ... > FILE` wrote")
    return Result(path.stem, found)


def write_plot(results: Sequence[Result], out: Path) -> None:
    """out: a .html or .svg file. Raises ConfigError for another ending, DataError for results of different prompts."""
    if out.suffix not in (".html", ".svg"):
        raise ConfigError(f"--out {out}: must end with .html or .svg")
    sets: dict[str, list[Result]] = {}
    for result in results:
        sets.setdefault(result.evaluation["split"], []).append(result)
    for name, members in sets.items():
        if len(counts := sorted({r.evaluation["n"] for r in members})) > 1:
            raise DataError(f"set {name}: results of {counts} prompts; evaluate all models on the same ones")
    colours = {name: i % 7 for i, name in enumerate(dict.fromkeys(r.name for r in results))}
    panels = {
        name: scatter([_point(r, colours[r.name]) for r in members], "tokens of a response", "pass@1")
        for name, members in sets.items()
    }
    write_atomically(out, (_svg if out.suffix == ".svg" else _page)(panels))


def _point(result: Result, colour: int) -> Point:
    e = result.evaluation
    return Point(result.name, e["mean_tokens"], e["mean"], e["low"], e["high"], colour)


def _page(panels: Mapping[str, str]) -> str:
    cards = "".join(f'<section class="card"><h2>{escape(name)}</h2>{chart}</section>' for name, chart in panels.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tokens and accuracy</title><style>{style()}</style>'
        f'</head><body><main><header><div class="kind">megatron_rl · long2short</div><h1>Tokens against accuracy</h1>'
        f'<p class="sub">{ABOUT}</p></header><div class="grid2">{cards}</div></main><div id="tip"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _svg(panels: Mapping[str, str]) -> str:
    """The panels below each other, for documents."""
    width, height, gap = 520, 300, 28
    body = "".join(
        f'<text class="label" x="10" y="{i * (height + gap) + 18}">{escape(name)}</text>'
        + chart.replace("<svg ", f'<svg x="0" y="{i * (height + gap) + gap}" width="{width}" height="{height}" ', 1)
        for i, (name, chart) in enumerate(panels.items())
    )
    whole = len(panels) * (height + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" width="{width}" height="{whole}">'
        f'<style>{style()}</style><rect width="{width}" height="{whole}" style="fill:var(--card)"/>{body}</svg>\n'
    )
