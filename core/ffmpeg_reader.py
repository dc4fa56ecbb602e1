"""ffmpeg as a process that decodes a stranger's file: what it may open and use, and how it is watched.

It is given one open descriptor and no name, no protocol but that descriptor's, one demuxer and few decoders:
a file that names others, or a playlist, leads nowhere. Frames larger than `MAX_PIXELS` are refused by the
decoder before it has memory for them, and whatever else a file claims to have many of ends at `MAX_MEMORY`.
"""

import os
import resource
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from core.ffmpeg import executable

MAX_PIXELS = 4096 * 2304  # of a frame: 4K, with what its codec rounds up to
MAX_MEMORY = 2 * 1024**3  # bytes; an H.265 video of such frames, 4:4:4 in 12 bits, took 0.65 GB
DECODERS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "gif")
THREADS = 4
TICK_S = 0.25  # how soon a cancel is noticed while waiting
EXIT_S = 5.0  # from the end of the frames to that of the process
MAX_MESSAGES = 4096  # bytes of what ffmpeg says last


class DecodingError(Exception):
    """ffmpeg gave up; `str(error)` is what it said, for a look and not for the caller."""


class FfmpegReader:
    """Decodes the first video stream of `file`, which may lie anywhere in it, into a pipe."""

    def __init__(
        self, file: BinaryIO, demuxer: str, output: Sequence[str], check: Callable[[], None], timeout_s: float
    ) -> None:
        """`output` says what is made of the frames. `check` is called before every read, several times a
        second, and may raise; more than `timeout_s` spent waiting for frames, in all, are a TimeoutError.

        Raises OSError where there is no ffmpeg.
        """
        self._check = check
        self._left_s = timeout_s
        self._messages = b""
        threads = str(THREADS)
        # opened anew, so that several readers have each a position of its own
        source = os.open(f"/dev/fd/{file.fileno()}", os.O_RDONLY)
        try:
            os.lseek(source, 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                [
                    *(executable(), "-v", "error", "-nostdin", "-xerror", "-filter_threads", threads),
                    *("-threads", threads, "-max_pixels", str(MAX_PIXELS)),
                    *("-protocol_whitelist", "fd", "-codec_whitelist", ",".join(DECODERS), "-f", demuxer),
                    *("-fd", str(source), "-i", "fd:", "-map", "0:V:0"),  # V: no picture of a cover
                    *(*output, "pipe:1"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[source],
                process_group=0,  # a Ctrl-C at a terminal is the worker's to handle
                bufsize=0,
            )
        finally:
            os.close(source)
        if hasattr(resource, "prlimit"):  # on Linux
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer`; fewer bytes are read where the stream ends.

        Raises DecodingError where ffmpeg ended with an error.
        """
        read = 0
        while read < len(buffer):
            self._wait()
            count = os.readv(self._process.stdout.fileno(), [buffer[read:]])
            if not count:
                self._finish()
                break
            read += count
        return read

    def stop(self) -> None:
        """End it at once, if it still runs."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()

    def _wait(self) -> None:
        """Until there is something to read; what ffmpeg has to say must not fill its pipe meanwhile."""
        stdout, stderr = self._process.stdout, self._process.stderr
        pipes = [stdout, stderr]
        while True:
            self._check()
            began = time.monotonic()
            ready, _, _ = select.select(pipes, [], [], TICK_S)
            self._left_s -= time.monotonic() - began
            if self._left_s <= 0:
                raise TimeoutError("decoding took too long")
            if stdout in ready:
                return
            if stderr in ready and not self._hear():
                pipes = [stdout]

    def _hear(self) -> bool:
        """Take what ffmpeg says; False once it has closed its pipe."""
        said = os.read(self._process.stderr.fileno(), MAX_MESSAGES)
        self._messages = (self._messages + said)[-MAX_MESSAGES:]
        return bool(said)

    def _finish(self) -> None:
        try:
            _, said = self._process.communicate(timeout=EXIT_S)
        except subprocess.TimeoutExpired:
            raise DecodingError("ffmpeg did not end") from None
        if self._process.returncode:
            messages = (self._messages + said)[-MAX_MESSAGES:]
            raise DecodingError(messages.decode("utf-8", "replace"))
