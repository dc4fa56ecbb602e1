"""How long something is trained: so many steps, or as many as fit into some seconds."""

import time
from collections.abc import Callable, Iterator

COMPILED_AFTER = 20  # steps; with seconds, the rates' course begins after them


class Course:
    """Iterate it for the steps, 1, 2, …; `done` is the share of the course behind it, for the learning rate.

    Of `steps` and `seconds` exactly one is given. The seconds count from the first step and hold compiling
    too, which is over after the first few steps: `done` stays near nothing until then. How many steps it
    was is in `steps` afterwards, and so many given as `steps` repeat the training.
    """

    def __init__(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if (steps is None) == (seconds is None):
            raise ValueError("A course has either steps or seconds.")
        self._planned, self._seconds, self._clock = steps, seconds, clock
        self.steps = 0
        self._first = self._end = 0.0

    def __iter__(self) -> Iterator[int]:
        self.steps = 0
        self._first = self._clock()
        self._end = self._first + (self._seconds or 0.0)
        while self.steps < self._planned if self._planned is not None else self._clock() < self._end:
            self.steps += 1
            yield self.steps
            if self.steps == COMPILED_AFTER:
                self._first = self._clock()

    @property
    def done(self) -> float:
        """0…1, above 0 from the first step on."""
        if self._planned is not None:
            return self.steps / self._planned
        if self.steps <= COMPILED_AFTER:
            return 1e-3
        whole = max(self._end - self._first, 1e-9)
        return min(1.0, max(1e-3, (self._clock() - self._first) / whole))
