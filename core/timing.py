"""Stage times of one job. Knows no GPU: the clock, and what to wait for before reading it, are given."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median


class JobTimer:
    """Seconds by stage and by step.

    `wait` runs before the clock is read (a GPU works on after its call returns); `clock` gives seconds;
    `on_stage` is told the name and seconds of each stage that ends.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[], None] = lambda: None,
        on_stage: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self._clock = clock
        self._wait = wait
        self._on_stage = on_stage
        self._started = clock()
        self._spans: dict[str, float] = {}
        self._step_started = 0.0
        self.steps: list[float] = []
        self.sections: list[dict] = []
        self.encodings = {"hits": 0, "misses": 0}  # taken from earlier jobs, and made anew

    def another(self) -> "JobTimer":
        """A new one that measures in the same way."""
        return JobTimer(self._clock, self._wait, self._on_stage)

    def restart(self) -> None:
        """Forget sections and steps of an attempt that failed; stages, encodings and the total go on."""
        self.steps, self.sections = [], []

    def drop_sections(self, keep: int) -> None:
        """Forget all sections but the first `keep`: what came after them is not in the video."""
        del self.sections[keep:]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage `name`."""
        started = self._now()
        try:
            yield
        finally:
            seconds = self._now() - started
            self._spans[name] = self._spans.get(name, 0.0) + seconds
            self._on_stage(name, seconds)

    @contextmanager
    def section_span(self, name: str, number: int | None = None) -> Iterator[None]:
        """As `span`, for the section of this number, 1 …; without one the newest."""
        number = number or len(self.sections)
        section, started = self.sections[number - 1], self._now()
        try:
            yield
        finally:
            seconds = self._now() - started
            section[name] = round(seconds, 4)
            self._on_stage(f"section {number} {name}", seconds)

    def start_section(self) -> None:
        self.sections.append({})
        self._step_started = self._now()

    def step_done(self) -> None:
        """One sampling step has ended; the next begins."""
        now = self._now()
        self.steps.append(now - self._step_started)
        self._step_started = now

    def seconds(self, name: str) -> float:
        return round(self._spans.get(name, 0.0), 4)

    def total(self) -> float:
        return round(self._now() - self._started, 4)

    def step_summary(self) -> dict[str, float]:
        """Median and 95th percentile over all steps, the cached ones included."""
        if not self.steps:
            return {"median": 0.0, "p95": 0.0}
        ordered = sorted(self.steps)
        p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
        return {"median": round(median(ordered), 4), "p95": round(p95, 4)}

    def _now(self) -> float:
        self._wait()
        return self._clock()
