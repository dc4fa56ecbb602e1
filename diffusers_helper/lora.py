"""Low-rank adaptations: read from a file's tensors, fitted to a model's modules, added to its weights.

W ← W + weight · (alpha / rank) · up · down, summed in float32 over all LoRAs and rounded once to W's dtype.
Beside a W in float8, where most of a small change would be rounded away, the product is a term of its own.
Everything that is wrong with a file is a ValueError that names the key.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from diffusers_helper.fp8 import Fp8Linear
from diffusers_helper.lora_names import Piece, module_names

PREFIX = re.compile(
    r"(base_model\.model\.|model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_|lora_transformer_)*"
)
PART = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<down>(?:lora_A|lora_down|lora\.down)(?:\.default)?\.weight)|"
    r"(?P<up>(?:lora_B|lora_up|lora\.up)(?:\.default)?\.weight)|"
    r"(?P<alpha>alpha))"
)
OTHER_KINDS = re.compile(r"dora_scale|lora_magnitude_vector|\.lokr_|\.hada_|\.oft_|\.lora_mid\.")
ADAPTER = "lora_adapter_metadata"  # where diffusers writes PEFT's configuration, as JSON
SHOWN = 100  # characters of a key


@dataclass(frozen=True)
class Layer:
    """One module's adaptation: `scale` · up (outputs, r, …) · down (r, inputs, …)."""

    key: str  # what the file calls the module
    down: torch.Tensor
    up: torch.Tensor
    scale: float  # alpha / rank

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """A file's layers by their module's name without prefix, and keys that are part of none."""

    layers: dict[str, Layer]
    others: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.down.nbytes + layer.up.nbytes for layer in self.layers.values())


class Update(NamedTuple):
    """`weight[start:stop] += factor · up · down`, with up (stop − start, r) and down (r, inputs)."""

    start: int
    stop: int
    up: torch.Tensor
    down: torch.Tensor
    factor: float


Updates = dict[str, list[Update]]  # by module


@dataclass(frozen=True)
class Fit:
    """Which of a LoRA's layers belong to a model's modules, and where."""

    layers: tuple[tuple[Layer, tuple[Piece, ...]], ...]
    unmatched: tuple[str, ...]  # the file's own names for the rest

    @property
    def ranks(self) -> list[int]:
        return sorted({layer.rank for layer, _ in self.layers})

    def updates(self, weight: float) -> Updates:
        found: Updates = {}
        for layer, pieces in self.layers:
            up, down, row = layer.up.flatten(1), layer.down.flatten(1), 0
            for module, start, stop in pieces:
                rows = up[row : row + stop - start]
                row += stop - start
                found.setdefault(module, []).append(Update(start, stop, rows, down, weight * layer.scale))
        return found


def is_part(key: str) -> bool:
    """Whether a tensor of this name is part of a LoRA as they are read here."""
    return PART.fullmatch(key) is not None


def parse_lora(
    tensors: Mapping[str, torch.Tensor], others: Sequence[str], metadata: Mapping[str, str]
) -> Lora:
    """From the tensors for which `is_part`, the keys of the other ones, and the file's metadata."""
    for key in [*tensors, *others]:
        if OTHER_KINDS.search(key):
            raise ValueError(
                f"`{shown(key)}` is of a kind that is not supported (DoRA, LoKr, LoHa or the like)"
            )
    parts: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = PART.fullmatch(key)
        role, module = match.lastgroup, match["module"]
        module = module[PREFIX.match(module).end() :]
        if parts.setdefault(module, {}).setdefault(role, key) != key:
            raise ValueError(f"`{shown(key)}` is there twice, also as `{shown(parts[module][role])}`")
    scaling = _Scaling(metadata)
    return Lora(
        {module: _layer(module, keys, tensors, scaling) for module, keys in parts.items()}, tuple(others)
    )


def fit(lora: Lora, model: nn.Module) -> Fit:
    """Find the modules of each layer. ValueError where one has another shape than its module."""
    names = module_names(model)
    fitting = tuple((layer, names[name]) for name, layer in lora.layers.items() if name in names)
    for layer, pieces in fitting:
        weight = model.get_submodule(pieces[0].module).weight
        expected = sum(piece.stop - piece.start for piece in pieces), weight[0].numel()
        found = layer.up.shape[0], layer.down[0].numel()
        if found != expected:
            raise ValueError(
                f"`{shown(layer.key)}` is for {found[1]} inputs and {found[0]} outputs, and the model's "
                f"module has {expected[1]} and {expected[0]}"
            )
    rest = [layer.key for name, layer in lora.layers.items() if name not in names]
    return Fit(fitting, (*rest, *lora.others))


