"""Copies in pieces, by several threads: every byte arrives, whatever the tensor."""

import threading

import pytest
import torch

from diffusers_helper import upload

PIECE = 64


class Lane:
    """A buffer, and a copy as a GPU's; no two threads may have it at once."""

    def __init__(self):
        self.buffer = torch.empty(PIECE, dtype=torch.uint8)
        self.taken = threading.Lock()
        self.sent = []

    def send(self, filled, target):
        assert self.taken.acquire(blocking=False)
        target.copy_(filled)
        self.sent.append(filled.numel())
        self.taken.release()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(upload, "PIECE", PIECE)


def test_every_tensor_arrives():
    torch.manual_seed(0)
    sources = [
        torch.randn(1000),
        torch.tensor(3.5),
        torch.randn(7, 33).bfloat16(),
        torch.randn(40, 3).to(torch.float8_e4m3fn),
        torch.arange(17),
        torch.zeros(0, 5),
        torch.randn(6, 8).t(),
        torch.randn(30, 8)[:, ::2],
    ]
    targets = [torch.empty_like(tensor) for tensor in sources]
    lanes = [Lane() for _ in range(3)]
    upload.copy_in_parallel(sources, targets, lanes)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source.float(), target.float())
    contiguous = sum(tensor.nbytes for tensor in sources[:6])
    assert sum(sum(lane.sent) for lane in lanes) == contiguous
    assert max(max(lane.sent, default=0) for lane in lanes) == PIECE


def test_an_error_is_raised_and_ends_it():
    lane = Lane()
    lane.send = lambda filled, target: 1 / 0
    with pytest.raises(ZeroDivisionError):
        upload.copy_in_parallel([torch.randn(10_000)], [torch.empty(10_000)], [lane])
