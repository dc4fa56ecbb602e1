"""One job's seconds by stage, whoever ran it, and ours run that way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from core.progress import Progress
from core.worker import Worker

_ids = count()


@dataclass(frozen=True)
class TimedJob:
    """Seconds; lists are in sampling order."""

    encode: float  # text, VAE and CLIP vision
    step: float  # median over all steps, skipped ones included
    sample: list[float] = field(repr=False)  # of each section
    decode: list[float] = field(repr=False)  # of each section, with bringing it to the host and blending
    mp4: float  # the whole video's
    total: float
    computed: int  # steps that ran the transformer's blocks
    peak_gb: float | None  # GPU memory allocated; None on a CPU


class KeptVideo:
    """A delivery that leaves the MP4 in `path`: what the base64 of it would take is no one's time here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, video: Path, *_: object) -> dict:
        self.path.write_bytes(video.read_bytes())
        return {}


def run_ours(
    worker: Worker, fields: dict, report: Callable[[Progress], None] = lambda progress: None
) -> TimedJob:
    """One job through `worker`. Raises RuntimeError with its error reply."""
    reply = worker.submit(f"job-{next(_ids)}", fields, report).result()
    if "error" in reply:
        raise RuntimeError(reply["error"])
    timings = reply["timings"]
    sections = timings["sections"]
    return TimedJob(
        encode=timings["text_encode"] + sum(timings["image_encode"].values()),
        step=timings["step"]["median"],
        sample=[section["sample"] for section in sections],
        decode=[section["decode"] for section in sections],
        mp4=timings["mp4_encode"],
        total=timings["total"],
        computed=sum(section["steps_computed"] for section in sections),
        peak_gb=reply["worker"]["peak_memory_gb"],
    )
