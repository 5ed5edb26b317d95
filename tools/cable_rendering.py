"""Render tubes that lie on each other: an image, and the exact mask of those that are cables.

A strand is a tube along a curve. Its surface has the coordinates `along` (distance from the start in radii)
and `across` (-1 to 1, from one edge to the other). The surface is sampled densely, and each sample falls into
one pixel of a grid that is `OVERSAMPLING` times as fine as the image. Samples of higher parts replace those
of lower parts. Only then, the visible samples are shaded. The image is the average of the fine pixels. The
mask is where at least half of them are cable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

OVERSAMPLING = 3
SAMPLE_STEP = 0.7  # in fine pixels; below 1 / sqrt(2), so that samples leave no pixel out
LEVEL_STEP = 0.08  # strands are painted in layers of this height
ROWS_AT_ONCE = 384


@dataclass(frozen=True)
class Look:
    """Colors and material of a strand. Colors are RGB in 0..1."""

    color: np.ndarray
    limb: float = 0.4  # the brightness is 1 - limb * |across| ** limb_power
    limb_power: float = 2.0
    gloss: float = 0.0  # brightness of the highlight
    gloss_width: float = 0.15  # of the highlight, in radii
    grain: float = 0.03  # standard deviation of the noise of the surface
    second_color: np.ndarray | None = None  # of a stripe, or of every other thread of a weave
    stripe: float = 0.4  # half of its width as an angle around the axis, in radians
    stripe_turn: float = 0.0  # radians around the axis per radius along it
    weave: str = ""  # "helix" or "braid"
    weave_depth: float = 0.4  # how dark it is between threads, 0 to 1
    weave_pitch: float = 4.0  # threads per radius, along and around
    printed: bool = False


@dataclass(frozen=True)
class Strand:
    """A tube along a curve, or a flat part of about the same appearance.

    `points` (n, 2) are (x, y) in pixels of the image. `radius` and `height` are (n,), or one number for all
    points. Where strands overlap, the higher one is visible. The height has no unit.
    """

    points: np.ndarray
    radius: np.ndarray | float
    height: np.ndarray | float
    look: Look
    is_cable: bool = True


@dataclass(frozen=True)
class Light:
    """The light of a scene: `direction` (2,) is the unit vector (x, y) that points to the light."""

    direction: np.ndarray
    side: float  # how much brighter the side toward the light is, 0 to 1
    shadow: float  # depth of the shadow at a crossing, 0 to 1


def render(
    strands: Sequence[Strand], size: tuple[int, int], background: np.ndarray, light: Light, grain: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Render strands over a plain background.

    Args:
        strands: where heights are equal, a later strand covers an earlier one.
        size: (h, w) of the image.
        background: RGB in 0..1.
        light: the same for all strands.
        grain: float32 (256, 256), noise of mean 0 and standard deviation 1.

    Returns:
        Image RGB uint8 (h, w, 3) and mask bool (h, w).
    """
    rows = sample_rows(strands)
    fine_size = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
    canvas = Canvas(fine_size)
    for chunk in painting_order(rows):
        canvas.paint(rows, chunk, light)
    image: np.ndarray = np.empty((*fine_size, 3), np.uint8)
    image[:] = np.rint(255 * background)
    covered = np.flatnonzero(canvas.row >= 0)
    row = canvas.row[covered]
    image.reshape(-1, 3)[covered] = shade_samples(strands, rows, canvas, covered, light, grain)
    cable: np.ndarray = np.zeros(fine_size, np.uint8)
    is_cable = np.array([strand.is_cable for strand in strands])
    cable.reshape(-1)[covered] = 255 * is_cable[rows.strand[row]]
    coverage = cv2.resize(cable, size[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), coverage > 127


# --- Sampling the strands ----------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Cross sections of all strands, in one array per quantity; lengths are in fine pixels."""

    center: np.ndarray  # float32 (n, 2)
    normal: np.ndarray  # float32 (n, 2), unit vectors
    radius: np.ndarray  # float32 (n,)
    along: np.ndarray  # float32 (n,), in radii
    level: np.ndarray  # int (n,)
    strand: np.ndarray  # int (n,), index of the strand


def sample_rows(strands: Sequence[Strand]) -> Rows:
    """Sample each strand so densely that rows are at most `SAMPLE_STEP` apart at its outer edge."""
    parts = []
    for index, strand in enumerate(strands):
        points = strand.points * OVERSAMPLING
        radius = np.broadcast_to(strand.radius, len(points)) * OVERSAMPLING
        height = np.broadcast_to(strand.height, len(points))
        steps = np.diff(points, axis=0)
        lengths = np.hypot(steps[:, 0], steps[:, 1])
        heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
        turn = np.abs(np.gradient(heading)) if len(heading) > 1 else np.zeros(len(heading))
        distance = np.append(0, np.cumsum(lengths + turn * radius[1:]))
        n = max(2, int(distance[-1] / SAMPLE_STEP) + 2)
        at = np.linspace(0.5, max(0.5, distance[-1] - 0.5), n)  # a pixel is painted if its center is inside
        center = np.column_stack([np.interp(at, distance, points[:, axis]) for axis in (0, 1)])
        tangent = np.gradient(center, axis=0)
        tangent /= np.maximum(np.hypot(tangent[:, 0], tangent[:, 1]), 1e-9)[:, None]
        row_radius = np.interp(at, distance, radius)
        step = np.append(0, np.hypot(*np.diff(center, axis=0).T))
        level = np.floor(np.interp(at, distance, height) / LEVEL_STEP).astype(int)
        normal = tangent[:, ::-1] * (-1, 1)
        parts.append((center, normal, row_radius, np.cumsum(step / row_radius), level, np.full(n, index)))
    arrays = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return Rows(*(array.astype(np.float32) for array in arrays[:4]), *arrays[4:])


def painting_order(rows: Rows) -> Iterator[np.ndarray]:
    """Yield row indices: lower levels first, then earlier strands; each array is of one level and strand."""
    order = np.lexsort((rows.strand, rows.level))
    changes = (np.diff(rows.level[order]) != 0) | (np.diff(rows.strand[order]) != 0)
    for group in np.split(order, np.flatnonzero(changes) + 1):
        for start in range(0, len(group), ROWS_AT_ONCE):
            yield group[start : start + ROWS_AT_ONCE]


class Canvas:
    """What is visible in each fine pixel: the row (-1 for none), the place across it, the depth of shadow."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.row: np.ndarray = np.full(size[0] * size[1], -1, np.int32)
        self.across: np.ndarray = np.empty(size[0] * size[1], np.float32)
        self.shadow: np.ndarray = np.zeros(size[0] * size[1], np.float32)

    def paint(self, rows: Rows, chunk: np.ndarray, light: Light) -> None:
        """Paint rows over everything painted before, and the shadow that they cast on it."""
        center, radius = rows.center[chunk], rows.radius[chunk]
        shadow_width = np.maximum(0.7 * radius, 1.5 * OVERSAMPLING)
        margin = (radius + shadow_width)[:, None]
        in_frame = ((center > -margin) & (center < np.array(self.size[::-1]) + margin)).all(axis=1)
        chunk, radius, shadow_width = chunk[in_frame], radius[in_frame], shadow_width[in_frame]
        if len(chunk) == 0:
            return
        self._paint_shadow(rows, chunk, shadow_width, light)
        # The outermost samples are half a fine pixel inside: a pixel is painted if its center is inside.
        n = int(np.ceil(2 * radius.max() / SAMPLE_STEP)) + 1
        offset = np.linspace(-1, 1, n, dtype=np.float32) * np.maximum(radius - 0.5, 0)[:, None]
        pixel, sample = self._pixels(rows, chunk, offset)
        self.row[pixel] = np.repeat(chunk, n)[sample]
        self.across[pixel] = (offset / radius[:, None]).reshape(-1)[sample]
        self.shadow[pixel] = 0

    def _paint_shadow(self, rows: Rows, chunk: np.ndarray, width: np.ndarray, light: Light) -> None:
        n = int(np.ceil(width.max() / SAMPLE_STEP)) + 1
        share = np.linspace(0, 1, n, dtype=np.float32)  # of the width of the shadow
        facing = rows.normal[chunk] @ light.direction.astype(np.float32)
        for side in (-1, 1):
            offset = side * (rows.radius[chunk, None] + share * width[:, None])
            pixel, sample = self._pixels(rows, chunk, offset)
            below = self.row[pixel]
            row = np.repeat(chunk, n)[sample]
            # No shadow on the neighboring rows of the same strand.
            hit = (below >= 0) & (np.abs(below - row) > (6 * rows.radius[row] + 30) / SAMPLE_STEP)
            away = 1 - 0.6 * side * facing[:, None]  # the shadow is wider on the side away from the light
            depth = light.shadow * np.clip(1 - share / np.maximum(away, 0.3), 0, 1)
            value = depth.astype(np.float32).reshape(-1)[sample[hit]]
            self.shadow[pixel[hit]] = np.maximum(self.shadow[pixel[hit]], value)

    def _pixels(self, rows: Rows, chunk: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat indices of the pixels at `offset` (rows, n) from the axis, and of the samples in them."""
        position = rows.center[chunk, :, None] + rows.normal[chunk, :, None] * offset[:, None]
        x, y = (np.floor(position[:, axis]).astype(np.int32).reshape(-1) for axis in (0, 1))
        height, width = self.size
        sample = np.flatnonzero((x >= 0) & (x < width) & (y >= 0) & (y < height))
        return (y * width + x)[sample], sample


# --- Shading -----------------------------------------------------------------------------------


def shade_samples(
    strands: Sequence[Strand],
    rows: Rows,
    canvas: Canvas,
    covered: np.ndarray,
    light: Light,
    grain: np.ndarray,
) -> np.ndarray:
    """Colors uint8 (n, 3) of the fine pixels `covered` (n,)."""
    row = canvas.row[covered]
    facing = (rows.normal @ light.direction.astype(np.float32))[row]
    along, across = rows.along[row], canvas.across[covered]
    strand = rows.strand[row].astype(np.int16)
    order = np.argsort(strand, kind="stable")
    colors: np.ndarray = np.empty((len(row), 3), np.float32)
    for group in np.split(order, np.flatnonzero(np.diff(strand[order])) + 1):
        if len(group):
            painted = strands[strand[group[0]]]
            fineness = max(5.0, float(np.mean(painted.radius)))  # a grain is at most a pixel
            places = along[group], across[group], facing[group]
            colors[group] = shade(painted.look, *places, light.side, grain, fineness)
    colors *= 1 - canvas.shadow[covered][:, None]
    return np.rint(255 * colors.clip(0, 1)).astype(np.uint8)


def shade(
    look: Look,
    along: np.ndarray,
    across: np.ndarray,
    facing: np.ndarray,
    side: float,
    grain: np.ndarray,
    fineness: float,
) -> np.ndarray:
    """Colors float32 (n, 3) of a strand at (n,) places.

    `facing` is the cosine of light and normal, and `fineness` the number of grains per radius.
    """
    angle = np.arcsin(across)  # around the axis
    brightness = (1 - look.limb * np.abs(across) ** look.limb_power) * (1 + side * facing * across)
    noise = grain[(along * fineness).astype(int) % 256, ((angle + 2) * fineness).astype(int) % 256]
    slow = grain[(along / 6).astype(int) % 256, 0]
    brightness *= 1 + look.grain * (noise + 0.3 * slow)
    color = np.broadcast_to(look.color.astype(np.float32), (len(along), 3))
    if look.weave:
        valley, other_thread = weave_pattern(look, along, angle)
        brightness *= 1 - look.weave_depth * valley
        if look.second_color is not None:
            color = np.where(other_thread[:, None], look.second_color.astype(np.float32), color)
    elif look.second_color is not None:
        turned = np.cos(angle + 0.4 + look.stripe_turn * along) > np.cos(look.stripe)
        color = np.where(turned[:, None], look.second_color.astype(np.float32), color)
    if look.printed:
        letter = grain[(along * 3).astype(int) % 256, ((across + 1) * 12).astype(int)] > 0.2
        printed = letter & (np.abs(across + 0.1) < 0.28) & (along % 40 < 22) & (along % 2 < 1.5)
        ink: np.ndarray = np.full(3, 0.85 if look.color.mean() < 0.45 else 0.12, np.float32)
        color = np.where(printed[:, None], ink, color)
    highlight = look.gloss * np.exp(-(((across - 0.45 * facing) / look.gloss_width) ** 2))
    return color * brightness[:, None] + highlight[:, None]


def weave_pattern(look: Look, along: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How deep each place is between threads (0 to 1), and whether it is on every other thread; both (n,)."""
    one = look.weave_pitch * (0.7 * along + angle)
    if look.weave == "helix":
        return 1 - np.abs(np.sin(one)), (one / np.pi).astype(int) % 2 == 0
    other = look.weave_pitch * (0.7 * along - angle)
    # In a braid, the threads of the two directions are on top in turn, like the fields of a chessboard.
    first_on_top = (np.floor(one / np.pi) + np.floor(other / np.pi)) % 2 == 0
    valley = 1 - np.abs(np.where(first_on_top, np.sin(one), np.sin(other)))
    return valley, first_on_top
