"""A scene: which things stand where on which background, the visible part of each, and what is measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from lavis_svp.datasets.refthings.colors import COLORS, color_verdicts
from lavis_svp.datasets.refthings.config import RefThingsConfig
from lavis_svp.datasets.refthings.sources import Background, Materials
from lavis_svp.datasets.refthings.table import Thing

_TRIES_PER_THING = 20
_SHRINKS = (1.0, 0.5, 0.2)
_RATIOS = ((3, 2), (4, 3), (1, 1), (3, 4))
_MIN_CROP = 0.6
_MASK_ALPHA = 0.5
_UPRIGHT_GROUPS = ("people", "vehicles", "buildings", "animals", "electronics")
_MAX_EXTENT = 0.95
"""Longest side of a thing, as a share of the image's."""
_OUTSIDE_SHARE = 0.12
_MAX_OUTSIDE = 0.25
_GROUND_SHARE = 0.5
_TOUCH_SHARE = 0.6
"""How often, where things may overlap, a new one is put beside an earlier one."""
_MAX_PAIR_OVERLAP = 0.33
_GAP = 5
_COLOR_PIXELS = 2000
_INNER_ALPHA = 0.9
_COARSE = 4
"""Distances between things are measured on masks so many times smaller."""
_GAIN_RANGE = (0.65, 1.25)
_CAST, _LIGHT = 0.35, 0.35
_MIDDLE_LIGHT = 128.0


def _common(x: int, y: int, part: tuple[int, ...], size: tuple[int, int]) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of an image of ``size`` that a part at (x, y) covers, and those of the part that lie in it."""
    y0, x0 = max(y, 0), max(x, 0)
    y1, x1 = min(y + part[0], size[0]), min(x + part[1], size[1])
    return slice(y0, y1), slice(x0, x1), slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)


@dataclass(frozen=True, eq=False)
class Placed:
    """A thing in an image.

    Args:
        thing: its words.
        sprite: (h, w, 4) float32, RGB times alpha and alpha, 0 to 1, as it stands in the image.
        x, y: the sprite's left and upper edge in the image, in pixels; it may reach beyond the image.
        enlarged: how many times larger than in its file it is; it is blurred already if that is over 1.
    """

    thing: Thing
    sprite: np.ndarray
    x: int
    y: int
    enlarged: float

    def region(self, height: int, width: int) -> tuple[slice, slice, slice, slice]:
        """Rows and columns of the image that the sprite covers, and those of the sprite that lie in the image."""
        return _common(self.x, self.y, self.sprite.shape[:2], (height, width))

    def mask(self, height: int, width: int) -> np.ndarray:
        """Its whole part within the image, (height, width) uint8."""
        whole = np.zeros((height, width), np.uint8)
        rows, columns, own_rows, own_columns = self.region(height, width)
        whole[rows, columns] = self.sprite[own_rows, own_columns, 3] > _MASK_ALPHA
        return whole


@dataclass(frozen=True, eq=False)
class ThingScene:
    """The things of an image, far ones first: a later thing hides an earlier one.

    Args:
        things: K things.
        masks: (K, H, W) uint8, the visible part of each, disjoint.
        areas: (K,) int64, pixels of ``masks``.
        boxes: (K, 4) int64, x0, y0, x1, y1 exclusive, of ``masks``.
        hidden: (K, K) float64; at [i, j] the share of thing i that thing j hides.
        gaps: (K, K) float64, pixels from edge to edge of the visible parts, roughly.
        colors: (K, len(COLORS)) int8: 1 has this colour, -1 has not, 0 disputable.
        blocked: nouns of what the background may show.
        generic: the background shows no things, so that "the thing on the left" means one of these.
    """

    things: tuple[Thing, ...]
    masks: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    hidden: np.ndarray
    gaps: np.ndarray
    colors: np.ndarray
    blocked: frozenset[str]
    generic: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.masks.shape[1], self.masks.shape[2]

    @property
    def centres(self) -> np.ndarray:
        """The centres of the boxes, (K, 2) float64: x, y in pixels."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


@dataclass(frozen=True, eq=False)
class Composition:
    """A scene with what it is painted from.

    Args:
        scene: what expressions are about.
        placed: its things as sprites, in its order.
        backdrop: (H, W, 3) uint8, the crop of the background.
        background: the photograph that it is of.
        gain: (3,) float32, by which the things' RGB is multiplied to fit the backdrop's light.
    """

    scene: ThingScene
    placed: tuple[Placed, ...]
    backdrop: np.ndarray
    background: Background
    gain: np.ndarray


THINGS = frozenset(("thing", "animal", "person", "vehicle", "food"))
"""Nouns of a background that shows things of its own, so that "the thing" is never asked for on it."""


