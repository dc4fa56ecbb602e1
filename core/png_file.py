"""A frame → one PNG."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEYWORD = "Comment"  # of the text chunk that has the parameters; PNG's own name for such


class PngWriter:
    """Writes the one frame it is given to `path`."""

    def __init__(self, path: Path, parameters: str | None = None) -> None:
        self._path = path
        self._texts = PngInfo()
        if parameters is not None:
            self._texts.add_itxt(KEYWORD, parameters)
        self._frame: np.ndarray | None = None

    def write(self, frame: np.ndarray) -> None:
        """(H, W, 3) uint8. Raises ValueError for a second one."""
        if self._frame is not None:
            raise ValueError("a PNG holds one frame")
        self._frame = frame

    def finish(self) -> None:
        """Raises OSError."""
        Image.fromarray(self._frame).save(self._path, "PNG", pnginfo=self._texts)

    def stop(self) -> None:
        self._frame = None
