"""Composes the things of a scene onto its photograph: light, shadow, sharpness and noise fit the photograph's."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lavis_svp.datasets.refthings.scene import Composition, Placed

_SHADOWS = ("soft", "ground", "contact", "none")
_SHADOW_SHARES = (0.35, 0.3, 0.25, 0.1)
_SHADOW_STRENGTH = (0.2, 0.55)
_SHADOW_REACH = 0.12
_SHADOW_BLUR = (0.03, 0.09)
"""Reach and blur of shadows, as shares of the thing's size."""
_FLATNESS = 0.3
_COARSE = 4
"""Shadows are blurred on arrays so many times smaller."""

_REBLUR = 1.0
_FIXED_POINT = 128
_STRONG_EDGES = 0.05
_MAX_BLUR = 2.2
_UPSCALING_BLUR = 0.55
_LEAST_BLUR = 0.35
_MAX_NOISE = 8.0
_QUALITY = (82, 96)


@dataclass(frozen=True)
class _Look:
    """What a whole image's things share: the shadows' kind, direction and strength, their blur and noise."""

    shadow: str
    direction: tuple[float, float]
    strength: float
    softness: float
    blur: float
    noise: float


def paint(composition: Composition, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Paint a composition.

    Returns:
        (H, W, 3) uint8 RGB, and the JPEG quality to store it with.
    """
    look = _look(composition.backdrop, rng)
    image = composition.backdrop.astype(np.float32)
    noise = rng.standard_normal(image.shape[:2], np.float32)[..., None] * np.float32(look.noise)  # (H, W, 1)
    for placed in composition.placed:
        if look.shadow != "none":
            _shade(image, placed, look)
        _blend(image, placed, composition.gain, look, noise)
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return pixels, int(rng.integers(_QUALITY[0], _QUALITY[1] + 1))


def _look(backdrop: np.ndarray, rng: np.random.Generator) -> _Look:
    angle = float(rng.uniform(-np.pi, 0))  # light comes from above, so shadows fall downwards or sideways
    return _Look(
        shadow=str(rng.choice(_SHADOWS, p=_SHADOW_SHARES)),
        direction=(float(np.cos(angle)), float(-np.sin(angle))),
        strength=float(rng.uniform(*_SHADOW_STRENGTH)),
        softness=float(rng.uniform(*_SHADOW_BLUR)),
        blur=min(_MAX_BLUR, blur_of(backdrop)) * float(rng.uniform(0.3, 0.9)),
        noise=min(_MAX_NOISE, noise_of(backdrop)) * float(rng.uniform(0.6, 1.0)),
    )


def blur_of(image: np.ndarray) -> float:
    """How blurred the sharpest edges of an image are, as a Gaussian's sigma in pixels. image (H, W, 3) uint8.

    An edge of blur s whose gradient falls by the factor R when it is blurred by 1 more has s = 1 / sqrt(R^2 - 1).
    """
    # Without cv2.magnitude, whose floats differ in the last bit from call to call; the same seed gives the same bytes.
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint16) * _FIXED_POINT
    first, again = _gradient(grey), _gradient(cv2.GaussianBlur(grey, (0, 0), _REBLUR))
    strong = first >= max(1.0, float(np.quantile(first, 1 - _STRONG_EDGES)))
    if not strong.any():
        return _MAX_BLUR
    ratio = float(np.median(first[strong] / np.maximum(again[strong], 1e-3)))
    return _REBLUR / float(np.sqrt(max(ratio**2 - 1, 1e-3)))


def noise_of(image: np.ndarray) -> float:
    """The standard deviation of an image's noise (Immerkaer's kernel, robustly). image (H, W, 3) uint8."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(grey, cv2.CV_32F, kernel))
    return float(np.median(response)) / (6 * 0.6745)  # 6 is the kernel's norm, .6745 a normal's median distance


def _gradient(grey: np.ndarray) -> np.ndarray:
    """The gradient's length in grey levels, (H, W) float64. grey (H, W) uint16, times ``_FIXED_POINT``."""
    across, down = cv2.Sobel(grey, cv2.CV_64F, 1, 0), cv2.Sobel(grey, cv2.CV_64F, 0, 1)
    return np.sqrt(across**2 + down**2) / _FIXED_POINT


def _shade(image: np.ndarray, placed: Placed, look: _Look) -> None:
    """Darken what lies in the thing's shadow, in ``image`` (H, W, 3) float32, itself."""
    alpha = placed.sprite[..., 3]  # (h, w)
    height, width = alpha.shape
    extent = max(height, width)
    margin = round((_SHADOW_REACH + 3 * look.softness) * extent) + _COARSE
    shadow = np.zeros((height + 2 * margin, width + 2 * margin), np.float32)
    if look.shadow == "soft":
        shadow[margin : margin + height, margin : margin + width] = alpha
        shift_x, shift_y = (round(part * _SHADOW_REACH * extent * 0.6) for part in look.direction)
    else:
        flat = max(2, round(height * (_FLATNESS if look.shadow == "ground" else _FLATNESS / 3)))
        small = cv2.resize(alpha, (width, flat), interpolation=cv2.INTER_AREA)
        foot = margin + height - flat // 2
        shadow[foot - flat // 2 : foot - flat // 2 + flat, margin : margin + width] = small
        shift_x, shift_y = round(look.direction[0] * _SHADOW_REACH * extent * 0.6), 0
    coarse = (max(1, shadow.shape[1] // _COARSE), max(1, shadow.shape[0] // _COARSE))
    soft = cv2.resize(shadow, coarse, interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(soft, (0, 0), max(0.5, look.softness * extent / _COARSE))
    shadow = cv2.resize(soft, (shadow.shape[1], shadow.shape[0]), interpolation=cv2.INTER_LINEAR)
    left, top = placed.x - margin + shift_x, placed.y - margin + shift_y
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + shadow.shape[0], image.shape[0]), min(left + shadow.shape[1], image.shape[1])
    if y0 < y1 and x0 < x1:
        image[y0:y1, x0:x1] *= 1 - look.strength * shadow[y0 - top : y1 - top, x0 - left : x1 - left, None]


def _blend(image: np.ndarray, placed: Placed, gain: np.ndarray, look: _Look, noise: np.ndarray) -> None:
    """Put a thing over ``image`` (H, W, 3) float32, itself, as sharp and as noisy as the photograph."""
    sprite = placed.sprite
    own = _UPSCALING_BLUR * max(0.0, placed.enlarged - 1)
    blur = float(np.sqrt(max(look.blur**2 - own**2, 0)))
    if blur > _LEAST_BLUR:
        sprite = cv2.GaussianBlur(sprite, (0, 0), blur, borderType=cv2.BORDER_CONSTANT)
    rows, columns, own_rows, own_columns = placed.region(*image.shape[:2])
    part = sprite[own_rows, own_columns]
    alpha = part[..., 3:]
    color = part[..., :3] * (gain * np.float32(255)) + alpha * noise[rows, columns]
    image[rows, columns] = image[rows, columns] * (1 - alpha) + color
