"""Scene → frames, as tensor operations over all frames at once, on any device.

Everything is a function of world coordinates (pixels of the first frame), so that any time and any camera can
be drawn: shapes are signed distances with an edge of one pixel, textures are sums of waves, and photographs
are sampled from a pyramid of sizes.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builder.demo.colours import COLOURS, MUTED
from builder.demo.devices import on_device
from builder.demo.geometry import CROSS_ARM, CROSS_REACH, POINTED, RING_HOLE
from builder.demo.motion import PAN_LIMIT, ZOOM_LIMIT, amount
from builder.demo.photographs import load_photograph
from builder.demo.scene import Background, Pose, Scene, Shape

LoadPhotograph = Callable[[str], np.ndarray]

_MOST_DENSE = 2.5  # a photograph's pixels to one of the first frame
_LUMA = (0.299, 0.587, 0.114)


def render(scene: Scene, times: Sequence[float], photograph: LoadPhotograph = load_photograph) -> np.ndarray:
    """(T, H, W, 3) uint8: the scene at the times, in frames since the start image."""
    return _draw(scene, np.asarray(times, dtype=np.float64), torch.device("cpu"), photograph).numpy()


def render_batch(
    scenes: Sequence[Scene],
    start_frames: Sequence[float],
    frame_count: int,
    device: torch.device | str,
    photograph: LoadPhotograph = load_photograph,
) -> Tensor:
    """(B, T, H, W, 3) uint8 on the device: of every scene, `frame_count` frames from its start frame on.

    ValueError unless all scenes have one size.
    """
    if len({(scene.height, scene.width) for scene in scenes}) != 1:
        raise ValueError("A batch is drawn of scenes of one size.")
    clips = [
        _draw(scene, start + np.arange(frame_count), torch.device(device), photograph)
        for scene, start in zip(scenes, start_frames, strict=True)
    ]
    return torch.stack(clips)


@torch.no_grad()
def _draw(scene: Scene, times: np.ndarray, device: torch.device, photograph: LoadPhotograph) -> Tensor:
    x, y, scale = _seen_by_camera(scene, times, device)
    image = _background(scene, times, x, y, scale, photograph)
    for shape in scene.shapes:
        image = _paint(image, shape, scene, times, x, y, scale)
    frames = image.round().clamp_(0, 255).byte()
    return frames.expand(len(times), scene.height, scene.width, 3)


def _seen_by_camera(scene: Scene, times: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """World coordinates x (T, 1, W) and y (T, H, 1) of the pixels, and world pixels a pixel (T, 1, 1).

    T is 1 before a camera that does not move.
    """
    shift_x, shift_y, scale = _on(device, *_camera(scene, times))[..., None, None]
    columns = torch.arange(scene.width, device=device) + 0.5 - scene.width / 2
    rows = torch.arange(scene.height, device=device)[:, None] + 0.5 - scene.height / 2
    return scene.width / 2 + shift_x + columns * scale, scene.height / 2 + shift_y + rows * scale, scale


def _camera(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels to the right and down, and world pixels a pixel, (T,) each; T is 1 where nothing moves."""
    if scene.camera is None:
        return np.zeros(1), np.zeros(1), np.ones(1)
    done = amount(scene.camera, times)
    if scene.camera.verb.startswith("pans"):
        dx, dy = scene.camera.direction
        return dx * scene.short * done, dy * scene.short * done, np.ones_like(done)
    return 0 * done, 0 * done, np.exp(-scene.camera.sign * done)


def _on(device: torch.device, *values: np.ndarray | Sequence[float]) -> Tensor:
    """Equally long rows of numbers as float32."""
    return on_device(np.stack(values).astype(np.float32), device)


