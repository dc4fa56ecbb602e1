"""The full-size VAE's decoder as the library runs it, attending frame by frame, and fused: time, peak, error.

    python -m benchmarks.vae_decode

Nine latent frames of 640×608, as a section's first decode. The first decode of each has its kernels compiled
or chosen; the others are timed in turn.
"""

import copy
import time
from statistics import median

import torch
from diffusers import AutoencoderKLHunyuanVideo

from diffusers_helper.memory import GB
from diffusers_helper.vae import attend_framewise, decode_latents
from diffusers_helper.vae_fused import fuse_convolutions

ROUNDS = 5
FRAMES, HEIGHT, WIDTH = 9, 80, 76


def main() -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    with device:
        library = AutoencoderKLHunyuanVideo().half().eval().requires_grad_(False)
    framewise, fused = copy.deepcopy(library), copy.deepcopy(library)
    attend_framewise(framewise)
    fuse_convolutions(fused)
    ways = {"library": library, "framewise": framewise, "fused": fused}

    latents = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH)
    part = latents[:, :, :5, :24, :24]  # float32 convolutions of the whole would not fit
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = decode_latents(part, copy.deepcopy(library).float(), device)
    first = {name: _timed(latents, vae, device) for name, vae in ways.items()}
    later = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, vae in ways.items():
            later[name].append(_timed(latents, vae, device))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float16, {FRAMES} latent frames")
    print("| | first decode | median | peak above the weights | error to float32 |\n|---|---|---|---|---|")
    for name, vae in ways.items():
        pixels = decode_latents(part, vae, device).float()
        error = (pixels - exact).norm() / exact.norm()
        seconds, peak = median(s for s, _ in later[name]), max(p for _, p in later[name])
        print(f"| {name} | {first[name][0]:.2f} s | {seconds:.3f} s | {peak / GB:.1f} GB | {error:.2e} |")


def _timed(latents: torch.Tensor, vae: AutoencoderKLHunyuanVideo, device: torch.device) -> tuple[float, int]:
    """Seconds, and the most memory at once in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    decode_latents(latents, vae, device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
