"""Ctrl-C while a job is submitted: one that is queued but whose id was missed could not be cancelled."""

import signal
import time
from collections.abc import Callable


class HeldInterrupt:
    """The first Ctrl-C in the block is raised at its end, as KeyboardInterrupt; a second one at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._holding = True
        self._asked = False

    def sleep(self, seconds: float) -> None:
        """No request is under way here, so that Ctrl-C need not wait."""
        self._holding = False
        if self._asked:
            raise KeyboardInterrupt
        time.sleep(seconds)
        self._holding = True

    def __enter__(self) -> "HeldInterrupt":
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        if kind is None and self._asked:
            raise KeyboardInterrupt

    def _on_signal(self, *_: object) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        if self._asked:
            raise KeyboardInterrupt("Interrupted in the submission: the job may be queued all the same.")
        self._asked = True
        self._note("Waiting for the job's id, to cancel it; Ctrl-C again quits at once.")
