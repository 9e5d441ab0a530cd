"""Which of a prompt's responses long2short trains on (paper 2.4). Pure functions; who samples and writes: `rejection.py`.

Shortest rejection sampling: of n = 8 responses the shortest correct one goes into the SFT data. DPO: that one is chosen; rejected
are longer wrong ones, and correct ones at least 1.5 times as long.

Both take part only with a text, and only where the model ended them itself. The paper does not speak of truncated responses; ours
is to leave them out: one that was cut at the limit has not answered yet, so it is neither known to be wrong nor how long it is,
and as a training example it would be given an end that the model did not write.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.answering import Response
from megatron_rl.types import Ending

LONGER = 1.5  # paper 2.4


def is_whole(response: Response) -> bool:
    """Whether it has a text, and the model ended it."""
    return response.ending is Ending.STOP and bool(response.text.strip())


def shortest_correct(responses: Sequence[Response]) -> Response | None:
    """The first of the shortest ones. None: nothing is right."""
    right = [r for r in responses if r.is_correct and is_whole(r)]
    return min(right, key=lambda r: r.num_tokens, default=None)


def preference_pairs(responses: Sequence[Response]) -> list[tuple[Response, Response]]:
    """(chosen, rejected), one pair for each rejected response; none where nothing is right."""
    chosen = shortest_correct(responses)
    if chosen is None:
        return []

    def is_rejected(r: Response) -> bool:
        return r.num_tokens >= LONGER * chosen.num_tokens if r.is_correct else r.num_tokens > chosen.num_tokens

    return [(chosen, r) for r in responses if is_whole(r) and is_rejected(r)]