class Merge:
    """Updates added to a model's weights in place, and their undoing.

    In place, so that host copies which are streamed to the GPU, and pinned where they lie, are the ones
    changed; the model must be off the GPU, or there for good. The originals are kept in host memory unless
    `keep_originals` is false, in which case only loading the model anew undoes it. Float8 layers keep their
    weights and get a low-rank term, a new parameter.
    """

    def __init__(self, model: nn.Module, updates: Updates, keep_originals: Callable[[int], bool]) -> None:
        """`keep_originals` is asked with the number of bytes."""
        self._updates = updates
        self._beside = [name for name in updates if isinstance(model.get_submodule(name), Fp8Linear)]
        size = sum(_weight(model, module).nbytes for module in updates if module not in self._beside)
        self._originals: dict[str, torch.Tensor] | None = {} if not size or keep_originals(size) else None

    def apply(self, model: nn.Module, device: torch.device, check: Callable[[], None]) -> None:
        """Add them, computing on `device`. `check` runs before each module and may raise; then `undo`.

        Raises ValueError where a sum is too large for the weights' type; then `undo` as well.
        """
        for module, updates in self._updates.items():
            check()
            if module in self._beside:
                layer = model.get_submodule(module)
                layer.add_low_rank(*_finite(module, *_low_rank(updates, layer, device)))
                continue
            weight = _weight(model, module)
            if self._originals is not None:
                self._originals[module] = weight.to("cpu", copy=True)
            merged = weight.to(device, torch.float32, copy=True)
            rows = merged.flatten(1)
            for start, stop, up, down, factor in updates:
                up, down = (matrix.to(device).float() for matrix in (up, down))
                rows[start:stop].addmm_(up, down, alpha=factor)
            weight.copy_(*_finite(module, merged.to(weight.dtype)))
        self._updates = {}  # the matrices are the cache's to keep

    def undo(self, model: nn.Module) -> bool:
        """Put the originals back, bit for bit. False where there are none."""
        if self._originals is None:
            return False
        for module, original in self._originals.items():
            _weight(model, module).copy_(original)
        for module in self._beside:
            model.get_submodule(module).remove_low_rank()
        return True


def shown(key: str) -> str:
    """What can be shown of a key on one line."""
    text = "".join(c if c.isprintable() and c != "`" else "?" for c in key[:SHOWN])
    return text if len(key) <= SHOWN else f"{text[:-3]}..."


def _weight(model: nn.Module, module: str) -> torch.Tensor:
    return model.get_submodule(module).weight.data


def _low_rank(
    updates: Sequence[Update], layer: Fp8Linear, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's updates as a single product up · down, in the dtype that it is computed in."""
    ups = []
    for start, stop, up, _, factor in updates:
        ups.append(torch.zeros(layer.out_features, up.shape[1], device=device))
        ups[-1][start:stop] = factor * up.to(device).float()
    downs = [update.down.to(device).float() for update in updates]
    return torch.cat(ups, dim=1).to(layer.dtype), torch.cat(downs).to(layer.dtype)


def _finite(module: str, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not all(matrix.isfinite().all() for matrix in matrices):
        raise ValueError(f"added to `{module}` it gives weights that are not finite")
    return matrices


def _layer(
    module: str, keys: dict[str, str], tensors: Mapping[str, torch.Tensor], scaling: "_Scaling"
) -> Layer:
    for role, other in (("down", "up"), ("up", "down"), ("alpha", "down")):
        if role in keys and other not in keys:
            raise ValueError(f"`{shown(keys[role])}` is there without its {other} matrix")
    for role, key in keys.items():
        tensor = tensors[key]
        if role != "alpha" and (not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel()):
            raise ValueError(f"`{shown(key)}` is no matrix: {tensor.dtype}, shape {tuple(tensor.shape)[:6]}")
        if role == "alpha" and tensor.numel() != 1:
            raise ValueError(f"`{shown(key)}` is no number: shape {tuple(tensor.shape)[:6]}")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"`{shown(key)}` has values that are not finite")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    rank = down.shape[0]
    if up[0].numel() != rank:
        raise ValueError(
            f"`{shown(keys['up'])}` has rank {up[0].numel()}, and `{shown(keys['down'])}` has {rank}"
        )
    alpha = tensors[keys["alpha"]].item() if "alpha" in keys else None
    name = keys["down"][: PART.fullmatch(keys["down"]).end("module")]
    return Layer(name, down, up, scaling.of(module, rank, alpha))


class _Scaling:
    """alpha / rank: the file's own alpha, else PEFT's configuration in its metadata, else alpha = rank."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            config = json.loads(metadata.get(ADAPTER, "{}"))
        except (ValueError, RecursionError):
            raise ValueError(f"its metadata `{ADAPTER}` is no JSON") from None
        config = config if isinstance(config, dict) else {}
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        if config.get("use_dora"):
            raise ValueError("it is a DoRA, which is not supported")
        self._alpha = config.get("lora_alpha")
        self._by_module = config.get("alpha_pattern") or {}
        self._root = bool(config.get("use_rslora"))
        numbers = [self._alpha, *(self._by_module.values() if isinstance(self._by_module, dict) else ["?"])]
        if not all(value is None or _is_number(value) for value in numbers):
            raise ValueError(f"its metadata `{ADAPTER}` has an alpha that is no number")

    def of(self, module: str, rank: int, alpha: float | None) -> float:
        if alpha is not None:
            return alpha / rank
        alpha = next((a for name, a in self._by_module.items() if _is_below(module, name)), self._alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._root else rank)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_below(module: str, name: str) -> bool:
    """PEFT's pattern for a plain name; expressions are not looked at, as a file is a stranger's."""
    return module == name or module.endswith(f".{name}")