def sample_composition(
    rng: np.random.Generator, split: str, materials: Materials, config: RefThingsConfig
) -> Composition | None:
    """Draw a scene, the same for the same state of ``rng``; None if there is room for too few things."""
    backgrounds = materials.of_split(split)
    background = backgrounds[int(rng.integers(len(backgrounds)))]
    backdrop = _crop(rng, materials.photo(background), config)
    gain = _gain(rng, backdrop)
    blocked = materials.table.blocked(background.contains)
    single = rng.random() < config.single_share
    count = 1 if single else int(rng.integers(config.min_things, config.max_things + 1))
    things = choose_things(rng, materials, split, count, blocked, config)
    placed = _place(rng, things, materials, backdrop.shape[:2], config)
    if len(placed) < (1 if single else config.min_things):
        return None
    scene = _measure(placed, backdrop.shape[:2], gain, blocked, THINGS.isdisjoint(background.contains), config)
    return None if scene is None else Composition(scene, tuple(placed), backdrop, background, gain)


def choose_things(
    rng: np.random.Generator,
    materials: Materials,
    split: str,
    count: int,
    blocked: frozenset[str],
    config: RefThingsConfig,
) -> list[Thing]:
    """Draw things that the background does not show: all of other names, or with rivals of the same noun or kind."""
    usable = [thing for thing in materials.table.of_split(split) if blocked.isdisjoint(thing.names)]
    if not usable:
        return []
    by_name: dict[str, list[Thing]] = {}
    for thing in usable:
        by_name.setdefault(thing.name, []).append(thing)
    names = list(by_name)
    unique = rng.random() < config.unique_share
    chosen: list[Thing] = []
    for _ in range(count * _TRIES_PER_THING):
        if len(chosen) == count:
            break
        pool = names
        if chosen and not unique and rng.random() < config.rival_share:
            copied = chosen[int(rng.integers(len(chosen)))]
            if rng.random() < 0.5:
                pool = [copied.name]
            else:
                pool = [name for name in names if set(by_name[name][0].kinds) & set(copied.kinds)] or names
        options = by_name[pool[int(rng.integers(len(pool)))]]
        thing = options[int(rng.integers(len(options)))]
        if unique and any(thing.may_be(own) or other.may_be(thing.name) for other in chosen for own in other.names):
            continue
        chosen.append(thing)
    return chosen


