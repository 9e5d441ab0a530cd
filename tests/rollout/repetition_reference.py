"""The repetition detector in plain Python: what csrc/repetition/ is tested against and measured beside."""

from __future__ import annotations

from collections import defaultdict, deque


class PlainDetector:
    """Fires where, for some p in 1..max_period and some r >= min_repeats with p * r >= min_tokens, the last p * r tokens
    are r copies of one block of length p.

    The last n tokens repeat with period p where each of the last n - p equals the token p before it. So one run length a
    period is enough, and only periods at which the newest token occurred before have a run at all: a push costs as many
    steps as the token occurs among the last `max_period`."""

    def __init__(self, max_period: int, min_repeats: int, min_tokens: int = 64) -> None:
        self._max_period = max_period
        # Index p: length of the run of equal tokens, p apart, that is the least repetition asked for.
        self._needed = [0] + [p * (max(min_repeats, -(-min_tokens // p)) - 1) for p in range(1, max_period + 1)]
        self._runs: dict[int, int] = {}  # period -> run length up to the newest token
        self._positions: defaultdict[int, deque[int]] = defaultdict(deque)  # token -> where it was, oldest first
        self._count = 0

    @property
    def window(self) -> int:
        """Tokens that decide whether it fires: a new detector given the last `window` ones goes on like this one."""
        return max(needed + period for period, needed in enumerate(self._needed))

    def push(self, token: int) -> bool:
        """Whether the tokens pushed so far, this one included, end in a repetition."""
        seen = self._positions[token]
        while seen and seen[0] < self._count - self._max_period:
            seen.popleft()
        before, self._runs = self._runs, {}
        fires = False
        for position in seen:
            period = self._count - position
            run = before.get(period, 0) + 1
            self._runs[period] = run
            fires = fires or run >= self._needed[period]
        seen.append(self._count)
        self._count += 1
        return fires
