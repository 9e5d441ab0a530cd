"""Which of a prompt's responses long2short trains on (paper 2.4). Pure functions; who samples and writes: `rejection.py`.

Shortest rejection sampling: of n = 8 responses the shortest correct one goes into the SFT data. DPO: that one is chosen; rejected
are longer wrong ones, and correct ones at least 1.5 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.answering import Response
from megatron_rl.types import Ending

LONGER = 1.5  # paper 2.4


def shortest_correct(responses: Sequence[Response]) -> Response | None:
    """The first of the shortest ones; a response that was cut off is never correct here. None: nothing is right."""
    right = [r for r in responses if r.is_correct and r.ending is Ending.STOP]
    return min(right, key=lambda r: r.num_tokens, default=None)


def preference_pairs(responses: Sequence[Response], *, longer: float = LONGER) -> list[tuple[Response, Response]]:
    """(chosen, rejected), one pair for each rejected response; none where nothing is right."""
    chosen = shortest_correct(responses)
    if chosen is None:
        return []
    return [
        (chosen, r)
        for r in responses
        if (r.num_tokens >= longer * chosen.num_tokens if r.is_correct else r.num_tokens > chosen.num_tokens)
    ]
