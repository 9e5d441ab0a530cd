"""Charts as inline SVG: pure functions from numbers to markup, drawn with the page's colours (`style.py`).

Absent values (None) leave a gap. Every chart names its values under the pointer through `data-t`. What is charted:
`sections.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins around the plotting area
MAX_BARS = 100  # more iterations than this are averaged into bars of several
MAX_HITS = 200  # areas that answer the pointer

Value = float | None


@dataclass(frozen=True)
class Line:
    """One series over the chart's x values. `colour`: number of a page colour; `faint`: raw data behind its average;
    `low`, `high`: an interval around each value, drawn as a band."""

    name: str
    values: Sequence[Value]
    colour: int = 0
    faint: bool = False
    low: Sequence[Value] = ()
    high: Sequence[Value] = ()


@dataclass(frozen=True)
class Point:
    """One model in a scatter plot, with the interval of its y value."""

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: int = 0


def moving_average(values: Sequence[Value], window: int) -> list[Value]:
    """Mean of the present values among the last `window`; None while there is none."""
    means: list[Value] = []
    for i in range(len(values)):
        present = [v for v in values[max(0, i + 1 - window) : i + 1] if v is not None]
        means.append(fmean(present) if present else None)
    return means


def line_chart(
    xs: Sequence[int], lines: Sequence[Line], *, floor: Value = None, ceiling: Value = None, height: int = HEIGHT
) -> str:
    """Lines over iterations. The y axis holds all values; `floor` and `ceiling` too, where given."""
    present = [v for line in lines for v in (*line.values, *line.low, *line.high) if v is not None]
    if not present:
        return _nothing()
    low, high, ticks = _axis(min([*present, *_given(floor)]), max([*present, *_given(ceiling)]))
    x, y = _x_scale(xs), _y_scale(low, high, height)
    body = [_grid(ticks, y), _x_labels(xs, x, height)]
    at = [x(i) for i in xs]
    body += [_band(line, at, y) for line in lines] + [_path(line, at, y) for line in lines]
    body.append(_hits(xs, x, height, lambda i: _values_at(i, xs, lines)))
    return _svg("".join(body), height)


def scatter(points: Sequence[Point], x_name: str, y_name: str, *, height: int = 300) -> str:
    """Named points with their intervals; both axes hold all of them."""
    if not points:
        return _nothing()
    x_low, x_high, x_ticks = _axis(min(p.x for p in points), max(p.x for p in points))
    low, high, ticks = _axis(min(p.low for p in points), max(p.high for p in points))
    y, step = _y_scale(low, high, height), x_ticks[1] - x_ticks[0]

    def x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    body = [_grid(ticks, y)]
    body += [
        f'<text class="axis" x="{x(t):.1f}" y="{height - 7}" text-anchor="middle">{_tick(t, step)}</text>' for t in x_ticks[1:-1]
    ]
    body.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{height - 7}" text-anchor="end">{escape(x_name)}</text>')
    body.append(f'<text class="axis" x="{LEFT + 4}" y="{TOP + 4}">{escape(y_name)}</text>')
    for p in points:
        right = x(p.x) < LEFT + 0.7 * (WIDTH - LEFT - RIGHT)  # else its name would leave the chart
        text = f"{p.name}\n{x_name}: {number(p.x)}\n{y_name}: {p.y:.3f} ({p.low:.3f} to {p.high:.3f})"
        body.append(
            f'<g data-t="{tooltip(text)}">'
            f'<line class="s{p.colour} faint" x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
            f'<circle class="f{p.colour}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="5"/>'
            f'<text class="label" x="{x(p.x) + (9 if right else -9):.1f}" y="{y(p.y) - 7:.1f}" '
            f'text-anchor="{"start" if right else "end"}">{escape(p.name)}</text></g>'
        )
    return _svg("".join(body), height)


def stacked_bars(
    xs: Sequence[int], layers: Mapping[str, Sequence[Value]], unit: str, *, colours: Sequence[int] | None = None
) -> str:
    """One bar an iteration, from the bottom up in the order of `layers`; averaged where there are too many to draw."""
    if not xs or not any(v for values in layers.values() for v in values):
        return _nothing()
    width = math.ceil(len(xs) / MAX_BARS)
    bins = [range(start, min(start + width, len(xs))) for start in range(0, len(xs), width)]
    bars = [{name: fmean(values[i] or 0.0 for i in indices) for name, values in layers.items()} for indices in bins]
    low, high, ticks = _axis(0.0, max(sum(bar.values()) for bar in bars))
    y = _y_scale(low, high, HEIGHT)
    plot = WIDTH - LEFT - RIGHT
    step = plot / len(bars)
    gap = min(2.0, step * 0.2)
    body = [_grid(ticks, y)]
    palette = list(colours or range(len(layers)))
    for i, (indices, bar) in enumerate(zip(bins, bars, strict=True)):
        bottom, span = 0.0, _span([xs[j] for j in indices])
        text = [f"iteration {span}", *(f"{name}: {number(v)} {unit}" for name, v in bar.items() if v)]
        body.append(f'<g data-t="{tooltip(chr(10).join(text))}">')
        for colour, value in zip(palette, bar.values(), strict=True):
            if value > 0:
                top = y(bottom + value)
                body.append(
                    f'<rect class="f{colour}" x="{LEFT + i * step + gap / 2:.1f}" y="{top:.1f}" '
                    f'width="{step - gap:.1f}" height="{y(bottom) - top:.1f}"/>'
                )
            bottom += value
        body.append("</g>")
    body.append(_x_labels(xs, lambda value: LEFT + ((value - xs[0]) / (xs[-1] - xs[0] + 1)) * plot + step / width / 2, HEIGHT))
    return _svg("".join(body), HEIGHT)


def dumbbells(rows: Sequence[tuple[str, Value, Value, str]], before: str, after: str) -> str:
    """One row a category: (name, value before, value after, note), values in 0..1; a line joins the two."""
    if not rows:
        return _nothing()
    left, right, row_height = 170, 60, 26
    height = row_height * len(rows) + 26
    body = []

    def x(value: float) -> float:
        return left + value * (WIDTH - left - right)

    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 22}"/>')
        body.append(f'<text class="axis" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for i, (name, first, last, note) in enumerate(rows):
        y = row_height * i + row_height / 2 + 4
        text = [name, f"{before}: {_percent(first)}", f"{after}: {_percent(last)}", note]
        body.append(
            f'<g data-t="{tooltip(chr(10).join(text))}"><rect class="hit" x="0" y="{y - 12}" width="{WIDTH}" height="24"/>'
        )
        shown = name if len(name) <= 26 else name[:25] + "…"
        body.append(f'<text class="label" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}</text>')
        if first is not None and last is not None:
            body.append(f'<line class="join" x1="{x(first):.1f}" x2="{x(last):.1f}" y1="{y}" y2="{y}"/>')
            body.append(f'<text class="axis" x="{WIDTH - right + 12}" y="{y + 4:.1f}">{last - first:+.2f}</text>')
        if first is not None:
            body.append(f'<circle class="hollow" cx="{x(first):.1f}" cy="{y}" r="5"/>')
        if last is not None:
            body.append(f'<circle class="f0" cx="{x(last):.1f}" cy="{y}" r="5.5"/>')
        body.append("</g>")
    return _svg("".join(body), height)


def interval(mean: float, low: float, high: float) -> str:
    """A mean within its interval on 0..1, for a table cell."""
    left, centre, right = (4 + value * 152 for value in (low, mean, high))
    return (
        '<svg class="cell" viewBox="0 0 160 16" role="img"><line class="grid" x1="4" x2="156" y1="8" y2="8"/>'
        f'<line class="join" x1="{left:.1f}" x2="{right:.1f}" y1="8" y2="8"/>'
        f'<circle class="f0" cx="{centre:.1f}" cy="8" r="4.5"/></svg>'
    )


def share_bar(parts: Sequence[tuple[str, float, int]]) -> str:
    """One horizontal bar of (name, count, colour), in proportion."""
    total = sum(count for _, count, _ in parts)
    if total <= 0:
        return _nothing()
    cells = [
        f'<i class="b{colour}" style="flex:{count:g}" data-t="{tooltip(f"{name}: {number(count)} ({count / total:.1%})")}"></i>'
        for name, count, colour in parts
        if count
    ]
    return f'<div class="share">{"".join(cells)}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(name, CSS class of its mark)"""
    marks = (f'<span><i class="mark {escape(css)}"></i>{escape(name)}</span>' for name, css in entries)
    return f'<div class="legend">{"".join(marks)}</div>'


