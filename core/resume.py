"""What one job leaves for another: its latents out, and an earlier job's latents in."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core.delivery import MB, Delivery
from core.errors import CancelledError, WorkerError
from core.images import Fetch
from core.latent_store import open_latents
from core.latents import (
    SavedLatents,
    check_latents,
    job_of,
    most_bytes,
    parse_latents,
    transformer_digest,
    write_latents,
)
from core.pipeline import Models
from core.pipeline.checkpoint import Recorder
from core.pipeline.sections import plan_video
from core.request import VideoRequest
from core.settings import Settings

log = logging.getLogger(__name__)


def open_saved(
    request: VideoRequest, image: np.ndarray | None, models: Models, settings: Settings, fetch: Fetch
) -> SavedLatents:
    """The latents of `resume_latents`, which this request can go on from.

    `image` is what the request begins with, if it says: its image, or its video's frame at the join.
    A seed that is to be drawn is the latents' own. Raises LatentsError, or what `fetch` raises.
    """
    saved = parse_latents(open_latents(request.resume_latents, settings, fetch, most_bytes(request, models)))
    seed = saved.seed if request.seed in (None, -1) else request.seed
    check_latents(saved, request, _job(request, seed, models), image)
    return saved


@dataclass(frozen=True)
class Handover:
    """Hands out a job's latents, as far as it came, where the request wants them."""

    request: VideoRequest
    seed: int
    models: Models
    settings: Settings
    job_id: str
    check_cancelled: Callable[[], None]
    recorder: Recorder = field(default_factory=Recorder)

    def deliver(self, taken: int = 0) -> dict:
        """The reply's fields for the latents (`Delivery.latents`), none before the first section is sampled.

        The limit on what is inlined holds for them and the `taken` bytes that are in the reply already.
        """
        checkpoint = self.recorder.checkpoint
        if checkpoint is None or not self.request.return_latents:
            return {}
        room = self.settings.inline_limit_mb * MB - taken
        job = _job(self.request, self.seed, self.models)
        with tempfile.TemporaryDirectory(prefix="framepack-") as folder:
            path = Path(folder) / "latents.safetensors"
            try:
                write_latents(path, checkpoint, job, transformer_digest(self.models))
            except OSError as error:
                log.warning("the latents could not be written: %s", error)
                return {"latents_warning": "The latents could not be written: the disk is full or broken."}
            return Delivery(self.settings).latents(
                path, self.job_id, self.request, room, self.check_cancelled
            )

    @contextmanager
    def even_on_errors(self) -> Iterator[None]:
        """An error inside that can be told to the caller takes the latents with it: what was sampled by then
        is not lost to a time-out, a failed encoding or a video that is too large."""
        try:
            yield
        except CancelledError:
            raise
        except WorkerError as error:
            delivered = self.deliver()
            delivered.pop("latents_warning", None)
            raise error.with_details(**delivered) from error.__cause__


def _job(request: VideoRequest, seed: int, models: Models) -> dict:
    direction = request.model or models.profile.direction
    return job_of(request, seed, models, direction, len(plan_video(request, direction).sections))