def _paint(
    image: Tensor, shape: Shape, scene: Scene, times: np.ndarray, x: Tensor, y: Tensor, scale: Tensor
) -> Tensor:
    """The image with the shape on it, its edge one pixel wide."""
    pose = shape.pose(times if shape.action else times[:1], scene.height, scene.width)
    rows, columns = (slice(None), slice(None)) if scene.camera else _window(pose)
    centre_x, centre_y, radius, angle, mix = _on(image.device, *pose)[..., None, None]
    x, y = x[..., columns] - centre_x, y[:, rows] - centre_y
    cover = (0.5 - _signed_distance(shape.kind, x, y, radius, angle) / scale).clamp_(0, 1)
    changed = shape.action.colour if shape.action and shape.action.colour else shape.colour
    colour, new = _on(image.device, COLOURS[shape.colour], COLOURS[changed])
    if changed != shape.colour:
        colour = torch.lerp(colour, new, mix[..., None])
    image = image.expand(max(len(image), len(cover)), -1, -1, -1).clone()
    window = image[:, rows, columns]
    window.lerp_(colour.expand_as(window), cover[..., None])
    return image


def _window(pose: Pose) -> tuple[slice, slice]:
    """Rows and columns outside of which the shape never is."""
    rows, columns = (
        slice(max(0, math.floor((at - pose.radius).min()) - 1), math.ceil((at + pose.radius).max()) + 1)
        for at in (pose.y, pose.x)
    )
    return rows, columns


