"""Where a job stands between two sections: all that another job needs to go on exactly as it would have."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Checkpoint:
    """A job's state after `count` sections. TeaCache's state is a section's own, so none of it is here."""

    image: np.ndarray  # (H, W, 3) uint8, cropped: what was encoded
    start_latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU
    sections: tuple[torch.Tensor, ...]  # each (1, 16, W, H/8, W/8) as it was sampled, in sampling order
    generator_state: torch.Tensor  # of the CPU generator that the next section's noise comes from; uint8

    @property
    def count(self) -> int:
        return len(self.sections)


class Recorder:
    """Collects a running job's checkpoint, section by section."""

    def __init__(self) -> None:
        self._image: np.ndarray | None = None
        self._start: torch.Tensor | None = None
        self._sections: list[torch.Tensor] = []
        self._generator_state: torch.Tensor | None = None

    def begin(self, image: np.ndarray, start_latent: torch.Tensor) -> None:
        """An attempt starts; what an earlier one left is forgotten."""
        self._image, self._start, self._sections = image, start_latent, []

    def add(self, latents: torch.Tensor, generator_state: torch.Tensor) -> None:
        """A section (1, 16, W, H/8, W/8) was sampled, and left the generator in this state."""
        self._sections.append(latents)
        self._generator_state = generator_state

    @property
    def checkpoint(self) -> Checkpoint | None:
        """None before the first section is sampled."""
        if not self._sections:
            return None
        return Checkpoint(
            image=self._image,
            start_latent=self._start,
            sections=tuple(self._sections),
            generator_state=self._generator_state,
        )
