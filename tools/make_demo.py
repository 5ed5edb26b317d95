"""Draw the data of the demo: cables on plain desks with exact masks, and folders of backgrounds.

    python tools/make_demo.py

Writes `train/` and `test/` (with imgs/ and masks/) and `backgrounds_train/` and `backgrounds_test/` in demo/.
Training and test show different cables. The backgrounds are drawn textures and parts of photos that come with
scikit-image; its documentation says that all of them are CC0 or public domain. The same versions of the
libraries give the same files.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage import data

SIZE = (240, 320)  # (h, w) of an image
OVERSAMPLING = 3  # images are drawn this much larger, and then averaged down
IMAGES = {"train": 32, "test": 12}
PHOTOS = {
    "train": [data.astronaut, data.camera, data.brick, data.rocket, data.gravel, data.grass],
    "test": [data.chelsea, data.coffee],
}
CROPS_PER_PHOTO = 2
CROP = (300, 400)  # (h, w) of a background
TEXTURES = {"train": 12, "test": 4}


def draw_curve(rng: np.random.Generator, length: int) -> np.ndarray:
    """Draw a smooth curve of random curvature: (length, 2) points (x, y) that are one pixel apart."""
    knots = rng.normal(0, 1, length // 60 + 4)
    curvature = np.interp(np.arange(length), np.linspace(0, length, len(knots)), knots) * 0.010
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(curvature)
    steps = np.column_stack([np.cos(heading), np.sin(heading)])
    curve = np.cumsum(steps, axis=0)
    center = rng.uniform(0.3, 0.7, 2) * np.array(SIZE[::-1]) * OVERSAMPLING
    return curve - curve.mean(axis=0) + center


def paint_cable(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one cable over `image` (H, W, 3) float in 0..1, and its silhouette over `mask` (H, W), in place.

    The cable is painted piece by piece along its length, so that later pieces cross over earlier ones.
    """
    radius = rng.uniform(2, 5.5) * OVERSAMPLING
    curve = draw_curve(rng, int(rng.uniform(0.7, 1.9) * SIZE[1]) * OVERSAMPLING)
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(0, 1), rng.uniform(0.15, 1)]]], np.float32)
    color = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]
    light = np.array([*rng.normal(0, 0.6, 2), 1.0])
    light /= np.linalg.norm(light)
    strand_depth = rng.uniform(0, 0.35) if rng.random() < 0.4 else 0.0  # 40 % are ropes with visible strands
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
        offset, nearest = offset_from_axis(pixels, points, radius)
        distance = np.linalg.norm(offset, axis=-1)
        # Pixels beyond the ends of a piece belong to the neighboring pieces.
        beyond = (nearest == 0) & (start > 0)
        if start + len(points) < len(curve):
            beyond |= nearest == nearest.max()
        # The cable casts a soft shadow on everything below it.
        shadow = np.clip(1.5 - 0.75 * np.linalg.norm(offset - 0.6, axis=-1), 0, 0.5) * 0.5
        image[box] *= 1 - np.where(beyond | (distance <= 1), 0, shadow)[..., None]
        inside = (distance <= 1) & ~beyond
        diffuse, highlight = light_cylinder(offset, distance, light)
        along = start + 3 * nearest
        strands = 1 - strand_depth * (np.sin(along / radius * 1.5 + 4 * offset[..., 0]) > 0)
        shaded = color * ((0.35 + 0.65 * diffuse) * strands)[..., None] + highlight[..., None]
        image[box][inside] = np.clip(shaded, 0, 1)[inside]
        mask[box][inside] = 1.0


def offset_from_axis(pixels: np.ndarray, points: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest point of the axis for every pixel; only every third point is considered.

    Returns the vectors (h, w, 2) from the axis in units of `radius`, and the indices (h, w) of the points
    divided by 3. `pixels` (h, w, 2) and `points` (n, 2) are (x, y).
    """
    offsets = pixels[:, :, None] - points[None, None, ::3]
    nearest = np.square(offsets).sum(axis=-1).argmin(axis=-1)
    offset = np.take_along_axis(offsets, nearest[..., None, None], axis=2)[:, :, 0]
    return offset / radius, nearest


def light_cylinder(
    offset: np.ndarray, distance: np.ndarray, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute diffuse light and specular highlight (h, w) on a cylinder of radius 1.

    `offset` (h, w, 2) is the vector from the axis, `distance` (h, w) its length, and `light` the unit vector
    (x, y, z) to the light.
    """
    depth = np.sqrt(np.clip(1 - distance**2, 0, 1))
    facing = np.clip(np.concatenate([offset, depth[..., None]], axis=-1) @ light, 0, 1)
    return facing, 0.5 * facing**30


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two to four cables on a plain desk: RGB uint8 (H, W, 3), and a mask uint8 (H, W) of 0 and 255."""
    height, width = (side * OVERSAMPLING for side in SIZE)
    slope = np.linspace(-1, 1, width)[None, :, None] * rng.normal(0, 0.06, 3)
    large_image = np.clip(rng.uniform(0.25, 0.85, 3) + slope + np.zeros((height, width, 3)), 0, 1)
    large_mask = np.zeros((height, width))
    for _ in range(rng.integers(2, 5)):
        paint_cable(large_image, large_mask, rng)
    image = cv2.resize(large_image, SIZE[::-1], interpolation=cv2.INTER_AREA)
    mask = cv2.resize(large_mask, SIZE[::-1], interpolation=cv2.INTER_AREA)
    noisy = 255 * image + rng.normal(0, 3, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), np.where(mask > 0.5, 255, 0).astype(np.uint8)


def random_crop(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut a random part of at most CROP out of a photo; returns RGB uint8."""
    if photo.ndim == 2:
        photo = cv2.cvtColor(photo, cv2.COLOR_GRAY2RGB)
    height, width = min(CROP[0], photo.shape[0]), min(CROP[1], photo.shape[1])
    top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    return photo[top : top + height, left : left + width, :3]


def draw_texture(rng: np.random.Generator) -> np.ndarray:
    """Draw a surface with stains and grain: noise of several scales between two colors, RGB uint8."""
    height, width = CROP
    noise: np.ndarray = np.zeros(CROP, np.float32)
    stretch = rng.choice([1, 1, 4])
    for octave in range(2, 9):
        grid = rng.normal(0, 1, (2**octave, max(2, 2**octave // stretch))).astype(np.float32)
        layer: np.ndarray = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        noise += layer / 1.4**octave
    blend = cv2.normalize(noise, np.empty_like(noise), 0, 1, cv2.NORM_MINMAX)[..., None]
    colors = rng.uniform(50, 210, (2, 1)) + rng.normal(0, 20, (2, 3))
    surface = colors[0] * (1 - blend) + colors[1] * blend
    return np.clip(surface, 0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=90)


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "demo"
    for seed, split in enumerate(("train", "test")):
        rng = np.random.default_rng(seed)
        for number in range(IMAGES[split]):
            image, mask = draw_image(rng)
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
