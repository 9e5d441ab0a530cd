"""What a person sees while a run goes on: one live line in a terminal, one log line an iteration everywhere.

It is told what happens and counts; it knows neither engines nor trainer. The numbers that stay: `metrics.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import rich
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

PHASES = ("evaluation", "rollout", "reference", "train", "publish", "checkpoint")


@dataclass
class Progress:
    """Of the run's iterations `first .. iterations - 1`. Live only where `console` is a terminal."""

    iterations: int
    first: int = 0
    console: Console = field(default_factory=rich.get_console)

    def __post_init__(self) -> None:
        self._iteration, self._phase = self.first, "starting"
        self._start = self._phase_start = time.monotonic()
        self._tokens = self._groups = self._groups_wanted = 0
        self._last: Mapping[str, float | None] = {}
        self._live: Live | None = None
        if self.console.is_terminal:
            # `get_renderable`: rich asks for the line itself, four times a second, from its own thread
            self._live = Live(get_renderable=self.line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def start_at(self, iteration: int) -> None:
        """The run goes on from here; time left is counted from now."""
        self.first = self._iteration = iteration
        self._start = time.monotonic()

    def phase(self, name: str, *, groups: int = 0) -> None:
        """A phase begins, one of PHASES. `groups`: complete groups that a rollout phase waits for."""
        self._phase, self._phase_start = name, time.monotonic()
        self._tokens, self._groups, self._groups_wanted = 0, 0, groups

    def tokens(self, count: int) -> None:
        """`count` more tokens were generated, or trained on, in this phase."""
        self._tokens += count

    def group_complete(self, count: int = 1) -> None:
        self._groups += count

    def iteration_done(self, row: Mapping[str, float | None]) -> None:
        """`row`: the iteration's metrics. Logs the one line of this iteration."""
        self._iteration, self._last, self._phase = int(row["iteration"] or 0) + 1, row, "between iterations"
        self._tokens = self._groups = self._groups_wanted = 0
        log.info("%s", summary(row, self.iterations, self._left_s()))

    def line(self) -> Table:
        """The live line: iteration and phase, speed, reward of the last batch, time left."""
        seconds = time.monotonic() - self._phase_start
        parts: list[str | tuple[str, str]] = [
            ("iteration ", "dim"),
            (f"{self._iteration}/{self.iterations}", "bold"),
            "  ",
            (self._phase, "cyan"),
        ]
        parts += [f" {seconds:.0f} s"]
        if self._groups_wanted:
            parts += [f"  groups {self._groups}/{self._groups_wanted}"]
        if self._tokens:
            parts += [f"  {self._tokens / max(seconds, 1e-3):,.0f} tokens/s"]
        scores = _scores(self._last)
        left = Text.assemble(f"{scores}  " if scores else "", (f"{_clock(self._left_s())} left", "green"))
        grid = Table.grid(expand=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(Text.assemble(*parts), left)
        return grid

    def close(self) -> None:
        """Takes the live line off the screen. Any number of times."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left_s(self) -> float | None:
        done = self._iteration - self.first
        if done <= 0:
            return None
        return (time.monotonic() - self._start) / done * max(0, self.iterations - self._iteration)


def summary(row: Mapping[str, float | None], iterations: int, left_s: float | None) -> str:
    """The line of one iteration, from its metrics; what the row lacks is left out."""
    seconds = sum(v for k, v in row.items() if k.startswith("time/") and k.endswith("_s") and v is not None)
    parts = [f"iteration {int(row['iteration'] or 0) + 1}/{iterations}"]
    scores = _scores(row)
    parts.append(scores or "no batch")
    if (length := row.get("length/mean")) is not None:
        parts.append(f"length {length:.0f}")
    if (generated := row.get("tokens/generated")) is not None:
        parts.append(f"tokens {generated:,.0f}")
    if (waiting := row.get("trajectories/waiting")) is not None:
        parts.append(f"waiting {waiting:.0f}")
    parts.append(f"{seconds:.1f} s")
    parts.append(f"{_clock(left_s)} left")
    return ", ".join(parts)


def _scores(row: Mapping[str, float | None]) -> str:
    named = (("reward", row.get("reward/mean")), ("correct", row.get("reward/correct")))
    return ", ".join(f"{name} {value:.3f}" for name, value in named if value is not None)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
