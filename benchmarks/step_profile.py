"""Where one evaluation of the transformer spends its time: by kind of kernel, and the longest kernels.

    python -m benchmarks.step_profile [--model FOLDER] [--window 9] [--precision fp8] [--attention fp8]
                                      [--compile on] [--top 20]

At full size with random weights, unless FOLDER has others. After evaluations that compile and warm up, one is
watched by torch's profiler; times are the device's, and what is missing to the whole is the device waiting.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.evaluations import evaluation, transformer_for
from benchmarks.full_size import machine
from core.settings import ATTENTION, COMPILE, PRECISIONS
from diffusers_helper import fp8
from diffusers_helper.compiled import compile_blocks
from diffusers_helper.float8_attention import attend_by

# part of a kernel's name → its kind; the first that fits
KINDS = {
    "sdpa": "attention",
    "flash": "attention",
    "fmha": "attention",
    "attention": "attention",
    "triton": "fused by the compiler",
    "gemm": "matrix products",
    "cutlass": "matrix products",
    "nvjet": "matrix products",
    "mm": "matrix products",
    "memcpy": "copies",
    "copy": "copies",
}


def kind_of(kernel: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in kernel.lower()), "others")


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformer's folder; without it random weights")
    parser.add_argument("--window", type=int, default=9)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--attention", choices=ATTENTION, default="auto")
    parser.add_argument("--compile", choices=COMPILE, default="off")
    parser.add_argument("--top", type=int, default=20, help="kernels that are listed")
    options = parser.parse_args(arguments)

    model = transformer_for(options.model)
    device, dtype = model.device, model.dtype
    if options.precision == "fp8":
        fp8.quantise_linears(model, device, device)
        fp8.multiply_in_fp8(model, fp8.can_multiply(device))
    attend_by(model, options.attention, device, dtype)
    if options.compile == "on":
        compile_blocks(model)
    call = evaluation(model, None, options.window)["ours"]

    def run() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - started)

    run()
    whole = min(run(), run())  # as the profiler takes time, too
    gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True
    ) as seen:
        run()
    found = {
        event.key: ((event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3, event.count)
        for event in seen.key_averages()
    }
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel, (milliseconds, count) in found.items():
        kinds[kind_of(kernel)][0] += milliseconds
        kinds[kind_of(kernel)][1] += count

    print(
        f"\n{machine()}, {options.precision}, {model.kernels[0]}, compile {options.compile}: {whole:.1f} ms\n"
    )
    print("| kind | time | share | kernels |\n|---|---|---|---|")
    for kind, (milliseconds, count) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(f"| {kind} | {milliseconds:.1f} ms | {milliseconds / whole:.1%} | {count} |")
    print("\n| kernel | time | calls |\n|---|---|---|")
    longest = sorted(found.items(), key=lambda item: -item[1][0])[: options.top]
    for kernel, (milliseconds, count) in longest:
        print(f"| `{kernel[:90]}` | {milliseconds:.1f} ms | {count} |")


if __name__ == "__main__":
    main()
