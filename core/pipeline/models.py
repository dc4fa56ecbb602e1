"""The models of a profile, loaded and kept ready; which of them are on the GPU when."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from core.errors import LoraError
from core.pipeline.encoding_cache import EncodingCache
from core.pipeline.loading import load, load_transformer, load_weights, naming
from core.pipeline.loras import ChosenLora, LoraCache, fit_loras
from core.pipeline.magnitudes import Curves, curves_of
from core.settings import Settings
from core.weights import files
from core.weights.profiles import Direction, ModelProfile, Source
from diffusers_helper import fp8, memory
from diffusers_helper.compiled import compile_blocks, is_compiled, uncompile_blocks
from diffusers_helper.float8_attention import attend_by
from diffusers_helper.host_memory import free_host_memory
from diffusers_helper.lora import Merge, Updates
from diffusers_helper.text import PromptEncoder, template_crop
from diffusers_helper.transformer import FramePackTransformer
from diffusers_helper.upload import move_to_gpu
from diffusers_helper.vae_fused import fuse_convolutions, kernels_work

log = logging.getLogger(__name__)

MODULES = ("text_encoder", "text_encoder_2", "image_encoder", "vae", "transformer")
STREAMED = ("text_encoder", "transformer")  # too large to move as a whole onto a small card
# the untiled VAE decode at 640×608, the largest user besides weights; and where it is fused
RESIDENT_HEADROOM_GB, FUSED_HEADROOM_GB = 22.0, 11.0
ENCODER_HEADROOM_GB = 1.5  # activations of the text encoders for a few hundred tokens, and cuBLAS
HOST_HEADROOM_GB = 12.0  # a job's frames (4.2 GB for two minutes at 640), LoRAs, ffmpeg, and room to spare


LoraSet = list[tuple[tuple[int, ...], float]]  # files and weights


class Models:
    """All models of one worker. One job at a time may use them.

    Attributes are the hub folders' names: tokenizer, text_encoder, tokenizer_2, text_encoder_2, vae,
    feature_extractor, image_encoder; `transformer` is the one for `direction`, `magnitudes` are its curves
    for MagCache. The other direction's stays loaded once it was used, where memory allows. `encodings` has
    what the encoders made for earlier jobs.
    """

    def __init__(
        self,
        profile: ModelProfile,
        device: torch.device,
        memory_mode: str = "auto",
        settings: Settings | None = None,
    ) -> None:
        """Load everything, from where `settings` have it. Raises ModelError naming what is missing or broken.

        Files are looked for and looked at before the first is loaded.
        """
        started = time.perf_counter()
        self.profile = profile
        self.device = device
        self._settings = settings or Settings()
        self.encodings = EncodingCache(self._settings.encoding_cache_mb * 1e6)
        gpu = device.type == "cuda"
        self.encoder_dtype = torch.float16 if gpu else torch.float32
        self.transformer_dtype = torch.bfloat16 if gpu else torch.float32

        hunyuan, redux = self._folder(profile.hunyuan), self._folder(profile.redux)
        transformer = self._folder(profile.transformers[profile.direction])
        half = self.encoder_dtype
        self.tokenizer = load(PreTrainedTokenizerFast, hunyuan / "tokenizer")
        self.tokenizer_2 = load(CLIPTokenizer, hunyuan / "tokenizer_2")
        self.feature_extractor = load(SiglipImageProcessorPil, redux / "feature_extractor")
        with naming(hunyuan / "tokenizer"):
            template_crop(self.tokenizer)
        self.text_encoder = load_weights(PromptEncoder, hunyuan / "text_encoder", dtype=half)
        self.text_encoder_2 = load_weights(CLIPTextModel, hunyuan / "text_encoder_2", dtype=half)
        self.vae = load_weights(AutoencoderKLHunyuanVideo, hunyuan / "vae", torch_dtype=half)
        fuse_convolutions(self.vae)
        self.image_encoder = load_weights(SiglipVisionModel, redux / "image_encoder", dtype=half)
        self.direction: Direction = profile.direction
        self._magnitudes: WeakKeyDictionary[nn.Module, Curves] = WeakKeyDictionary()
        self.transformer: FramePackTransformer | None = self._load_transformer(transformer)
        self._idle: dict[Source, FramePackTransformer] = {}  # loaded and not in use, the longest idle first
        self.lora_cache = LoraCache()
        # what was merged into a transformer, and for which LoRAs; None where that was broken off
        self._merges: WeakKeyDictionary[nn.Module, tuple[Merge | None, LoraSet | None]] = WeakKeyDictionary()

        # for what runs beside a job's steps: cuDNN's plans are their thread's, and memory its stream's
        self.decode_thread = ThreadPoolExecutor(1, "decode")
        self.decode_stream = torch.cuda.Stream(device) if gpu else None

        self._not_compiled = "" if self._settings.compile == "on" else "it is off"  # and why
        self.memory_mode = ""
        mode = self._fitting_mode() if memory_mode == "auto" else memory_mode
        self._quantise(self.transformer, mode)
        self.set_memory_mode(mode)
        self.load_seconds = time.perf_counter() - started

    @property
    def precision(self) -> str:
        """Of the transformer: fp8, or its dtype."""
        return "fp8" if fp8.is_fp8(self.transformer) else _name(self.transformer_dtype)

    @property
    def compiled(self) -> bool:
        """Whether the transformer's blocks are."""
        return is_compiled(self.transformer)

    @property
    def attention(self) -> str:
        """The kernel by which the transformer's blocks attend."""
        return self.transformer.kernels[0]

    @property
    def warnings(self) -> list[str]:
        """What this device cannot do of what the settings ask, for every reply."""
        found = []
        if self.precision == "fp8" and not fp8.multiplies(self.transformer):
            found.append(
                f"The transformer's weights are fp8, its products {_name(self.transformer_dtype)}, since the "
                "worker's device has none in fp8: this saves memory, and no time."
            )
        if self._settings.compile == "on" and not self.compiled:
            why = self._not_compiled or "in swap mode the blocks' weights come and go"
            found.append(f"The transformer's blocks are not compiled: {why}.")
        if self._settings.attention not in ("auto", self.attention):
            found.append(
                f"The transformer attends by torch's {self.attention} kernel, since its "
                f"{self._settings.attention} kernel does not work on the worker's device."
            )
        return found

    @property
    def magnitudes(self) -> Curves:
        return self._magnitudes[self.transformer]

    @magnitudes.setter
    def magnitudes(self, curves: Curves) -> None:
        self._magnitudes[self.transformer] = curves

    def use_direction(self, direction: Direction) -> None:
        """Have the transformer for `direction`, loading it where it is not loaded.

        Others make room for it, the longest idle first, only where memory is short. Raises ModelError; the
        transformer in use then stays, if there was room for both, or is loaded again when it is asked for.
        """
        source = self.profile.transformers[direction]
        if self.transformer is None or source != self.profile.transformers[self.direction]:
            transformer = self._idle.get(source) or self._load_another(source)
            if self.transformer is not None:
                self._idle[self.profile.transformers[self.direction]] = self.transformer
            self._idle.pop(source, None)
            self.transformer = transformer
        self.direction = direction

    def use_loras(self, loras: Sequence[ChosenLora], check: Callable[[], None] = lambda: None) -> None:
        """Have these LoRAs, and no others, in the transformer's weights.

        They stay there until others, or none, are asked for; so does what is left of a merge that was broken
        off. Raises LoraError before anything is changed, ModelError where only loading the transformer anew
        can remove what is there, and what `check` raises.
        """
        if self.transformer is None:
            self.use_direction(self.direction)
        updates, _ = fit_loras(self.transformer, loras)
        wanted = [(chosen.file, chosen.weight) for chosen in loras if chosen.weight]
        _, present = self._merges.get(self.transformer, (None, []))
        if present != wanted:
            if fp8.is_fp8(self.transformer):
                memory.forget(self.transformer)  # it gets other parameters, which are to be streamed too
            self._remove_loras()
            if wanted:
                self._merge_loras(updates, wanted, check)

    def do_without_compiling(self, why: str) -> None:
        """From now on no transformer's blocks are compiled; replies give `why`."""
        self._not_compiled = why
        for model in (self.transformer, *self.idle):
            if model is not None:
                self._compile(model)

    def drop_transformers(self) -> None:
        """Free them all; `use_direction` loads them anew."""
        if self.transformer is not None:
            self._idle[self.profile.transformers[self.direction]] = self.transformer
            self.transformer = None
        self._drop_idle()

    @property
    def idle(self) -> list[FramePackTransformer]:
        """Loaded and not in use; they go where their memory is needed."""
        return [*self._idle.values()]

    def has_gpu_memory(self, needed: int) -> bool:
        """Whether `needed` bytes are free on the GPU, idle transformers dropped if that makes it so."""
        free = memory.free_gpu_memory(self.device)
        idle = sum(map(memory.weight_bytes, self.idle)) if self.memory_mode == "resident" else 0
        if free < needed <= free + idle:
            self._drop_idle()
            free = memory.free_gpu_memory(self.device)
        return free >= needed

    def set_memory_mode(self, mode: str) -> None:
        """`resident`: every model stays on the GPU. `swap`: each is there only while it is used.

        On a CPU there is only `resident`. Idle transformers are dropped: it is for lack of memory that a
        worker changes its mode.
        """
        mode = "resident" if self.device.type == "cpu" else mode
        if mode == self.memory_mode:
            return
        self._drop_idle()
        for module in self.modules():
            if mode == "resident":
                memory.forget(module)
            else:
                module.to("cpu")
        if mode == "resident":
            move_to_gpu(self.modules(), self.device)
        self.memory_mode = mode
        if self.transformer is not None:
            self._compile(self.transformer)
        memory.release_unused_memory(self.device)

    @contextmanager
    def on_device(self, *names: str, preserved_gb: float = ENCODER_HEADROOM_GB) -> Iterator[None]:
        """These models are ready to run on `device` inside the block; in swap mode they leave it after.

        `preserved_gb` of GPU memory stay free of streamed models' weights, for the activations.
        """
        if self.memory_mode == "resident":
            yield
            return
        modules = [(name, getattr(self, name)) for name in names]
        try:
            for name, module in modules:
                if name in STREAMED:
                    blocks = memory.DynamicSwapInstaller.install_model(module, self.device, preserved_gb)
                    log.debug("%s: %d blocks stay on the GPU", name, blocks)
                else:
                    memory.load_model_as_complete(module, self.device)
            yield
        finally:
            for name, module in modules:
                if name in STREAMED:
                    memory.DynamicSwapInstaller.uninstall_model(module)
                else:
                    memory.unload_complete_models(module)
            memory.release_unused_memory(self.device)

    def modules(self) -> list[nn.Module]:
        """All that are loaded and have weights."""
        return [module for name in MODULES if (module := getattr(self, name)) is not None]

    @property
    def _headroom(self) -> float:
        """Bytes of the GPU's memory that resident models leave to a job."""
        return (FUSED_HEADROOM_GB if kernels_work(self.device) else RESIDENT_HEADROOM_GB) * memory.GB

    def _fitting_mode(self) -> str:
        if self.device.type == "cpu":
            return "resident"
        needed = sum(map(memory.weight_bytes, self.modules())) + self._headroom
        if self._settings.precision == "fp8":
            needed -= fp8.saved_bytes(self.transformer)
        return "resident" if memory.free_gpu_memory(self.device) >= needed else "swap"

    def _folder(self, source: Source) -> Path:
        """Where the source's files are, all there and none cut short."""
        folder = files.locate(source, self._settings)
        files.check_files(folder, source)
        return folder

    def _merge_loras(self, updates: Updates, wanted: LoraSet, check: Callable[[], None]) -> None:
        merge = Merge(self.transformer, updates, self._host_can_keep)
        self._merges[self.transformer] = merge, None
        try:
            merge.apply(self.transformer, self.device, check)
        except ValueError as error:
            raise LoraError(f"The LoRAs cannot be applied: {error}.") from None
        self._merges[self.transformer] = merge, wanted

    def _remove_loras(self) -> None:
        merge, _ = self._merges.get(self.transformer, (None, None))
        if merge is not None and merge.undo(self.transformer):
            del self._merges[self.transformer]
        elif merge is not None:
            self._drop_transformer()
            self.use_direction(self.direction)

    def _host_can_keep(self, size: int) -> bool:
        """Whether so many bytes fit into host memory beside what a job needs, and what swap mode would."""
        on_gpu = self.device.type == "cuda" and self.memory_mode == "resident"
        coming = self.modules() if on_gpu else self._unpinned()
        needed = size + sum(map(memory.weight_bytes, coming)) + HOST_HEADROOM_GB * memory.GB
        return free_host_memory() >= needed

    def _unpinned(self) -> list[nn.Module]:
        """In swap mode, what is mapped from its file perhaps and takes host memory once it is pinned."""
        swap = self.memory_mode == "swap"
        return [module for module in self.modules() if swap and not memory.is_pinned(module)]

    def _load_another(self, source: Source) -> FramePackTransformer:
        folder = self._folder(source)
        while self._idle and not self._room_for_another():
            self._drop_idle(count=1)
        if self.transformer is not None and not self._room_for_another():
            self._drop_transformer()
        transformer = self._load_transformer(folder)
        self._quantise(transformer, self.memory_mode)
        if self.memory_mode == "resident":
            move_to_gpu([transformer], self.device)
        self._compile(transformer)
        return transformer

    def _room_for_another(self) -> bool:
        """Whether a transformer of this one's size fits beside all that is loaded, and a job beside both."""
        if self.transformer is None or not self._settings.keep_both_models:
            return False
        needed = memory.weight_bytes(self.transformer)
        if self.device.type == "cuda" and self.memory_mode == "resident":
            return memory.free_gpu_memory(self.device) >= needed + self._headroom
        return self._host_can_keep(needed)

    def _drop_idle(self, count: int | None = None) -> None:
        if not self._idle:
            return
        for source in [*self._idle][:count]:
            memory.forget(self._idle.pop(source))
        memory.release_dropped_models(self.device)

    def _drop_transformer(self) -> None:
        if self.transformer is not None:
            memory.forget(self.transformer)
            self.transformer = None
            memory.release_dropped_models(self.device)

    def _load_transformer(self, folder: Path) -> FramePackTransformer:
        """As its files have it, on the CPU."""
        model = load_transformer(folder, self.transformer_dtype)
        model.output_in_float32()
        attend_by(model, self._settings.attention, self.device, self.transformer_dtype)
        self._magnitudes[model] = curves_of(folder, model.config)
        return model

    def _compile(self, model: FramePackTransformer) -> None:
        """Where the settings say so, and the weights stay: hooks that stream them are nothing to compile."""
        if self.memory_mode == "resident" and not self._not_compiled:
            compile_blocks(model)
        else:
            uncompile_blocks(model)

    def _quantise(self, model: FramePackTransformer, mode: str) -> None:
        """Put it into float8 where the settings say so, and its weights in float8 where the mode has them."""
        if self._settings.precision == "fp8":
            home = self.device if mode == "resident" else torch.device("cpu")
            fp8.quantise_linears(model, self.device, home)
        if fp8.is_fp8(model):
            fp8.multiply_in_fp8(model, fp8.can_multiply(self.device))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
