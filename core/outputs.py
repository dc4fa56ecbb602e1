"""The videos of one job: consecutive seeds, one after the other, each delivered before the next is begun."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from core.errors import CancelledError, WorkerError
from core.pipeline import GeneratedVideo, Report
from core.pipeline.conditioning import Conditioning
from core.progress import Pace, Progress
from core.request import MAX_SEED
from core.timing import JobTimer
from diffusers_helper import memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """What one output is made with."""

    number: int  # from 1
    of: int
    seed: int
    timer: JobTimer
    report: Report
    shared: Conditioning | None  # of the outputs before it
    taken: int  # bytes that they have put into the reply

    def name(self, job_id: str) -> str:
        """What its file is called: after the job, with its number where there are several."""
        return job_id if self.of == 1 else f"{job_id}-{self.number}"


@dataclass(frozen=True)
class Made:
    """One output, delivered."""

    video: GeneratedVideo
    reply: dict  # its own fields
    inlined: int  # bytes of it that are in the reply, before base64
    warnings: list[str]
    retried: bool
    timer: JobTimer


@dataclass(frozen=True)
class Failure:
    """Why there are fewer outputs than were asked for."""

    sentence: str
    refresh_worker: bool


def make_outputs(
    make: Callable[[Turn], Made], seed: int, count: int, timer: JobTimer, report: Report
) -> tuple[list[Made], Failure | None]:
    """`count` outputs with the seeds `seed`, `seed` + 1 and so on; after the largest seed comes 0.

    A single one uses `timer` and `report` as they are. Raises what the first output raises, and
    CancelledError of any; another failure of a later one ends the series, and what is finished is returned.
    """
    if count == 1:
        return [make(Turn(1, 1, seed, timer, report, None, 0))], None
    made: list[Made] = []
    progress = _SeriesProgress(count, report)
    for number in range(1, count + 1):
        turn = Turn(
            number,
            count,
            (seed + number - 1) % (MAX_SEED + 1),
            timer.another(),
            progress.of(number),
            made[0].video.conditioning if made else None,
            sum(output.inlined for output in made),
        )
        try:
            made.append(make(turn))
        except Exception as error:
            if not made or isinstance(error, CancelledError):
                raise
            return made, _failure(error, turn)
    return made, None


def all_warnings(outputs: list[Made]) -> list[str]:
    """Each once; what does not hold for all of them says for which it does."""
    if len(outputs) == 1:
        return list(outputs[0].warnings)
    found: dict[str, None] = {}
    for number, output in enumerate(outputs, 1):
        for warning in output.warnings:
            everywhere = all(warning in other.warnings for other in outputs)
            found[warning if everywhere else f"Output {number}: {warning}"] = None
    return list(found)


def _failure(error: Exception, turn: Turn) -> Failure:
    if isinstance(error, WorkerError):
        kept = error.details.get("video_path")
        reason = f"{error} It is kept as {kept}." if kept else str(error)
        refresh = error.refresh_worker
    else:
        log.error("output %d failed", turn.number, exc_info=error)
        reason, refresh = "The worker failed on it.", memory.is_gpu_failure(error)
    sentence = f"Output {turn.number} of {turn.of} (seed {turn.seed}) failed and ended the job: {reason}"
    return Failure(sentence, refresh)


class _SeriesProgress:
    """Each output's progress as a part of the job's."""

    def __init__(self, count: int, report: Report) -> None:
        self._count = count
        self._report = report
        self._pace: Pace | None = None

    def of(self, number: int) -> Report:
        def report(progress: Progress) -> None:
            told = replace(progress, output=number, outputs=self._count)
            if told.seconds_left is not None or (told.section and self._pace is None):
                self._pace = self._pace or Pace(told.steps_in_all)
                told = replace(told, seconds_left=self._pace.left(told.steps_done))
            self._report(told)

        return report
