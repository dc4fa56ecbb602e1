"""Small data to the GPU, and large data made on it, without waiting for what it is doing."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import local
from typing import Any, TypeVar

import torch

THREADS, AHEAD = 3, 8

T = TypeVar("T")


def on_device(values: Any, device: torch.device) -> torch.Tensor:
    """An array or a list on `device`; a GPU goes on with its work meanwhile."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def ahead(draw: Callable[[random.Random, torch.device], T], seed: str, device: torch.device) -> Iterator[T]:
    """`draw(rng, device)` for ever, the n-th with a generator of its own, some of them ahead of their use.

    Drawn in a few threads, each with a stream of its own on a GPU, that end with the iterator. What is drawn
    is a tensor, or a tuple with tensors in it.
    """
    gpu = device.type == "cuda"
    mine = local()

    def numbered(number: int) -> tuple[T, torch.cuda.Event | None]:
        if gpu and not hasattr(mine, "stream"):
            mine.stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(mine.stream) if gpu else nullcontext():
            drawn = draw(random.Random(f"{seed} {number}"), device)
            return drawn, mine.stream.record_event() if gpu else None

    with ThreadPoolExecutor(THREADS) as threads:
        ready = deque(threads.submit(numbered, number) for number in range(AHEAD))
        number = AHEAD
        try:
            while True:
                drawn, finished = ready.popleft().result()
                ready.append(threads.submit(numbered, number))
                number += 1
                if gpu:
                    stream = torch.cuda.current_stream(device)
                    stream.wait_event(finished)
                    for part in drawn if isinstance(drawn, tuple) else (drawn,):
                        if isinstance(part, torch.Tensor) and part.is_cuda:
                            part.record_stream(stream)  # its memory is the other stream's
                yield drawn
        finally:
            for future in ready:
                future.cancel()
