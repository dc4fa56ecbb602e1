"""What a person sees, all on stderr: a bar on a terminal, plain lines elsewhere, the timing table, errors.

Whatever came over the network is shown as text only: no markup, no control characters.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from client.api import Job
from client.errors import ClientError, JobError

STATES = {"IN_QUEUE": "waiting for a worker", "IN_PROGRESS": "running", "COMPLETED": "done"}
STAGES = {
    "input": "reading the image",
    "encode": "encoding",
    "sample": "sampling",
    "decode": "decoding",
    "mp4_encode": "writing the MP4",
    "deliver": "delivering",
}
FACTS = (  # and the reply's fields they are of
    ("{width}×{height}", {"width", "height"}),
    ("{frames} frames", {"frames"}),
    ("{duration_s} s", {"duration_s"}),
    ("seed {seed}", {"seed"}),
)
PLAIN_PERCENT = 10  # from one line to the next where there is no bar
MAX_TEXT = 1000
MAX_SECTIONS = 12  # each with its own rows in the table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads: the video is fetched all the same."""
        self.quiet = True


class Display:
    """A context for as long as there is something to wait for."""

    def __init__(self, quiet: bool) -> None:
        plain = {"stderr": True, "markup": False, "highlight": False, "emoji": False, "soft_wrap": True}
        self._console = _Console(quiet=quiet, **plain)
        self._errors = _Console(**plain)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=quiet or not self._console.is_interactive,
        )
        self._task: TaskID | None = None
        self._shown: tuple[str, int] | None = None
        self._noted = ""

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def job(self, job: Job) -> None:
        """Its state, and the worker's progress where there is one."""
        progress = job.output if job.status == "IN_PROGRESS" and isinstance(job.output, dict) else {}
        stage = progress.get("stage")
        words = [STAGES.get(stage, stage) if isinstance(stage, str) else STATES.get(job.status, job.status)]
        for name, of in (("section", "sections"), ("step", "steps")):
            k, n = _number(progress.get(name)), _number(progress.get(of))
            if k and n:
                words.append(f"{name} {k:g} of {n:g}")
        percent = 100.0 if job.status == "COMPLETED" else _number(progress.get("percent"))
        left = _number(progress.get("seconds_left"))
        self.stage(", ".join(words), percent, left if left is None or left >= 0 else None)

    def received(self, what: str, done: int, total: int | None) -> None:
        """Of its bytes."""
        self.stage(f"downloading the {what}", 100 * done / total if total else None)

    def stage(self, text: str, percent: float | None = None, seconds_left: float | None = None) -> None:
        """What is going on now; a percent of None is not known."""
        text = printable(text)
        percent = None if percent is None else min(max(percent, 0.0), 100.0)
        figures = "" if percent is None else f"{percent:.0f} %"
        if seconds_left is not None:
            figures += f", about {_minutes(seconds_left)} left"
        if self._bar.disable:
            shown = (text.partition(", step")[0], int(percent or 0) // PLAIN_PERCENT)
            if shown != self._shown:
                self._console.print(f"{text}: {figures}" if figures else text)
            self._shown = shown
            return
        total = None if percent is None else 100.0
        if self._task is None:
            self._task = self._bar.add_task(text, total=total, figures=figures)
        self._bar.update(self._task, description=text, total=total, completed=percent or 0, figures=figures)

    def note(self, sentence: str) -> None:
        """Said once, however often in a row."""
        if sentence != self._noted:
            self._console.print(printable(sentence))
        self._noted = sentence

    def saved(self, videos: list[tuple[dict, Path]], job: Job) -> None:
        """The videos' figures, the worker's warnings and the timing table."""
        self._stop()  # or the bar would come below them
        for output, path in videos:
            told = job.output | output
            facts = [f"{path.stat().st_size / 1e6:.2f} MB"]
            facts += [fact.format_map(told) for fact, names in FACTS if _known(told, names)]
            self.note(f"Saved {path}: {', '.join(facts)}.")
            if told.get("partial") is True:
                self.note("The video is partial.")
        warnings = job.output.get("warnings")
        for warning in warnings if isinstance(warnings, list) else []:
            self.note(f"Warning: {warning}")
        table = Table(box=SIMPLE)
        for column, justify in (("stage", "left"), ("seconds", "right"), ("steps computed", "right")):
            table.add_column(column, justify=justify)
        for name, seconds, steps in _timings(job):
            table.add_row(
                Text(printable(name)), f"{seconds:.2f}", steps, style="bold" if name == "total" else ""
            )
        self._console.print(table, soft_wrap=False)

    def failed(self, error: ClientError) -> None:
        """Even where the rest is quiet."""
        told = f"The job failed ({error.code}): {error}" if isinstance(error, JobError) else str(error)
        self._errors.print(printable(told), style="red")
        for name, value in error.details.items():
            if isinstance(value, str) and name not in ("code", "error"):
                self._errors.print(printable(f"{name}: {value}"))
        if error.resumable and error.job_id is not None:
            self._errors.print(
                printable(f"To pick the job up again: python -m client --resume {error.job_id}")
            )

    def _stop(self) -> None:
        if not self._bar.disable:  # rich 14 would print an empty line
            self._bar.stop()


def _known(told: dict, names: set[str]) -> bool:
    """Whether the reply has these fields; of a picture some are null."""
    return all(told.get(name) is not None for name in names)


def printable(text: str) -> str:
    """On one line, without what could move the cursor, and not endless."""
    line = "".join(character if character.isprintable() else " " for character in text[:MAX_TEXT])
    return line + ("…" if len(text) > MAX_TEXT else "")


def _timings(job: Job) -> Iterator[tuple[str, float, str]]:
    """(name, seconds, steps computed of steps): RunPod's own times, then the worker's."""
    for name, key in (("in RunPod's queue", "delayTime"), ("on RunPod's worker", "executionTime")):
        milliseconds = _number(job.reply.get(key))
        if milliseconds is not None:
            yield name, milliseconds / 1000, ""
    timings = job.output.get("timings")
    for name, value in timings.items() if isinstance(timings, dict) else ():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            yield from _seconds(value, label)
        elif isinstance(value, list) and len(value) > MAX_SECTIONS:
            yield from _seconds(_sums(value), f"{len(value)} {label}")
        elif isinstance(value, list):
            for k, part in enumerate(value, 1):
                yield from _seconds(part if isinstance(part, dict) else {}, f"{label.removesuffix('s')} {k}")
        elif (seconds := _number(value)) is not None:
            yield label, seconds, ""


def _seconds(part: dict, label: str) -> Iterator[tuple[str, float, str]]:
    steps, computed = part.get("steps"), part.get("steps_computed")
    for name, value in part.items():
        seconds = _number(value)
        if seconds is not None and name not in ("steps", "steps_computed"):
            counted = name == "sample" and _number(steps) is not None and _number(computed) is not None
            yield f"{label}: {name.replace('_', ' ')}", seconds, f"{computed} of {steps}" if counted else ""


def _sums(parts: list) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items() if isinstance(part, dict) else ():
            sums[name] = sums.get(name, 0) + (_number(value) or 0)
    return sums


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else None  # false for NaN too


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
