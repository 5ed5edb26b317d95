"""Draw the demo's data: cables on plain desks with exact masks, and folders of backgrounds.

    pip install scikit-image
    python tools/make_demo.py

Writes `train/` and `test/` (imgs/ and masks/ each, other cables in each) and `backgrounds_train/`
and `backgrounds_test/` in demo/. The backgrounds are drawn textures and parts of photos that
scikit-image's wheel ships, all CC0 or public domain as its documentation says. The same seed gives
the same files.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

SIZE = (240, 320)  # (h, w) of a picture
OVERSAMPLING = 3  # drawn this much larger, then averaged down
PICTURES = {"train": 32, "test": 12}
PHOTOS = {
    "train": [data.astronaut, data.camera, data.brick, data.rocket, data.gravel, data.grass],
    "test": [data.chelsea, data.coffee],
}
CROPS_PER_PHOTO = 2
CROP = (300, 400)  # (h, w) of a background
TEXTURES = {"train": 12, "test": 4}


def draw_curve(rng: np.random.Generator, length: int) -> np.ndarray:
    """A smooth random curve, (length, 2) points (x, y) one pixel apart: its curvature wanders."""
    knots = rng.normal(0, 1, length // 60 + 4)
    curvature = np.interp(np.arange(length), np.linspace(0, length, len(knots)), knots) * 0.010
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(curvature)
    steps = np.column_stack([np.cos(heading), np.sin(heading)])
    curve = np.cumsum(steps, axis=0)
    center = rng.uniform(0.3, 0.7, 2) * np.array(SIZE[::-1]) * OVERSAMPLING
    return curve - curve.mean(axis=0) + center


def paint_cable(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one cable over `image` (float 0..1) and its silhouette over `mask`, both in place.

    It is painted piece by piece along its length, so that later pieces cross over earlier ones.
    """
    radius = rng.uniform(2, 5.5) * OVERSAMPLING
    curve = draw_curve(rng, int(rng.uniform(0.7, 1.9) * SIZE[1]) * OVERSAMPLING)
    color = cv2.cvtColor(
        np.array([[[rng.uniform(0, 360), rng.uniform(0, 1), rng.uniform(0.15, 1)]]], np.float32),
        cv2.COLOR_HSV2RGB,
    )[0, 0]
    light = np.array([*rng.normal(0, 0.6, 2), 1.0])
    light /= np.linalg.norm(light)
    twist = rng.uniform(0, 0.35) if rng.random() < 0.4 else 0.0  # a rope's strands
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    piece = int(4 * radius)
    for start in range(0, len(curve) - 1, piece):
        points = curve[start : start + piece + int(radius) + 6]
        low = np.floor(points.min(axis=0) - 3 * radius).astype(int).clip(0)
        high = np.ceil(points.max(axis=0) + 3 * radius).astype(int).clip(0)
        box = np.s_[low[1] : high[1], low[0] : high[0]]
        pixels = np.stack([columns[box], rows[box]], axis=-1).astype(float)
        if pixels.size == 0:
            continue
        offsets = pixels[:, :, None] - points[None, None, ::3]
        nearest = np.square(offsets).sum(axis=-1).argmin(axis=-1)
        offset = np.take_along_axis(offsets, nearest[..., None, None], axis=2)[:, :, 0] / radius
        distance = np.linalg.norm(offset, axis=-1)
        # beyond its ends a piece has nothing to say: its neighbors go on there
        beyond = (nearest == 0) & (start > 0)
        if start + len(points) < len(curve):
            beyond |= nearest == nearest.max()
        # a soft shadow falls on what lies below
        shadow = np.clip(1.5 - 0.75 * np.linalg.norm(offset - 0.6, axis=-1), 0, 0.5) * 0.5
        image[box] *= 1 - np.where(beyond | (distance <= 1), 0, shadow)[..., None]
        inside = (distance <= 1) & ~beyond
        diffuse, shine = light_cylinder(offset, distance, light)
        along = start + 3 * nearest
        strands = 1 - twist * (np.sin(along / radius * 1.5 + 4 * offset[..., 0]) > 0)
        shaded = color * ((0.35 + 0.65 * diffuse) * strands)[..., None] + shine[..., None]
        image[box][inside] = np.clip(shaded, 0, 1)[inside]
        mask[box][inside] = 1.0


def light_cylinder(
    offset: np.ndarray, distance: np.ndarray, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse light and shine (h, w) on a cylinder of radius 1, `offset` (h, w, 2) from its axis."""
    depth = np.sqrt(np.clip(1 - distance**2, 0, 1))
    facing = np.clip(np.concatenate([offset, depth[..., None]], axis=-1) @ light, 0, 1)
    return facing, 0.5 * facing**30


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two to four cables on a plain desk: RGB uint8 (H, W, 3) and a mask of 0 and 255."""
    height, width = (side * OVERSAMPLING for side in SIZE)
    slope = np.linspace(-1, 1, width)[None, :, None] * rng.normal(0, 0.06, 3)
    image = np.clip(rng.uniform(0.25, 0.85, 3) + slope + np.zeros((height, width, 3)), 0, 1)
    mask = np.zeros((height, width))
    for _ in range(rng.integers(2, 5)):
        paint_cable(image, mask, rng)
    image = cv2.resize(image, SIZE[::-1], interpolation=cv2.INTER_AREA)
    mask = cv2.resize(mask, SIZE[::-1], interpolation=cv2.INTER_AREA)
    noisy = 255 * image + rng.normal(0, 3, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), np.where(mask > 0.5, 255, 0).astype(np.uint8)


def random_crop(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part of a photo in RGB."""
    if photo.ndim == 2:
        photo = cv2.cvtColor(photo, cv2.COLOR_GRAY2RGB)
    height, width = min(CROP[0], photo.shape[0]), min(CROP[1], photo.shape[1])
    top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    return photo[top : top + height, left : left + width, :3]


def draw_texture(rng: np.random.Generator) -> np.ndarray:
    """A stained, grained surface: noise of several sizes, stretched, between two colors."""
    height, width = CROP
    height_map = np.zeros(CROP, np.float32)
    stretch = rng.choice([1, 1, 4])
    for octave in range(2, 9):
        grid = rng.normal(0, 1, (2**octave, max(2, 2**octave // stretch))).astype(np.float32)
        height_map += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 1.4**octave
    height_map = cv2.normalize(height_map, None, 0, 1, cv2.NORM_MINMAX)[..., None]
    colors = rng.uniform(50, 210, (2, 1)) + rng.normal(0, 20, (2, 3))
    surface = colors[0] * (1 - height_map) + colors[1] * height_map
    return np.clip(surface, 0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=90)


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "demo"
    for seed, split in enumerate(("train", "test")):
        rng = np.random.default_rng(seed)
        for number in range(PICTURES[split]):
            image, mask = draw_picture(rng)
            save(folder / split / "imgs" / f"{number:03d}.jpg", image)
            save(folder / split / "masks" / f"{number:03d}.png", mask)
        for photo in PHOTOS[split]:
            for number in range(CROPS_PER_PHOTO):
                crop = random_crop(photo(), rng)
                save(folder / f"backgrounds_{split}" / f"{photo.__name__}_{number}.jpg", crop)
        for number in range(TEXTURES[split]):
            save(folder / f"backgrounds_{split}" / f"texture_{number:02d}.jpg", draw_texture(rng))


if __name__ == "__main__":
    main()
