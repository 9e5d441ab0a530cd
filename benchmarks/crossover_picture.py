"""Draws docs/kv_resume.svg from results/kv_resume.json: seconds to restore and to prefill again, both axes logarithmic.

python benchmarks/crossover_picture.py [--result FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 150, 48, 56
LINES = (
    ("prefill_s", "prefill again", "#e8833a", ""),
    ("restore_s", "restore", "#2f6fde", ""),
    ("copy_s", "the link", "#8a919c", "5 4"),
)


def draw(result: dict[str, Any]) -> str:
    """The picture as SVG on a white ground, for pages of either colour."""
    curves = result["curves"]
    tokens = curves["tokens"]
    seconds = [value for name, *_ in LINES for value in curves[name]]
    x = scale(min(tokens), max(tokens), LEFT, WIDTH - RIGHT)
    low, high = 10.0 ** math.floor(math.log10(min(seconds))), 10.0 ** math.ceil(math.log10(max(seconds)))
    y = scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', text(LEFT, 24, title(curves), size=15, weight=600)]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e3e6eb"/>')
        parts.append(text(LEFT - 8, at + 4, f"{10.0**power:g} s", anchor="end"))
    parts += [text(x(n), HEIGHT - BOTTOM + 20, short(n), anchor="middle") for n in tokens]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, f"tokens of one trajectory, {result['device']}", anchor="middle"))
    ends = label_heights([y(curves[name][-1]) for name, *_ in LINES])
    for (name, label, colour, dashes), at in zip(LINES, ends, strict=True):
        points = " ".join(f"{x(n):.1f},{y(s):.1f}" for n, s in zip(tokens, curves[name], strict=True))
        style = f'fill="none" stroke="{colour}" stroke-width="2.4" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{points}" {style}/>')
        parts.append(text(WIDTH - RIGHT + 8, at + 4, f"{label}, {curves[name][-1]:.2g} s", colour=colour))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12">\n{body}\n</svg>\n'
    )


def title(curves: dict[str, list[float]]) -> str:
    """Where the curves cross, if they do within what was measured."""
    wins = [
        n for n, ours, theirs in zip(curves["tokens"], curves["restore_s"], curves["prefill_s"], strict=True) if ours < theirs
    ]
    if len(wins) == len(curves["tokens"]):
        return f"Restoring KV beats prefilling at every length from {short(wins[0])} tokens"
    return f"Restoring KV beats prefilling from {short(wins[0])} tokens" if wins else "Prefilling beats restoring KV"


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low)
    return lambda value: start + math.log(value / low) / span * (end - start)


def label_heights(wanted: Sequence[float], apart: float = 16) -> list[float]:
    """The heights, moved down where they would overlap."""
    heights = dict[int, float]()
    previous = -math.inf
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        previous = heights[i] = max(wanted[i], previous + apart)
    return [heights[i] for i in range(len(wanted))]


def short(num_tokens: float) -> str:
    return f"{num_tokens / 1024:g}k" if num_tokens >= 1024 else f"{num_tokens:g}"


def text(
    x: float, y: float, content: str, *, anchor: str = "start", colour: str = "#636c7c", size: int = 12, weight: int = 400
) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=HERE / "results" / "kv_resume.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "kv_resume.svg")
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(json.loads(arguments.result.read_text(encoding="utf-8"))), encoding="utf-8")
    print(arguments.picture)


if __name__ == "__main__":
    main()