def _signed_distance(kind: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Pixels to the outline, negative inside."""
    if kind in POINTED:
        return _pointed_distance(*POINTED[kind], x, y, radius, angle)
    if kind == "cross":
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        long, short = torch.maximum(along.abs(), across.abs()), torch.minimum(along.abs(), across.abs())
        return torch.maximum(long - CROSS_REACH * radius, short - CROSS_ARM * radius)
    distance = torch.hypot(x, y) - radius
    return torch.maximum(distance, (RING_HOLE - 1) * radius - distance) if kind == "ring" else distance


def _pointed_distance(
    points: int, inner: float, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor
) -> Tensor:
    """Of a star: folded onto half a point, it is one line from the tip to the inner corner."""
    half = math.pi / points
    folded = (torch.remainder(torch.atan2(y, x) - angle + half, 2 * half) - half).abs_()
    from_centre = torch.hypot(x, y)
    edge_x, edge_y = inner * math.cos(half) - 1, inner * math.sin(half)
    length = math.hypot(edge_x, edge_y)
    along_x, along_y = from_centre * folded.cos() - radius, from_centre * folded.sin()
    return (along_x * edge_y - along_y * edge_x) / length


def _background(
    scene: Scene, times: np.ndarray, x: Tensor, y: Tensor, scale: Tensor, photograph: LoadPhotograph
) -> Tensor:
    """(T, H, W, 3) in 0…255; T is 1 where nothing moves."""
    if scene.background.kind == "photograph":
        return _photograph(scene, times, x, y, photograph(scene.background.photograph), photograph)
    first, second = _on(x.device, *scene.background.colours)
    u, v = (x - scene.width / 2) / scene.short, (y - scene.height / 2) / scene.short
    pattern = _pattern(scene.background, u, v, scale / scene.short)
    return torch.lerp(first, second, pattern[..., None]).expand(-1, scene.height, scene.width, -1)


def _pattern(background: Background, u: Tensor, v: Tensor, pixel: Tensor) -> Tensor:
    """Share of the second colour at coordinates in shorter sides; `pixel` is the length of one pixel."""
    rng = random.Random(background.seed)
    match background.kind:
        case "flat":
            return torch.zeros_like(pixel)
        case "gradient":
            angle = rng.uniform(0, math.tau)
            return (0.5 + (u * math.cos(angle) + v * math.sin(angle)) / 1.5).clamp_(0, 1)
        case "glow":
            return torch.exp(-4 * ((u - rng.uniform(-0.5, 0.5)) ** 2 + (v - rng.uniform(-0.5, 0.5)) ** 2))
        case "stripes" | "checks":
            frequency, angle = math.tau * rng.uniform(2, 5), rng.uniform(0, math.tau)
            wave = torch.sin(frequency * (u * math.cos(angle) + v * math.sin(angle)))
            if background.kind == "checks":
                wave = wave * torch.sin(frequency * (v * math.cos(angle) - u * math.sin(angle)))
            return (0.5 + wave / (frequency * pixel)).clamp_(0, 1)
        case "noise":
            return (0.5 + 0.25 * _waves(rng, 24, (1, 12), u, v)).clamp_(0, 1)
        case "blobs":
            return (0.5 + 4 * _waves(rng, 12, (1.5, 4), u, v)).clamp_(0, 1)
    raise ValueError(f"There is no background {background.kind!r}.")


def _waves(rng: random.Random, count: int, frequencies: tuple[float, float], u: Tensor, v: Tensor) -> Tensor:
    """Plane waves in all directions, finer ones weaker, of variance 1: (T, 1, W) and (T, H, 1) → (T, H, W).

    sin(a + b) = sin a cos b + cos a sin b, so the sum over the waves is a matrix product of rows and columns.
    """
    low, high = frequencies
    along_u, along_v, phase, weight = [], [], [], []
    for _ in range(count):
        frequency, angle = low * (high / low) ** rng.random(), rng.uniform(0, math.tau)
        along_u.append(math.tau * frequency * math.cos(angle))
        along_v.append(math.tau * frequency * math.sin(angle))
        phase.append(rng.uniform(0, math.tau))
        weight.append(frequency**-0.5)
    along_u, along_v, phase, weight = _on(u.device, along_u, along_v, phase, weight)
    weight = weight * (2 / weight.square().sum()).sqrt()
    columns = along_u[:, None] * u + phase[:, None]  # (T, waves, W)
    rows = along_v * v  # (T, H, waves)
    return (weight * rows.cos()) @ columns.sin() + (weight * rows.sin()) @ columns.cos()


def _photograph(
    scene: Scene, times: np.ndarray, x: Tensor, y: Tensor, pixels: np.ndarray, load: LoadPhotograph
) -> Tensor:
    """The crop the background's seed chooses: all that the camera will come to see lies in the photograph."""
    rng = random.Random(scene.background.seed)
    height, width = pixels.shape[:2]
    left, top, seen_width, seen_height = _ever_seen(scene)
    fits = min(width / seen_width, height / seen_height)
    density = min(fits, _MOST_DENSE) * rng.uniform(0.6, 1)  # photograph's pixels to one of the world's
    column = rng.uniform(0, width - seen_width * density) + (x - left) * density
    row = rng.uniform(0, height - seen_height * density) + (y - top) * density
    across = (2 * column / width - 1) * rng.choice((-1, 1))
    down = 2 * row / height - 1
    grid = torch.stack(torch.broadcast_tensors(across, down), dim=-1)

    pyramid = _pyramid(load, scene.background.photograph, x.device)
    _, _, scale = _camera(scene, times)
    level = (2 * np.log2(density * scale) - 0.5).clip(0, len(pyramid) - 1)
    image = torch.zeros(3, device=x.device)
    for index, picture in enumerate(pyramid):
        weight = (1 - np.abs(level - index)).clip(min=0)
        if weight.any():
            sampled = F.grid_sample(
                picture.expand(len(grid), -1, -1, -1), grid, "bicubic", "border", align_corners=False
            )
            image = image + _on(x.device, weight).view(-1, 1, 1, 1) * sampled.permute(0, 2, 3, 1)
    if scene.shapes:
        grey = (image * image.new_tensor(_LUMA)).sum(-1, keepdim=True)
        image = torch.lerp(grey, image, MUTED)
    return image


def _ever_seen(scene: Scene) -> tuple[float, float, float, float]:
    """Left, top, width and height of all that the camera sees in however long a video, in world pixels."""
    left, top, width, height = 0.0, 0.0, float(scene.width), float(scene.height)
    if scene.camera is not None and scene.camera.verb.startswith("pans"):
        dx, dy = (PAN_LIMIT * scene.short * step for step in scene.camera.direction)
        left, top, width, height = min(0, dx), min(0, dy), width + abs(dx), height + abs(dy)
    elif scene.camera is not None and scene.camera.sign < 0:
        more = math.exp(ZOOM_LIMIT)
        left, top = (1 - more) * width / 2, (1 - more) * height / 2
        width, height = more * width, more * height
    return left, top, width, height


@lru_cache(maxsize=64)
def _pyramid(load: LoadPhotograph, name: str, device: torch.device) -> list[Tensor]:
    """The photograph (1, 3, H, W) float32 at full size, then each level smaller by √2."""
    full = torch.from_numpy(load(name).copy()).to(device, torch.float32).permute(2, 0, 1)[None]
    return [full] + [
        F.interpolate(full, scale_factor=2 ** (-level / 2), mode="bicubic", antialias=True)
        for level in range(1, 5)
    ]
