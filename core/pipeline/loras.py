"""The LoRAs of a job: read once and kept in memory within bounds, fitted to the transformer, reported."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from core.deadline import Deadline
from core.errors import LoraError, LoraNotApplicableError
from core.lora_files import MB, locate_lora, shown_name
from core.request import LoraChoice
from core.settings import Settings
from diffusers_helper.lora import Lora, Updates, fit, is_part, parse_lora, shown

SHOWN_KEYS = 5  # of those that match nothing


@dataclass(frozen=True)
class ChosenLora:
    name: str  # as it is told
    weight: float
    file: tuple[int, ...]  # tells it from other files, and from itself once it was changed
    lora: Lora


class LoraCache:
    """The LoRAs used last, as tensors in host memory, at most `max_bytes` of them."""

    def __init__(self) -> None:
        self._loras: OrderedDict[tuple[int, ...], Lora] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(lora.nbytes for lora in self._loras.values())

    def get(self, file: tuple[int, ...], read: Callable[[], Lora], max_bytes: int) -> Lora:
        """The LoRA in `file`, from memory or by `read`."""
        lora = self._loras.pop(file, None) or read()
        self._loras[file] = lora
        while self.nbytes > max_bytes:
            self._loras.popitem(last=False)
        return lora


def load_loras(
    choices: Sequence[LoraChoice],
    settings: Settings,
    cache: LoraCache,
    deadline: Deadline,
    check: Callable[[], None],
) -> tuple[ChosenLora, ...]:
    """Find, fetch and read them. Raises LoraError, and for URLs UrlRefusedError and DownloadError."""
    chosen, most = [], int(settings.lora_max_mb * MB)
    left = most
    for choice in choices:
        check()
        path = locate_lora(choice, settings, left, deadline.left, check)
        name, status = shown_name(choice), path.stat()
        left -= status.st_size
        file = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        lora = cache.get(file, lambda path=path, name=name: _read(path, name), most)
        chosen.append(ChosenLora(name, choice.weight, file, lora))
    return tuple(chosen)


def fit_loras(transformer: nn.Module, loras: Sequence[ChosenLora]) -> tuple[Updates, list[dict[str, Any]]]:
    """What is to be added to which module, and what the reply says of each LoRA.

    Raises LoraError where a layer has the wrong shape, LoraNotApplicableError where none is the model's.
    """
    updates: Updates = {}
    told = []
    for chosen in loras:
        try:
            fitted = fit(chosen.lora, transformer)
        except ValueError as error:
            raise LoraError(f"The LoRA {chosen.name} does not fit: {error}.") from None
        unmatched = {"count": len(fitted.unmatched), "first": [*map(shown, fitted.unmatched[:SHOWN_KEYS])]}
        if not fitted.layers:
            such = f", such as `{unmatched['first'][0]}`" if unmatched["first"] else ""
            raise LoraNotApplicableError(
                f"The LoRA {chosen.name} has no layer of this model; {unmatched['count']} are others{such}."
            )
        if chosen.weight:
            for module, added in fitted.updates(chosen.weight).items():
                updates.setdefault(module, []).extend(added)
        told.append(
            {
                "name": chosen.name,
                "weight": chosen.weight,
                "matched": len(fitted.layers),
                "unmatched": unmatched,
                "ranks": fitted.ranks,
            }
        )
    return updates, told


def lora_warnings(told: Sequence[dict[str, Any]]) -> list[str]:
    """What of the LoRAs had no effect."""
    warnings = []
    for lora in told:
        if not lora["weight"]:
            warnings.append(f"The LoRA {lora['name']} had no effect: its weight is 0.")
        if count := lora["unmatched"]["count"]:
            warnings.append(
                f"{count} names in the LoRA {lora['name']} are none of the model's and had no effect; "
                f"{lora['matched']} of its layers are."
            )
    return warnings


def _read(path: Path, name: str) -> Lora:
    """Copies, since a mapped file that somebody rewrites would end the process."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            keys = file.keys()
            tensors = {key: file.get_tensor(key).clone() for key in keys if is_part(key)}
            return parse_lora(tensors, [key for key in keys if key not in tensors], file.metadata() or {})
    except (SafetensorError, OSError, TypeError, AttributeError, RuntimeError) as error:
        raise LoraError(f"The LoRA {name} is damaged, or of a type of numbers that is not known.") from error
    except ValueError as error:
        raise LoraError(f"The LoRA {name} cannot be used: {error}.") from None
