"""What stands between the VAE's convolutions, each as one kernel for a GPU: normalise, activate, repeat, pad.

Tensors are (B, C, T, H, W) in torch's channels-last layout, as tensor cores want them. The sums are float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import nn

POSITIONS = 64  # pixels that a program holds at once
MAX_CHANNELS = 64
PROGRAMS = 2048  # about as many as read for the statistics, so that every multiprocessor has some

Factors = tuple[int, int, int]


def scales_and_shifts(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What `norm` multiplies each channel of `x` by, and what it adds, (B, C) float32."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    batch, channels = x.shape[:2]
    count = x[0, 0].numel()
    block = _block(channels)
    columns = triton.cdiv(channels, block)
    length = triton.cdiv(triton.cdiv(count * batch * columns, PROGRAMS), POSITIONS) * POSITIONS
    chunks = triton.cdiv(count, length)
    sums = torch.empty(2, batch, chunks, channels, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _sums[batch, chunks, columns](
            x,
            sums[0],
            sums[1],
            count,
            length,
            channels // _unit(channels),
            UNIT=_unit(channels),
            POSITIONS=POSITIONS,
            BLOCK=block,
        )
    first = x[:, :, 0, 0, 0].double()
    offset, square = sums.sum(dim=2, dtype=torch.float64) / count
    mean, variance = first + offset, square - offset**2
    grouped = mean.view(batch, norm.num_groups, -1)
    centre = grouped.mean(dim=2, keepdim=True)
    within = variance.view_as(grouped) + (grouped - centre).square()
    spread = (within.mean(dim=2, keepdim=True) + norm.eps).rsqrt()
    scale = spread.expand_as(grouped).reshape(batch, channels) * norm.weight
    shift = norm.bias - (centre * spread).expand_as(grouped).reshape(batch, channels) * norm.weight
    return scale.float(), shift.float()


def spread(
    x: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    factors: Factors,
    padding: tuple[int, ...],
) -> torch.Tensor:
    """SiLU(scale · x + shift), or `x` itself; each value repeated by `factors`; the edges by `padding`.

    `padding` is as `F.pad` takes it: W, H, T, before and after. In time the first frame stands for itself
    alone, as everywhere in this VAE.
    """
    x = x.contiguous(memory_format=torch.channels_last_3d)
    batch, channels, *size = x.shape
    repeated = [1 + (size[0] - 1) * factors[0], size[1] * factors[1], size[2] * factors[2]]
    left, right, top, bottom, before, after = padding
    padded = [repeated[0] + before + after, repeated[1] + top + bottom, repeated[2] + left + right]
    out = torch.empty(
        batch, channels, *padded, device=x.device, dtype=x.dtype, memory_format=torch.channels_last_3d
    )
    block = _block(channels)
    positions = out[:, 0].numel()
    with torch.cuda.device_of(x):
        _spread[triton.cdiv(positions, POSITIONS), triton.cdiv(channels, block)](
            x,
            out,
            *(scales or (x, x)),
            positions,
            channels // _unit(channels),
            *size,
            *padded,
            before,
            top,
            left,
            FT=factors[0],
            FH=factors[1],
            FW=factors[2],
            ACTIVE=scales is not None,
            UNIT=_unit(channels),
            POSITIONS=POSITIONS,
            BLOCK=block,
        )
    return out


def _block(channels: int) -> int:
    return min(triton.next_power_of_2(channels), MAX_CHANNELS)


def _unit(channels: int) -> int:
    """What the compiler is told that the channels are a multiple of, so that it loads as many at once."""
    return math.gcd(channels, 16)


# sizes are not specialised for: else every other size of a video would be compiled for
@triton.jit(do_not_specialize=["count", "length", "units"])
def _sums(
    x,
    sums,
    squares,
    count,
    length,
    units,
    UNIT: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a channel's values less its first one, so that what is summed is small: the sum and the squares'."""
    channels = units * UNIT
    batch, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    x += batch * count * channels
    first = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    square = tl.zeros((POSITIONS, BLOCK), tl.float32)
    for start in range(0, length, POSITIONS):
        position = (chunk * length + start + tl.arange(0, POSITIONS)).to(tl.int64)[:, None]
        known = (position < count) & inside[None, :]
        value = tl.load(x + position * channels + channel[None, :], mask=known, other=0.0).to(tl.float32)
        value = tl.where(known, value - first[None, :], 0.0)
        total += value
        square += value * value
    at = (batch * tl.num_programs(1) + chunk) * channels + channel
    tl.store(sums + at, tl.sum(total, axis=0), mask=inside)
    tl.store(squares + at, tl.sum(square, axis=0), mask=inside)


@triton.jit(
    do_not_specialize=[
        "positions",
        "units",
        "frames",
        "height",
        "width",
        "padded_frames",
        "padded_height",
        "padded_width",
        "before",
        "top",
        "left",
    ]
)
def _spread(
    x,
    out,
    scale,
    shift,
    positions,
    units,
    frames,
    height,
    width,
    padded_frames,
    padded_height,
    padded_width,
    before,
    top,
    left,
    FT: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    ACTIVE: tl.constexpr,
    UNIT: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels = units * UNIT
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    column = position % padded_width
    row = position // padded_width % padded_height
    frame = position // (padded_width * padded_height) % padded_frames
    batch = position // (padded_width * padded_height * padded_frames)
    # first as if there were no padding, then as if nothing were repeated
    frame = tl.minimum(tl.maximum(frame - before, 0), (frames - 1) * FT)
    row = tl.minimum(tl.maximum(row - top, 0), height * FH - 1) // FH
    column = tl.minimum(tl.maximum(column - left, 0), width * FW - 1) // FW
    frame = (frame + FT - 1) // FT
    source = ((batch * frames + frame).to(tl.int64) * height + row) * width + column
    value = tl.load(x + source[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    if ACTIVE:
        at = batch[:, None] * channels + channel[None, :]
        value = value.to(tl.float32)
        value = value * tl.load(scale + at, mask=inside, other=0.0) + tl.load(
            shift + at, mask=inside, other=0.0
        )
        value = value * tl.sigmoid(value)
    tl.store(
        out + position.to(tl.int64)[:, None] * channels + channel[None, :],
        value.to(out.dtype.element_ty),
        mask=inside,
    )
