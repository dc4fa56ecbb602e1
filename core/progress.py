"""Where a job stands, as its caller may see it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """Stage `input`, `encode`, `sample`, `decode`, `mp4_encode` or `deliver`; sections and steps from 1."""

    sections: int = 1
    steps: int = 1
    stage: str = "input"
    section: int = 0
    step: int = 0
    seconds_left: float | None = None  # of sampling and decoding; None until there is a step to go by
    preview: Callable[[], str] | None = None  # makes a base64 JPEG; called only for what is really sent
    output: int = 1  # the video being made, from 1
    outputs: int = 1

    def at(self, stage: str, section: int = 0, step: int = 0, **values) -> "Progress":
        return replace(self, stage=stage, section=section, step=step, **values)

    @property
    def steps_done(self) -> int:
        """Over all sections of all outputs."""
        sections = (self.output - 1) * self.sections + max(0, self.section - 1)
        return sections * self.steps + self.step

    @property
    def steps_in_all(self) -> int:
        return self.outputs * self.sections * self.steps

    @property
    def percent(self) -> int:
        """Share of the sampling steps done: they are nearly all of a job's time."""
        return 100 * self.steps_done // self.steps_in_all

    def as_dict(self) -> dict:
        """What is sent; JSON-safe."""
        shown = {
            "stage": self.stage,
            "section": self.section,
            "sections": self.sections,
            "step": self.step,
            "steps": self.steps,
            "percent": self.percent,
            "seconds_left": self.seconds_left,
        }
        if self.outputs > 1:
            shown |= {"output": self.output, "outputs": self.outputs}
        return shown | ({"preview": self.preview()} if self.preview else {})


class Pace:
    """Seconds left, from the time that the steps so far have taken, decoding between sections included."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic, given: int = 0) -> None:
        """`given` of the `steps` were done by an earlier job."""
        self._steps = steps
        self._given = given
        self._clock = clock
        self._started: float | None = None

    def left(self, steps_done: int) -> float | None:
        """The first call, before any step of this job's own, starts the clock."""
        now = self._clock()
        if self._started is None:
            self._started = now
        own = steps_done - self._given
        if own <= 0:
            return None
        return round((now - self._started) / own * (self._steps - steps_done), 1)
