"""The scoring worker: `python -m megatron_rl.rewards.worker`, started and killed by `process.py`.

One call at a time, under a CPU-time timer that ends the process (SIGPROF, so that C code that never returns to the
interpreter ends too) and an address-space limit. An exception is not survived: the worker says what it was and ends,
and a fresh one takes its place. When its owner dies it ends too, together with whatever its terms have started.
Imports neither torch nor Megatron-Core, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import sys
import threading
import traceback
from types import TracebackType
from typing import BinaryIO, SupportsFloat

from megatron_rl.errors import MegatronRLError
from megatron_rl.rewards.terms import Term, load_term
from megatron_rl.rewards.wire import Call, Cause, Reply, Setup, failed, receive
from megatron_rl.types import Outcome, OutcomeKind

LONGEST_DETAIL = 500


def main() -> None:
    requests, replies = _take_pipes()
    threading.Thread(target=_end_with_owner, args=(requests.fileno(),), daemon=True).start()
    _say_last_words_on(replies)
    setup = receive(requests)
    if not isinstance(setup, Setup):
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
    terms = {label: load_term(spec.name, spec.options) for label, spec in setup.terms.items()}
    replies.write(Reply(OutcomeKind.VALUE).to_json())
    while isinstance(call := receive(requests), Call):
        if call.label not in terms:
            terms[call.label] = load_term(call.label, {})
        replies.write(_answer(terms[call.label], call).to_json())


def _answer(term: Term, call: Call) -> Reply:
    signal.setitimer(signal.ITIMER_PROF, call.cpu_s)
    returned = term(response=call.response, answer=call.prompt.answer, prompt=call.prompt)
    signal.setitimer(signal.ITIMER_PROF, 0)
    if returned is None:
        return Reply(OutcomeKind.WRONG_FORMAT)
    if isinstance(returned, Outcome) and returned.kind is OutcomeKind.FAILED:
        return failed(Cause.REPORTED, _short(returned.detail or "the term returned a failed Outcome"))
    value = returned.reward if isinstance(returned, Outcome) else returned
    if not isinstance(value, SupportsFloat):
        return failed(Cause.NOT_A_NUMBER, f"returned a {type(value).__name__}, not a number, None or an Outcome")
    if not math.isfinite(float(value)):
        return failed(Cause.NOT_A_NUMBER, f"returned {float(value)}")
    if isinstance(returned, Outcome) and returned.kind is OutcomeKind.WRONG_FORMAT:
        return Reply(OutcomeKind.WRONG_FORMAT)
    return Reply(OutcomeKind.VALUE, float(value))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the two pipes away from stdin and stdout, where a term's own prints and reads would damage them."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _end_with_owner(requests_fd: int) -> None:
    """Waits until the owner's end of the pipe is closed, then kills the whole session that the owner gave this worker."""
    poll = select.poll()
    poll.register(requests_fd, 0)  # a hang-up is reported without being asked for
    poll.poll()
    os.killpg(os.getpid(), signal.SIGKILL)


def _say_last_words_on(replies: BinaryIO) -> None:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = Cause.UNUSABLE if isinstance(error, MegatronRLError) else Cause.EXCEPTION
        detail = str(error) if cause is Cause.UNUSABLE else f"{kind.__name__}: {error}{_place(trace)}"
        replies.write(failed(cause, _short(detail)).to_json())

    sys.excepthook = hook


def _place(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_DETAIL else text[:LONGEST_DETAIL] + "..."


if __name__ == "__main__":
    main()
