"""How long a job may take, measured from its start."""

import math
import time
from collections.abc import Callable

from core.errors import TimeLimitError


class Deadline:
    """A limit of `seconds` from now; infinite where there is none."""

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._ends = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self._ends - self._clock())

    def check(self) -> None:
        """Raises TimeLimitError once the time is up."""
        if not self.left:
            raise TimeLimitError(f"The job took longer than its limit of {self.seconds:g} seconds.")
