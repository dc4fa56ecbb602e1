"""The full-size VAE with the library's masked middle attention and with ours: decode time, peak, error.

python -m benchmarks.vae_attention
"""

import time
from statistics import median

import torch
from diffusers import AutoencoderKLHunyuanVideo

from diffusers_helper.memory import GB
from diffusers_helper.vae import attend_framewise, decode_latents

ROUNDS = 5


def main() -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    library = AutoencoderKLHunyuanVideo().to(device, torch.float16).eval().requires_grad_(False)
    ours = AutoencoderKLHunyuanVideo.from_config(library.config)
    ours.load_state_dict(library.state_dict())
    ours.to(device, torch.float16).eval().requires_grad_(False)
    attend_framewise(ours)
    exact = AutoencoderKLHunyuanVideo.from_config(library.config)
    exact.load_state_dict(library.state_dict())
    exact.to(device, torch.float32).eval().requires_grad_(False)

    latents = torch.randn(1, 16, 9, 80, 76)
    part = latents[:, :, :5, :24, :24]  # float32 convolutions of the whole would not fit
    with torch.backends.cudnn.flags(allow_tf32=False):
        reference = decode_latents(part, exact, device).float()
    del exact
    for name, vae in (("library", library), ("framewise", ours)):
        pixels = decode_latents(part, vae, device).float()
        error = (pixels - reference).norm() / reference.norm()
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            decode_latents(latents, vae, device)
            times.append(time.perf_counter() - started)
        peak = (torch.cuda.max_memory_allocated() - before) / GB
        print(
            f"{name}: {median(times):.3f} s for 9 latent frames, peak {peak:.1f} GB, "
            f"error to float32 {error:.2e}"
        )


if __name__ == "__main__":
    main()
