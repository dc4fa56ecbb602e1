"""The official demo's `worker` without its window, on models given to it, timed stage by stage.

Its checkout (github.com/lllyasviel/FramePack) is read from where it lies; nothing of it is changed, copied or
kept in this repository. It runs with the libraries installed here, not with the ones it pins, and with all
its models on the GPU, as it does by itself with over 60 GB free, unless it is told of less.

What is not its own: `gradio` is an empty stand-in; so is `cv2`, and `torchvision` has a `write_video` over
the same ffmpeg as ours, where they, or PyAV, are missing; the tokenizers are read as ours are
(docs/imp_memo.md, Parity); over our weights (`twins`) its Llama model lacks the last two layers, which ours
never reads: so its prompts are encoded a little faster, to other embeddings. Without a GPU its memory module,
which cannot be imported there, is a stand-in too, and the half precisions it names are float32, as ours are
there.
"""

import copy
import importlib
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import imageio_ffmpeg
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.normalization import AdaLayerNormContinuous, FP32LayerNorm, RMSNorm
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast, SiglipVisionModel
from transformers import SiglipImageProcessorPil as SiglipImageProcessor

from benchmarks.timed_job import TimedJob
from core.pipeline import Models
from diffusers_helper.memory import GB

# by the name of the class that the demo loads it with; the transformer's is given the official class
Makers = dict[str, Callable[..., Any]]

OUR_PACKAGE = "diffusers_helper."
NORMS = (nn.LayerNorm, RMSNorm, FP32LayerNorm, AdaLayerNormContinuous)
_THEIR_FORWARDS: dict[type[nn.Module], Callable] = {}
ENCODERS = ("encode_prompt_conds", "vae_encode", "hf_clip_vision_encode")
ATTENTION = {"sageattn": "sageattention", "flash_attn_func": "flash-attn", "xformers_attn_func": "xformers"}


def twins(models: Models, transformer: nn.Module | None = None) -> Makers:
    """What makes the official demo's models of ours: modules of their own, sharing every weight.

    Those of `transformer` instead of ours where that one is not as its files have it.
    """

    def vae() -> nn.Module:
        copied = sharing_weights(models.vae)
        for module in copied.modules():  # the library's, as the demo has it
            if type(module).__module__.startswith(OUR_PACKAGE):
                module.__class__ = type(module).__base__
        return copied

    return {
        "LlamaModel": lambda: sharing_weights(models.text_encoder),
        "CLIPTextModel": lambda: sharing_weights(models.text_encoder_2),
        "LlamaTokenizerFast": lambda: models.tokenizer,
        "CLIPTokenizer": lambda: models.tokenizer_2,
        "AutoencoderKLHunyuanVideo": vae,
        "SiglipImageProcessor": lambda: models.feature_extractor,
        "SiglipVisionModel": lambda: sharing_weights(models.image_encoder),
        "HunyuanVideoTransformer3DModelPacked": partial(twin_transformer, transformer or models.transformer),
    }


def official_transformer(checkout: Path) -> type[nn.Module]:
    """The class of a checkout's transformer."""
    with _their_packages(checkout.resolve()), _own_norms(), redirect_stdout(io.StringIO()):
        return _packed().HunyuanVideoTransformer3DModelPacked


def twin_transformer(ours: nn.Module, official: type[nn.Module]) -> nn.Module:
    """The official class over our weights' memory."""
    with torch.device("meta"):
        theirs = official.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.high_quality_fp32_output_for_inference = True  # as the demo has it
    return _with_their_norms(theirs)


def from_disk(folder: Path) -> Makers:
    """What loads the official demo's models from `folder`, in the dtypes it asks for."""
    folder = folder.resolve()
    gpu = torch.cuda.is_available()
    half, bfloat16 = (torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.float32)
    hunyuan, redux = folder / "hunyuan", folder / "redux"
    return {
        "LlamaModel": lambda: LlamaModel.from_pretrained(hunyuan / "text_encoder", dtype=half),
        "CLIPTextModel": lambda: CLIPTextModel.from_pretrained(hunyuan / "text_encoder_2", dtype=half),
        "LlamaTokenizerFast": lambda: PreTrainedTokenizerFast.from_pretrained(hunyuan / "tokenizer"),
        "CLIPTokenizer": lambda: CLIPTokenizer.from_pretrained(hunyuan / "tokenizer_2"),
        "AutoencoderKLHunyuanVideo": lambda: AutoencoderKLHunyuanVideo.from_pretrained(
            hunyuan / "vae", torch_dtype=half
        ),
        "SiglipImageProcessor": lambda: SiglipImageProcessor.from_pretrained(redux / "feature_extractor"),
        "SiglipVisionModel": lambda: SiglipVisionModel.from_pretrained(redux / "image_encoder", dtype=half),
        "HunyuanVideoTransformer3DModelPacked": lambda official: _with_their_norms(
            official.from_pretrained(folder / "framepack", torch_dtype=bfloat16)
        ),
    }


