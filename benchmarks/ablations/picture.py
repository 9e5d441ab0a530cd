"""An ablation's picture, SVG on a white ground: each arm's mean over its faint seeds (`draw`), or a point a model (`scatter`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from megatron_rl.report.charts import HEIGHT, WIDTH, Line, line_chart, moving_average

COLOURS = ("#2f6fde", "#e8833a", "#2c9f6b", "#9a5bd0", "#c94b5e", "#7d8592")  # of the arms, in order
TITLE, LEGEND, HEAD, FOOT = 28, 18, 26, 24  # heights of the title, a line of the legend, a panel's heading, the foot
STYLE = (
    ".grid{stroke:#e3e6eb}.axis{fill:#636c7c;font-size:11px}"
    ".line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}.faint{opacity:.3;stroke-width:1.2}"
    + "".join(f".s{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS))
)


@dataclass(frozen=True)
class Panel:
    """One metric: for each arm, one curve a seed, all of one length."""

    heading: str
    curves: Mapping[str, Sequence[Sequence[float]]]
    floor: float | None = None
    ceiling: float | None = None
    xs: Sequence[int] | None = None  # where the points lie, which then are drawn as they are; else 0, 1, 2, ... and averaged


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Of several seeds, point by point."""
    return [fmean(values) for values in zip(*curves, strict=True)]


def draw(title: str, panels: Sequence[Panel], foot: str, *, window: int = 5) -> str:
    """`window`: points averaged into each one that is drawn; `foot` should say seeds, iterations and what was cut."""
    legend, top = _legend(list(panels[0].curves))
    parts = [_text(14, 20, title, "#1b2130", 15, 600), *legend]
    for panel in panels:
        parts.append(_text(14, top + 16, panel.heading, "#1b2130", 12, 600))
        xs = panel.xs or range(len(next(iter(panel.curves.values()))[0]))
        chart = line_chart(xs, _lines(panel, 1 if panel.xs else window), **_bounds(panel))
        chart = re.sub(r'<rect class="hit"[^>]*/>', "", chart)  # areas for a pointer, which a picture does not have
        place = f'<svg x="0" y="{top + HEAD}" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(place + chart.removeprefix("<svg"))
        top += HEAD + HEIGHT
    parts.append(_text(14, top + 16, foot, "#636c7c", 11, 400))
    return _page(parts, top + FOOT)


def scatter(title: str, points: Mapping[str, Sequence[tuple[float, float]]], foot: str) -> str:
    """What each model needs and reaches: (tokens, share correct) of every seed, faint, and their mean with the model's name."""
    right = math.ceil(max(tokens for seeds in points.values() for tokens, _ in seeds)) + 5  # room for names
    x, y = (lambda tokens: 46 + tokens / right * (WIDTH - 60)), (lambda share: TITLE + LEGEND + 10 + (1 - share) * 230)
    parts = [_text(14, 20, title, "#1b2130", 15, 600), _text(14, 40, "correct, over tokens of a response", "#636c7c", 12, 400)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="46" x2="{WIDTH - 14}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(f'<text class="axis" x="39" y="{y(share) + 4:.1f}" text-anchor="end">{share:g}</text>')
    parts += [
        f'<text class="axis" x="{x(n):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{n}</text>' for n in range(0, right, 2)
    ]
    lowest = -math.inf
    for name, seeds in sorted(points.items(), key=lambda item: -fmean(share for _, share in item[1])):
        parts += [f'<circle cx="{x(n):.1f}" cy="{y(share):.1f}" r="3" fill="#2f6fde" opacity=".3"/>' for n, share in seeds]
        at = x(fmean(n for n, _ in seeds)), y(fmean(share for _, share in seeds))
        parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" fill="#2f6fde"/>')
        lowest = max(at[1] + 4, lowest + 14)  # names move down where they would overlap
        parts.append(_text(at[0] + 12, round(lowest, 1), name, "#1b2130", 12, 400))
    height = round(y(0)) + 50
    return _page([*parts, _text(14, height - 10, foot, "#636c7c", 11, 400)], height)


def _page(parts: Sequence[str], height: int) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif"><style>{STYLE}</style>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _lines(panel: Panel, window: int) -> list[Line]:
    lines = []
    for colour, (arm, curves) in enumerate(panel.curves.items()):
        lines += [Line(f"{arm}, seed", moving_average(curve, window), colour, faint=True) for curve in curves]
        lines.append(Line(arm, moving_average(mean_curve(curves), window), colour))
    return lines


def _bounds(panel: Panel) -> dict[str, float | None]:
    return {"floor": panel.floor, "ceiling": panel.ceiling}


def _legend(arms: Sequence[str]) -> tuple[list[str], int]:
    """The marks, and where they end; as many lines as they need."""
    x, y, parts = 14.0, TITLE, list[str]()
    for colour, arm in zip(COLOURS, arms, strict=False):
        width = 36 + 6.4 * len(arm)
        if x > 14 and x + width > WIDTH:
            x, y = 14.0, y + LEGEND
        parts.append(f'<rect x="{x}" y="{y + 2}" width="11" height="11" rx="3" fill="{colour}"/>')
        parts.append(_text(x + 16, y + 12, arm, "#636c7c", 12, 400))
        x += width
    return parts, y + LEGEND


def _text(x: float, y: float, content: str, colour: str, size: int, weight: int) -> str:
    return f'<text x="{x:.0f}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}">{escape(content)}</text>'
