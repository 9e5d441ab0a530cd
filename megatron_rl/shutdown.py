"""SIGTERM: finish what is whole, save, leave within `run.shutdown_s`.

The first signal asks the loop to stop at the next boundary; whatever is recorded in the buffer by then is trained after
a resume, so leaving at the deadline loses nothing either. The second signal leaves at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)


class Shutdown:
    """Installed once by the loop; `requested` is read at the boundaries."""

    def __init__(self, deadline_s: float, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._deadline_s, self._on_request = deadline_s, on_request
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + signal.SIGTERM)
        self.requested = True
        timer = threading.Timer(self._deadline_s, self._leave)
        timer.daemon = True
        timer.start()
        self._on_request()

    def _leave(self) -> None:
        log.warning("run.shutdown_s=%g passed before the step ended; it is done again on resume", self._deadline_s)
        os._exit(0)

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self._previous)