class OfficialDemo:
    """`demo_gradio.py` of a checkout, imported with `models` (`twins` or `from_disk`) in place of the hub's.

    `folder` gets what it writes; `free_gb` tells how much GPU memory it takes for free: with 60 GB or less,
    it swaps models that are on the host, those of `from_disk`.
    """

    def __init__(
        self, checkout: Path, models: Makers, folder: Path, free_gb: Callable[[], float] = lambda: math.inf
    ) -> None:
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        checkout, folder = checkout.resolve(), folder.resolve()
        with (
            _their_packages(checkout),
            _own_norms(),
            _half_for(self._device),
            chdir(folder),
            redirect_stdout(io.StringIO()),
        ):
            self._demo = _imported(checkout, models, free_gb)
        self._demo.outputs_folder = str(folder)
        self.transformer: nn.Module = self._demo.transformer
        self.attention = _attention_of(self.transformer)

    def run(self, image: np.ndarray, fields: dict) -> TimedJob:
        """`worker` on (H, W, 3) uint8 and our request's fields. Raises RuntimeError with what it printed."""
        demo = self._demo
        demo.stream = demo.AsyncStream()
        clock = _StageClock(demo, self._device)
        gpu = self._device.type == "cuda"
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        printed = io.StringIO()
        with (
            clock.listening(),
            _half_for(self._device),
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            started = clock.now()
            demo.worker(
                input_image=image,
                prompt=fields["prompt"],
                n_prompt="",
                seed=fields["seed"],
                total_second_length=fields["total_second_length"],
                latent_window_size=fields["latent_window_size"],
                steps=fields["steps"],
                cfg=1.0,
                gs=10.0,
                rs=0.0,
                gpu_memory_preservation=6,
                use_teacache=fields["use_teacache"],
                mp4_crf=fields["mp4_crf"],
            )
            total = clock.now() - started
        if "Traceback" in printed.getvalue() or not clock.mp4:  # it swallows what goes wrong
            raise RuntimeError(f"The official worker failed:\n{printed.getvalue()}")
        return TimedJob(
            encode=clock.encode,
            step=median(clock.steps),
            sample=clock.sample,
            decode=clock.decode,
            mp4=clock.mp4[-1],
            total=total,
            computed=clock.computed,
            peak_gb=torch.cuda.max_memory_allocated(self._device) / GB if gpu else None,
        )


class _StageClock:
    """Listens to the functions that `worker` calls; waits for the GPU before and after each."""

    def __init__(self, demo: ModuleType, device: torch.device) -> None:
        self._demo = demo
        self._device = device
        self.encode = 0.0
        self.steps: list[float] = []
        self.sample: list[float] = []
        self.decode: list[float] = []
        self.mp4: list[float] = []  # it writes the video so far after every section
        self.computed = 0

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def listening(self) -> Iterator[None]:
        demo = self._demo

        def timed(function: Callable, tell: Callable[[float], None]) -> Callable:
            def call(*arguments: Any, **named: Any) -> Any:
                started = self.now()
                result = function(*arguments, **named)
                tell(self.now() - started)
                return result

            return call

        def encoded(seconds: float) -> None:
            self.encode += seconds

        def blended(seconds: float) -> None:
            self.decode[-1] += seconds

        def decoded_to_host(*arguments: Any) -> torch.Tensor:
            return vae_decode(*arguments).cpu()

        def sampled(**named: Any) -> torch.Tensor:
            callback, last = named.pop("callback"), self.now()

            def after_step(state: dict) -> None:
                nonlocal last
                callback(state)
                last, before = self.now(), last
                self.steps.append(last - before)

            return sample_hunyuan(callback=after_step, **named)

        def count(*_: Any) -> None:
            self.computed += 1

        vae_decode, sample_hunyuan = demo.vae_decode, demo.sample_hunyuan
        heard = {name: timed(getattr(demo, name), encoded) for name in ENCODERS} | {
            "sample_hunyuan": timed(sampled, self.sample.append),
            "vae_decode": timed(decoded_to_host, self.decode.append),
            "soft_append_bcthw": timed(demo.soft_append_bcthw, blended),
            "save_bcthw_as_mp4": timed(demo.save_bcthw_as_mp4, self.mp4.append),
        }
        hook = demo.transformer.transformer_blocks[0].register_forward_pre_hook(count)
        try:
            with patch.multiple(demo, **heard):
                yield
        finally:
            hook.remove()


def _imported(checkout: Path, models: Makers, free_gb: Callable[[], float]) -> ModuleType:
    """Its module, which loads its models, and would open its window, as it is imported."""
    spec = importlib.util.spec_from_file_location("official_demo", checkout / "demo_gradio.py")
    demo = importlib.util.module_from_spec(spec)
    with ExitStack() as undo:
        undo.enter_context(patch.object(sys, "argv", [str(checkout / "demo_gradio.py")]))
        undo.enter_context(patch.dict(os.environ))  # it sets HF_HOME
        memory = importlib.import_module("diffusers_helper.memory")
        memory.get_cuda_free_memory_gb = lambda *_: free_gb()
        packed = _packed()
        official = packed.HunyuanVideoTransformer3DModelPacked
        for name, make in models.items():
            if name == official.__name__:
                given = _Given(lambda make=make: make(official))
                undo.enter_context(patch.object(packed, name, given))
            else:
                # by name: what `import transformers` gave is not always what a later import gets
                owner = importlib.import_module("diffusers" if name.startswith("Auto") else "transformers")
                undo.enter_context(patch.object(owner, name, _Given(make)))
        spec.loader.exec_module(demo)
    return demo


def _packed() -> ModuleType:
    return importlib.import_module("diffusers_helper.models.hunyuan_video_packed")


def _attention_of(transformer: nn.Module) -> str:
    """It takes the first of these packages that is installed, else torch's own."""
    found = vars(type(transformer))["forward"].__globals__
    return next((name for function, name in ATTENTION.items() if found.get(function)), "torch's SDPA")


class _Given:
    """Stands where a class was imported from; its `from_pretrained` gives what it was told to."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def from_pretrained(self, *_: Any, **__: Any) -> Any:
        given = self._make()
        return _Unmoved(given) if isinstance(given, nn.Module) else given


class _Unmoved:
    """The demo calls `.cpu()` on what it loaded: shared weights stay where they are."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def cpu(self) -> nn.Module:
        return self._module


def sharing_weights(module: nn.Module) -> nn.Module:
    """A copy of the module whose parameters and buffers are new objects over the same memory."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    shared |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, shared)


@contextmanager
def _their_packages(checkout: Path) -> Iterator[None]:
    """Their package has our package's name, so ours steps aside inside the block."""
    stand_ins = _stand_ins()
    hidden = {
        name: sys.modules.pop(name)
        for name in [*sys.modules]
        if name.split(".")[0] == "diffusers_helper" or name in stand_ins
    }
    elsewhere = [p for p in sys.path if not (Path(p or ".") / "diffusers_helper/__init__.py").exists()]
    sys.modules.update(stand_ins)
    try:
        with patch.object(sys, "path", [str(checkout), *elsewhere]):
            yield
    finally:
        for name in [*sys.modules]:
            if name.split(".")[0] == "diffusers_helper" or name in stand_ins:
                del sys.modules[name]
        sys.modules.update(hidden)


@contextmanager
def _own_norms() -> Iterator[None]:
    """Importing their package gives these classes, which are ours too, other forwards: only in the block."""
    before = {norm: vars(norm)["forward"] for norm in NORMS}
    try:
        yield
    finally:
        for norm, forward in before.items():
            _THEIR_FORWARDS[norm] = vars(norm)["forward"]
            norm.forward = forward


def _with_their_norms(transformer: nn.Module) -> nn.Module:
    """While it runs, the classes have the forwards that it was written for."""

    def enter(*_: Any) -> None:
        for norm, forward in _THEIR_FORWARDS.items():
            undo.enter_context(patch.object(norm, "forward", forward))

    undo = ExitStack()
    transformer.register_forward_pre_hook(enter)
    transformer.register_forward_hook(lambda *_: undo.close(), always_call=True)
    return transformer


@contextmanager
def _half_for(device: torch.device) -> Iterator[None]:
    """On a CPU `torch.float16` and `torch.bfloat16` mean float32 inside the block."""
    with ExitStack() as undo:
        if device.type == "cpu":
            for half in ("float16", "bfloat16"):
                undo.enter_context(patch.object(torch, half, torch.float32))
        yield


def _stand_ins() -> dict[str, ModuleType]:
    modules: dict[str, Any] = {"gradio": MagicMock()}
    if importlib.util.find_spec("cv2") is None:
        modules["cv2"] = ModuleType("cv2")
    try:
        io_of_torchvision = importlib.import_module("torchvision.io")
    except ImportError:
        modules["torchvision"] = ModuleType("torchvision")
        io_of_torchvision = modules["torchvision"].io = ModuleType("torchvision.io")
    if not hasattr(io_of_torchvision, "write_video") or importlib.util.find_spec("av") is None:
        io_of_torchvision.write_video = _write_video
    if not torch.cuda.is_available():
        modules["diffusers_helper.memory"] = _memory_of_a_cpu()
    return modules


def _memory_of_a_cpu() -> MagicMock:
    """With enough memory `worker` calls none of its functions."""
    memory = MagicMock()
    memory.cpu = memory.gpu = torch.device("cpu")
    return memory


def _write_video(
    filename: str, frames: torch.Tensor, fps: float, video_codec: str, options: dict[str, str]
) -> None:
    """`torchvision.io.write_video`, which newer versions have not: (T, H, W, 3) uint8 to an MP4."""
    _, height, width, _ = frames.shape
    writer = imageio_ffmpeg.write_frames(
        filename,
        (width, height),
        fps=fps,
        codec=video_codec,
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        quality=None,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", options["crf"]],
    )
    writer.send(None)
    for frame in frames.contiguous().numpy():
        writer.send(frame)
    writer.close()