def _crop(rng: np.random.Generator, photo: np.ndarray, config: RefThingsConfig) -> np.ndarray:
    """A crop of a photograph in one of the aspect ratios, scaled to the image's size: (H, W, 3) uint8."""
    across, down = _RATIOS[int(rng.integers(len(_RATIOS)))]
    longer = max(across, down)
    width, height = round(config.long_side * across / longer), round(config.long_side * down / longer)
    most = min(photo.shape[1] / width, photo.shape[0] / height) * float(rng.uniform(_MIN_CROP, 1))
    crop_width, crop_height = max(1, int(width * most)), max(1, int(height * most))
    left = int(rng.integers(photo.shape[1] - crop_width + 1))
    top = int(rng.integers(photo.shape[0] - crop_height + 1))
    patch = photo[top : top + crop_height, left : left + crop_width]
    shrinks = most > 1
    crop = cv2.resize(patch, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return np.ascontiguousarray(crop[:, ::-1]) if rng.random() < 0.5 else crop


def _gain(rng: np.random.Generator, backdrop: np.ndarray) -> np.ndarray:
    """How much of the backdrop's brightness and colour cast falls on the things, (3,) float32."""
    mean = backdrop.reshape(-1, 3).mean(axis=0) + 1  # (3,); never 0
    cast = (mean / mean.mean()) ** rng.uniform(0, _CAST)
    light = (mean.mean() / _MIDDLE_LIGHT) ** rng.uniform(0, _LIGHT)
    return np.clip(cast * light * rng.uniform(0.92, 1.08), *_GAIN_RANGE).astype(np.float32)


def make_sprite(cutout: np.ndarray, scale: float, mirrored: bool, angle: float) -> np.ndarray:
    """Scale and turn a cut-out without dark fringes: RGB is multiplied by alpha first.

    Args:
        cutout: (h, w, 4) uint8 RGBA.
        scale: of its sides.
        mirrored: left and right change places.
        angle: counter-clockwise, in degrees.

    Returns:
        (h', w', 4) float32, RGB times alpha and alpha, 0 to 1.
    """
    image: np.ndarray = cutout.astype(np.float32) / 255
    image[..., :3] *= image[..., 3:]
    if mirrored:
        image = np.ascontiguousarray(image[:, ::-1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    if angle:
        height, width = image.shape[:2]
        turn: np.ndarray = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), angle, 1.0)
        cos, sin = abs(turn[0, 0]), abs(turn[0, 1])
        new_width, new_height = int(np.ceil(height * sin + width * cos)), int(np.ceil(height * cos + width * sin))
        turn[:, 2] += ((new_width - width) / 2, (new_height - height) / 2)
        image = cv2.warpAffine(image, turn, (new_width, new_height), flags=cv2.INTER_LINEAR)
    # Sharpening overshoots at edges: there all channels are brought back together, or the colour would change.
    image = np.maximum(image, 0) / np.maximum(image[..., 3:], 1)
    return np.minimum(image, 1)


def _place(
    rng: np.random.Generator,
    things: Sequence[Thing],
    materials: Materials,
    size: tuple[int, int],
    config: RefThingsConfig,
) -> list[Placed]:
    """Find room for things, large ones first; in the order in which they are painted."""
    height, width = size
    overlap, ground = rng.random() < config.overlap_share, rng.random() < _GROUND_SHARE
    by_depth = rng.random() < 0.8
    shares = np.exp(rng.uniform(np.log(config.min_area * 1.15), np.log(config.max_area), len(things)))
    shares *= min(1.0, config.max_covered / shares.sum()) if len(things) else 1.0
    shares = np.maximum(shares, config.min_area * 1.15)
    placed: list[Placed] = []
    masks: list[np.ndarray] = []
    for number in np.argsort(-shares, kind="stable"):
        thing = things[int(number)]
        # Where there is no room, a smaller one of it is tried.
        for shrink in _SHRINKS:
            area = max(config.min_area * 1.15, float(shares[number]) * shrink) * height * width
            sprite, enlarged = _sprite_of(rng, thing, materials.cutout(thing.file), area, size, config)
            found = _room(rng, Placed(thing, sprite, 0, 0, enlarged), placed, masks, size, overlap, ground, config)
            if found is not None:
                placed.append(found)
                masks.append(found.mask(height, width))
                break
    if by_depth:
        placed.sort(key=lambda one: one.y + one.sprite.shape[0])
    return placed


def _room(
    rng: np.random.Generator,
    thing: Placed,
    placed: Sequence[Placed],
    masks: Sequence[np.ndarray],
    size: tuple[int, int],
    overlap: bool,
    ground: bool,
    config: RefThingsConfig,
) -> Placed | None:
    """The thing at a place where it covers, and is covered by, no other too much; None if none is found."""
    height, width = size
    alpha = thing.sprite[..., 3] > _MASK_ALPHA
    whole = int(alpha.sum())
    if not overlap:
        grown: np.ndarray = np.pad(alpha.astype(np.uint8), _GAP)
        grown = cv2.dilate(grown, np.ones((2 * _GAP + 1, 2 * _GAP + 1), np.uint8)) > 0
    for _ in range(_TRIES_PER_THING):
        near = placed[int(rng.integers(len(placed)))] if placed and overlap and rng.random() < _TOUCH_SHARE else None
        x, y = _position(rng, thing.sprite.shape[:2], size, thing.thing, near, ground)
        candidate = replace(thing, x=x, y=y)
        rows, columns, own_rows, own_columns = candidate.region(height, width)
        inside = alpha[own_rows, own_columns]
        shown = int(inside.sum())
        if shown < (1 - _MAX_OUTSIDE) * whole or shown < config.min_area * height * width:
            continue
        if overlap:
            shared = [(int((mask[rows, columns] & inside).sum()), int(mask.sum())) for mask in masks]
            if all(common <= _MAX_PAIR_OVERLAP * min(shown, other) for common, other in shared):
                return candidate
        else:
            rows, columns, own_rows, own_columns = _common(x - _GAP, y - _GAP, grown.shape, size)
            if not any((mask[rows, columns] & grown[own_rows, own_columns]).any() for mask in masks):
                return candidate
    return None


def _sprite_of(
    rng: np.random.Generator,
    thing: Thing,
    cutout: np.ndarray,
    area: float,
    size: tuple[int, int],
    config: RefThingsConfig,
) -> tuple[np.ndarray, float]:
    """The sprite of a thing whose opaque part has ``area`` pixels; how much it is enlarged."""
    height, width = size
    opaque = max(1, int((cutout[..., 3] > 127).sum()))
    fits = _MAX_EXTENT * min(height / cutout.shape[0], width / cutout.shape[1])
    scale = min(float(np.sqrt(area / opaque)), fits)
    mirrored = bool(rng.random() < config.mirror_share)
    most = config.max_upright_rotation if thing.group in _UPRIGHT_GROUPS else config.max_rotation
    angle = 0.0 if thing.cut else float(rng.uniform(-most, most))
    return make_sprite(cutout, scale, mirrored, angle), scale


def _position(
    rng: np.random.Generator,
    sprite: tuple[int, int],
    size: tuple[int, int],
    thing: Thing,
    near: Placed | None,
    ground: bool,
) -> tuple[int, int]:
    """Left and upper edge of a sprite of height and width ``sprite``: inside, now and then partly outside."""
    (h, w), (height, width) = sprite, size
    reach = _MAX_OUTSIDE if rng.random() < _OUTSIDE_SHARE else 0.0
    low_x, high_x = -reach * w, width - w + reach * w
    low_y, high_y = -reach * h, height - h + reach * h
    x, y = float(rng.uniform(low_x, max(low_x, high_x))), float(rng.uniform(low_y, max(low_y, high_y)))
    if near is not None:
        away_x, away_y = 0.5 * (w + near.sprite.shape[1]), 0.5 * (h + near.sprite.shape[0])
        angle = float(rng.uniform(0, 2 * np.pi))
        x = near.x + near.sprite.shape[1] / 2 + np.cos(angle) * away_x * 0.8 - w / 2
        y = near.y + near.sprite.shape[0] / 2 + np.sin(angle) * away_y * 0.6 - h / 2
        x, y = float(np.clip(x, low_x, max(low_x, high_x))), float(np.clip(y, low_y, max(low_y, high_y)))
    if ground and thing.group in _UPRIGHT_GROUPS:
        y = max(y, 0.45 * height - h * 0.5)
    if thing.cut:
        y = height - h
    return round(x), round(y)


def _measure(
    placed: Sequence[Placed],
    size: tuple[int, int],
    gain: np.ndarray,
    blocked: frozenset[str],
    generic: bool,
    config: RefThingsConfig,
) -> ThingScene | None:
    """The visible parts and what is measured of them; None if too little of a thing is visible."""
    full = np.stack([one.mask(*size) for one in placed])  # (K, H, W)
    whole = full.sum(axis=(1, 2), dtype=np.int64)  # (K,)
    masks = np.zeros_like(full)
    over = np.zeros(size, np.uint8)
    for index in range(len(placed) - 1, -1, -1):
        masks[index] = full[index] & (1 - over)
        over |= full[index]
    areas = masks.sum(axis=(1, 2), dtype=np.int64)  # (K,)
    share = areas / (size[0] * size[1])
    if np.any(areas < config.min_visible * whole) or share.min() < config.min_area or share.max() > config.max_area:
        return None
    boxes = np.array([cv2.boundingRect(mask) for mask in masks], np.int64)  # (K, 4): x, y, width, height
    boxes[:, 2:] += boxes[:, :2]
    hidden = np.zeros((len(placed), len(placed)))
    for below in range(len(placed)):
        for above in range(below + 1, len(placed)):
            hidden[below, above] = int((full[below] & full[above]).sum()) / whole[below]
    colors = np.stack([_colors(one, mask, size, gain) for one, mask in zip(placed, masks, strict=True)])  # (K, C)
    things = tuple(one.thing for one in placed)
    return ThingScene(things, masks, areas, boxes, hidden, edge_gaps(masks), colors, blocked, generic)


def edge_gaps(masks: np.ndarray) -> np.ndarray:
    """Pixels from edge to edge between masks (K, H, W), measured coarsely: (K, K) float64, 0 on the diagonal."""
    step = _COARSE
    coarse = np.ascontiguousarray(masks[:, ::step, ::step])
    gaps = np.zeros((len(masks), len(masks)))
    for index, mask in enumerate(coarse):
        away = cv2.distanceTransform(1 - mask, cv2.DIST_L2, cv2.DIST_MASK_5) * step
        for other in range(len(masks)):
            if other != index and coarse[other].any():
                gaps[index, other] = float(away[coarse[other] > 0].min())
    return np.minimum(gaps, gaps.T)


def _colors(placed: Placed, mask: np.ndarray, size: tuple[int, int], gain: np.ndarray) -> np.ndarray:
    """The colour verdicts of a thing's visible pixels in the image's light, (C,) int8."""
    rows, columns, own_rows, own_columns = placed.region(*size)
    sprite = placed.sprite[own_rows, own_columns]
    pixels = sprite[(mask[rows, columns] > 0) & (sprite[..., 3] > _INNER_ALPHA)]  # (N, 4)
    if not len(pixels):
        return np.zeros(len(COLORS), np.int8)
    pixels = pixels[:: max(1, len(pixels) // _COLOR_PIXELS)]
    if placed.thing.group == "people":  # of a person, colour words mean the clothes, the hair or the skin
        return np.zeros(len(COLORS), np.int8)
    own = pixels[:, :3] / pixels[:, 3:] * 255  # (N, 3)
    # People allow for the light to some degree, so a colour counts only if it does with and without it.
    verdicts, lit = color_verdicts(own), color_verdicts(own * gain)
    verdicts = np.where(verdicts == lit, verdicts, 0).astype(np.int8)
    for color in placed.thing.colours:
        if color in COLORS:
            verdicts[COLORS.index(color)] = 1
    return verdicts
