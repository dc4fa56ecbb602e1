"""Where a video's finished clips wait until it is encoded: in memory, and beyond a bound on the disk."""

import errno
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

log = logging.getLogger(__name__)

IN_MEMORY = 1_000_000_000  # bytes; at 640×608 28 seconds of video, 120 seconds being 4.2 GB
LEFT_FREE = 2_000_000_000  # bytes of the disk, for the MP4 and for others


class ClipStore:
    """Holds uint8 clips, the first of them in memory, and those that would be over `in_memory` in a file.

    The file lies in `folder` without a name, so that it goes with this object, or with the process. A disk
    that is full, or would be nearly so, costs nothing but memory: the clip stays there.
    """

    def __init__(self, folder: Path, in_memory: int = IN_MEMORY, left_free: int = LEFT_FREE) -> None:
        self._folder = folder
        self._in_memory = in_memory
        self._left_free = left_free
        self._file = None
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0

    def hold(self, clip: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Keep `clip`; returns what gives it back, any number of times."""
        if self.bytes_in_memory + clip.nbytes > self._in_memory:
            try:
                return self._write(clip)
            except OSError as error:
                log.warning("a clip of %d bytes stays in memory: %s", clip.nbytes, error.strerror)
        self.bytes_in_memory += clip.nbytes
        return lambda: clip

    def _write(self, clip: torch.Tensor) -> Callable[[], torch.Tensor]:
        if shutil.disk_usage(self._folder).free < clip.nbytes + self._left_free:
            raise OSError(errno.ENOSPC, "the disk has too little room")
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="framepack-", dir=self._folder, buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        file, offset, shape = self._file, self.bytes_on_disk, clip.shape
        try:
            file.seek(offset)
            _all(file.write, clip.contiguous())
        except OSError:
            with suppress(OSError):
                file.truncate(offset)
            raise
        self.bytes_on_disk += clip.nbytes

        def read() -> torch.Tensor:
            clip = torch.empty(shape, dtype=torch.uint8)
            file.seek(offset)
            _all(file.readinto, clip)
            return clip

        return read


def _all(transfer: Callable[[memoryview], int], clip: torch.Tensor) -> None:
    """Write or read a whole clip; one call of the system transfers 2 GB at most."""
    rest = memoryview(clip.view(-1).numpy())
    while rest:
        if not (count := transfer(rest)):
            raise OSError(errno.EIO, "the file of finished clips ended early")
        rest = rest[count:]