def tooltip(text: str) -> str:
    """As the value of an attribute, which keeps its lines."""
    return escape(text).replace("\n", "&#10;")


def number(value: float | None) -> str:
    """Short, at most four significant digits; large counts with a unit prefix."""
    if value is None:
        return "–"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if prefix == 'k' else size):.3g}{prefix}"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _values_at(i: int, xs: Sequence[int], lines: Sequence[Line]) -> str:
    rows = [f"{line.name}: {number(line.values[i])}" for line in lines if line.values[i] is not None]
    return "\n".join([f"iteration {xs[i]}", *rows])


def _given(value: Value) -> list[float]:
    return [] if value is None else [value]


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round bounds around [low, high] and about four ticks."""
    largest = max(abs(low), abs(high))
    if high - low <= 1e-6 * largest or largest == 0:  # as good as constant
        pad = 0.1 * largest or 1.0
        low, high = (0.0, high + pad) if low >= 0 else (low - pad, high + pad)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    ticks = [i * step for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]
    return ticks[0], ticks[-1], ticks


def _tick(value: float, step: float) -> str:
    if step >= 1000 or step < 1e-3:
        return number(value)
    return f"{value:,.{max(0, 1 - math.floor(math.log10(step)))}f}".rstrip("0").rstrip(".") if step < 10 else f"{value:,.0f}"


def _x_scale(xs: Sequence[int]) -> Callable[[float], float]:
    span = max(1, xs[-1] - xs[0])
    return lambda value: LEFT + (value - xs[0]) / span * (WIDTH - LEFT - RIGHT)


def _y_scale(low: float, high: float, height: int) -> Callable[[float], float]:
    return lambda value: height - BOTTOM - (value - low) / (high - low) * (height - TOP - BOTTOM)


def _grid(ticks: Sequence[float], y: Callable[[float], float]) -> str:
    step = ticks[1] - ticks[0]
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="axis" x="{LEFT - 7}" y="{y(t) + 4:.1f}" text-anchor="end">{_tick(t, step)}</text>'
        for t in ticks
    )


def _x_labels(xs: Sequence[int], x: Callable[[float], float], height: int) -> str:
    span = xs[-1] - xs[0]
    step = next(s * 10**p for p in range(9) for s in (1, 2, 5) if s * 10**p * 6 >= span)
    labels = [v for v in range(xs[0], xs[-1] + 1) if v % step == 0] or [xs[0]]
    return "".join(f'<text class="axis" x="{x(v):.1f}" y="{height - 7}" text-anchor="middle">{v}</text>' for v in labels)


def _path(line: Line, xs: Sequence[float], y: Callable[[float], float]) -> str:
    points, pen = [], "M"
    for x, value in zip(xs, line.values, strict=True):
        if value is None:
            pen = "M"
            continue
        points.append(f"{pen}{x:.1f} {y(value):.1f}")
        pen = "L"
    if len(points) == 1:
        points.append("h0.01")  # a lone point shows through its round line cap
    css = f"s{line.colour}" + (" faint" if line.faint else "")
    return f'<path class="line {css}" d="{"".join(points)}"/>'


def _band(line: Line, xs: Sequence[float], y: Callable[[float], float]) -> str:
    """The area between `low` and `high`, over the points that have both."""
    both = [(x, low, high) for x, low, high in zip(xs, line.low, line.high, strict=False) if low is not None and high is not None]
    if not both:
        return ""
    edge = [f"{x:.1f} {y(high):.1f}" for x, _, high in both] + [f"{x:.1f} {y(low):.1f}" for x, low, _ in reversed(both)]
    return f'<path class="band f{line.colour}" d="M{"L".join(edge)}Z"/>'


def _hits(xs: Sequence[int], x: Callable[[float], float], height: int, text: Callable[[int], str]) -> str:
    stride = math.ceil(len(xs) / MAX_HITS)
    width = (WIDTH - LEFT - RIGHT) / max(1, len(xs) - 1) * stride
    return "".join(
        f'<rect class="hit" x="{x(xs[i]) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height - TOP - BOTTOM}" '
        f'data-t="{tooltip(text(i))}"/>'
        for i in range(0, len(xs), stride)
    )


def _svg(body: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{body}</svg>'


def _nothing() -> str:
    return '<p class="nothing">no data</p>'


def _span(xs: Sequence[int]) -> str:
    return f"{xs[0]}" if len(xs) == 1 else f"{xs[0]}–{xs[-1]} (mean)"


def _percent(value: Value) -> str:
    return "–" if value is None else f"{value:.1%}"
