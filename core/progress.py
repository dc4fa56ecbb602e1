"""Where a job stands, as its caller may see it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """Stage `encode`, `sample`, `decode` or `mp4_encode`; section and step count from 1."""

    sections: int
    steps: int
    stage: str = "encode"
    section: int = 0
    step: int = 0

    def at(self, stage: str, section: int = 0, step: int = 0) -> "Progress":
        return replace(self, stage=stage, section=section, step=step)

    @property
    def steps_done(self) -> int:
        """Over all sections."""
        return max(0, self.section - 1) * self.steps + self.step

    @property
    def percent(self) -> int:
        """Share of the sampling steps done: they are nearly all of a job's time."""
        return 100 * self.steps_done // (self.sections * self.steps)

    def as_dict(self) -> dict:
        return {
            "stage": self.stage,
            "section": self.section,
            "sections": self.sections,
            "step": self.step,
            "steps": self.steps,
            "percent": self.percent,
        }
