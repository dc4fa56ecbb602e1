"""PSNR and SSIM of frames, uint8."""

import numpy as np

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_RADIUS, _SIGMA = 5, 1.5


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and frames; infinite for equal ones."""
    error = np.square(frames.astype(np.float32) - truth.astype(np.float32)).mean(dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def first_frame_psnr(frames: np.ndarray, image: np.ndarray) -> float:
    """Of a clip (T, H, W, 3) that begins with the image (H, W, 3)."""
    return psnr(frames[0], image)


def ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity, the mean over channels and frames of (…, H, W, 3).

    Wang et al. 2004: a Gaussian window of σ 1.5 cut at 11 × 11, only where it lies within the picture.
    """
    if frames.ndim > 3:
        return float(np.mean([ssim(a, b) for a, b in zip(frames, truth, strict=True)]))
    a, b = frames.astype(np.float64), truth.astype(np.float64)
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a = _windowed(a * a) - mean_a**2
    variance_b = _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    similarity /= (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return float(similarity.mean())


def _windowed(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) → its Gaussian means (H − 10, W − 10, 3)."""
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    weights /= weights.sum()
    rows = sum(w * picture[i : len(picture) - 2 * _RADIUS + i] for i, w in enumerate(weights))
    return sum(w * rows[:, i : rows.shape[1] - 2 * _RADIUS + i] for i, w in enumerate(weights))
