"""Weights onto the GPU as fast as they come: several at a time, through pinned buffers.

What is mapped from a file is read when it is copied, page by page, and one thread would wait for each; and a
copy from memory that is not pinned goes through one small buffer of the driver's. Host memory is bounded by
the buffers: pages of a mapped file are the system's to drop.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import nn

LANES = 8
PIECE = 32 * 1024**2  # bytes


class Lane(Protocol):
    """A buffer on the host, and a way from it to where a piece belongs."""

    buffer: torch.Tensor  # (PIECE,) uint8

    def send(self, filled: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the filled part of the buffer, and return once it is there."""


class CudaLane:
    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)

    def send(self, filled: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(filled, non_blocking=True)
        self._stream.synchronize()


def move_to_gpu(modules: Iterable[nn.Module], device: torch.device) -> None:
    """What `module.to(device)` does, for several. Where it raises, none of their weights has been moved."""
    there = {id(t): t for module in modules for t in [*module.parameters(), *module.buffers()]}
    tensors = [tensor for tensor in there.values() if tensor.device != device]
    if not tensors:
        return
    moved = [torch.empty_like(tensor.data, device=device) for tensor in tensors]
    torch.cuda.synchronize(device)  # this memory may have been in use until a moment ago
    copy_in_parallel([t.data for t in tensors], moved, [CudaLane(device) for _ in range(LANES)])
    for tensor, copy in zip(tensors, moved, strict=True):
        tensor.data = copy
    torch.accelerator.empty_host_cache()


def copy_in_parallel(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], lanes: Sequence[Lane]
) -> None:
    """Copy each source into its target of the same dtype and shape, a thread for each lane."""
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        lane = free.get()
        try:
            filled = lane.buffer[: source.numel()]
            filled.copy_(source)
            lane.send(filled, target)
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(lanes), thread_name_prefix="upload") as pool:
        copies = []
        for source, target in zip(sources, targets, strict=True):
            if source.is_cuda or not (source.is_contiguous() and target.is_contiguous()):
                target.copy_(source)
                continue
            for piece in zip(_bytes(source).split(PIECE), _bytes(target).split(PIECE), strict=True):
                copies.append(pool.submit(copy, *piece))
        try:
            for done in copies:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)
