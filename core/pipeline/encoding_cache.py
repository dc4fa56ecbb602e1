"""Encoded prompts and images, kept in host memory from job to job. Knows no model and makes none of them."""

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np


class EncodingCache:
    """The encodings used last, of at most `max_bytes` in all; with 0 none.

    Values have `nbytes` and lie on the CPU; whoever gets one must not change it in place.
    """

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._encodings: OrderedDict[bytes, Any] = OrderedDict()
        self.nbytes = 0

    def get(self, key: bytes) -> Any | None:
        """What was kept under `key` (`content_key`), which then counts as just used."""
        if key not in self._encodings:
            return None
        self._encodings.move_to_end(key)
        return self._encodings[key]

    def keep(self, key: bytes, encoding: Any) -> None:
        """Remember `encoding` under a new key, at the cost of those not used for longest."""
        if encoding.nbytes > self._max_bytes:
            return
        self._encodings[key] = encoding
        self.nbytes += encoding.nbytes
        while self.nbytes > self._max_bytes:
            _, dropped = self._encodings.popitem(last=False)
            self.nbytes -= dropped.nbytes


def content_key(kind: str, content: str | np.ndarray) -> bytes:
    """A hash of a text, or of an image's pixels and size; `kind` says what is made of it."""
    if isinstance(content, str):
        shape, data = "", content.encode("utf-8")
    else:
        shape, data = str(content.shape), np.ascontiguousarray(content)
    digest = hashlib.sha256(f"{kind} {shape} ".encode())
    digest.update(data)
    return digest.digest()
