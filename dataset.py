"""From folders to batches: pair photos with masks, cut out, composite, augment, draw prompts, load.

Images are RGB uint8 (H, W, 3). A mask file is read as bool (H, W); from there on a mask is soft,
float32 (H, W) in 0..1, so that thin cables survive being resized. Every random choice comes from a
generator made of (seed, epoch, index), never from global state.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from config import DatasetConfig

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
PROMPTS = ("none", "point", "box", "mixed")


# --- Files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A photo and its mask file."""

    image_path: Path
    mask_path: Path


@dataclass(frozen=True)
class Source:
    """One dataset of the config with its files found."""

    config: DatasetConfig
    pairs: tuple[Pair, ...]
    backgrounds: tuple[Path, ...]


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3), turned upright as its EXIF says.

    Raises ValueError naming the file if it cannot be decoded whole or has more than 8 bits.
    """
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """A mask file as bool (H, W): in a JPEG above 127, else above half of the file's maximum.

    Of a colour file each pixel's largest channel counts. Raises ValueError naming the file if it
    cannot be decoded whole, has more than 8 bits, or has many values between its two ends.
    """
    image = _open(path)
    if image.mode in ("1", "L"):
        values = np.asarray(image.convert("L"))
    else:
        values = np.asarray(image.convert("RGB")).max(axis=2)
    top = 255 if image.format in ("JPEG", "MPO") else max(int(values.max()), 1)
    _check_binary(values, top, path)
    return values > top / 2


# A smooth edge puts few of a mask's pixels in the middle of its range; a label map, a photo or a
# map of probabilities puts many there.
MAX_MIDDLE_SHARE = 0.25


def _check_binary(values: np.ndarray, top: int, path: Path) -> None:
    above = np.count_nonzero(values > 0.25 * top)
    middle = above - np.count_nonzero(values > 0.75 * top)
    if middle > MAX_MIDDLE_SHARE * above:
        raise ValueError(
            f"{path}: not a binary mask, {100 * middle / above:.0f} % of its foreground has values "
            f"from {0.25 * top:.0f} to {0.75 * top:.0f}; expected two values such as 0 and 255"
        )


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from error
    if upright.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"{path}: expected 8-bit grey or colour, got Pillow's mode {upright.mode!r}")
    return upright


def find_sources(configs: list[DatasetConfig]) -> list[Source]:
    """Find the files of every dataset and read each once.

    Raises one ValueError that lists what is wrong in all of them (the first 10 and the count):
    empty folders, unmatched or duplicate stems, undecodable files, size mismatches, masks that are
    not binary.
    """
    faults = []
    sources = []
    for config in configs:
        pairs = _find_pairs(config.data_dir, faults)
        backgrounds = []
        for folder in config.bg_paths:
            found = _image_files(folder)
            if not found:
                faults.append(f"{folder}: no .png, .jpg or .jpeg file in it")
            backgrounds += found
        sources.append(Source(config, tuple(pairs), tuple(backgrounds)))
    unique_pairs = dict.fromkeys(pair for source in sources for pair in source.pairs)
    unique_backgrounds = dict.fromkeys(path for source in sources for path in source.backgrounds)
    with ThreadPoolExecutor() as pool:
        faults += filter(None, pool.map(_pair_fault, unique_pairs))
        faults += filter(None, pool.map(_image_fault, unique_backgrounds))
    if faults:
        shown = faults[:10] + ([f"... and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise ValueError("\n  ".join([f"{len(faults)} problem(s) in the data:", *shown]))
    return sources


def _find_pairs(data_dir: Path, faults: list[str]) -> list[Pair]:
    by_stem = []
    for folder in (data_dir / "imgs", data_dir / "masks"):
        if not folder.is_dir():
            faults.append(f"{folder}: no such folder (expected imgs/ and masks/ in {data_dir})")
            return []
        stems = {}
        for path in _image_files(folder):
            if path.stem in stems:
                faults.append(f"{path}: has the same stem as {stems[path.stem].name}")
            stems[path.stem] = path
        if not stems:
            faults.append(f"{folder}: no .png, .jpg or .jpeg file in it")
            return []
        by_stem.append(stems)
    images, masks = by_stem
    faults += [f"{images[stem]}: has no mask in masks/" for stem in sorted(images.keys() - masks.keys())]
    faults += [f"{masks[stem]}: has no photo in imgs/" for stem in sorted(masks.keys() - images.keys())]
    return [Pair(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _pair_fault(pair: Pair) -> str | None:
    try:
        image, mask = read_image(pair.image_path), read_mask(pair.mask_path)
    except ValueError as error:
        return str(error)
    if image.shape[:2] != mask.shape:
        return (
            f"{pair.image_path}: is {image.shape[0]} x {image.shape[1]} (h x w) "
            f"but its mask is {mask.shape[0]} x {mask.shape[1]}"
        )
    return None


def _image_fault(path: Path) -> str | None:
    try:
        read_image(path)
    except ValueError as error:
        return str(error)
    return None


# --- Sizes ------------------------------------------------------------------------------------


def fit_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` (h, w) scaled so that its longest side is `longest`, rounded as SAM does."""
    scale = longest / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (h, w) exactly as `SamPredictor` does (Pillow's antialiased bilinear filter)."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a soft mask to (h, w) by area averaging, which keeps a thin cable's total area."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA)


def pad_to_square(array: np.ndarray, side: int) -> np.ndarray:
    """Pad with zeros at the bottom and right to (side, side, ...)."""
    height, width = array.shape[:2]
    rest = [(0, 0)] * (array.ndim - 2)
    return np.pad(array, [(0, side - height), (0, side - width), *rest])


def read_pair(pair: Pair, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo and its soft mask, brought down to `longest` pixels if larger.

    Cutting out costs time by the pixel, and a phone has ten times more of them than a model sees.
    """
    image, mask = read_image(pair.image_path), read_mask(pair.mask_path).astype(np.float32)
    if max(mask.shape) > longest:
        size = fit_size(mask.shape, longest)
        image, mask = resize_image(image, size), resize_mask(mask, size)
    return image, mask


# --- Compositing ------------------------------------------------------------------------------

# How far inside the mask, in pixels, a cable's colour is trusted to be the cable's own.
TRUSTED_DEPTH = 2.0


def cut_out(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut the cables of a photo out, with a soft edge and no trace of the old background.

    A photo's edge pixels mix cable and background, and masks are rarely exact to the pixel. Pasted
    as they are, they leave a halo from which a model learns to see the pasting. So every pixel
    outside the cables' core takes the colour of the nearest core pixel; the mask's edge is smoothed.

    Args:
        image: RGB uint8 (H, W, 3).
        mask: float32 (H, W) in 0..1.

    Returns:
        The image with cable colours spread everywhere, and the soft mask, float32 (H, W).
    """
    if not mask.any():
        return image, mask
    inside = mask >= min(0.5, mask.max())
    depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
    # Cables thinner than twice the trusted depth keep their ridge, the deepest pixels around.
    ridge = cv2.dilate(depth, np.ones((5, 5), np.uint8))
    core = inside & (depth >= np.minimum(TRUSTED_DEPTH, ridge))
    _, labels = cv2.distanceTransformWithLabels(
        (~core).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colour_of_label = np.zeros((labels.max() + 1, 3), np.uint8)
    colour_of_label[labels[core]] = image[core]
    return colour_of_label[labels], cv2.GaussianBlur(mask, (0, 0), 0.7)


def paste(foreground: np.ndarray, mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Blend a cut-out over a background of the same size by its soft mask."""
    alpha = mask[..., None]
    return np.rint(foreground * alpha + background * (1 - alpha)).astype(np.uint8)


def composite(
    source: Source, pair_index: int, canvas: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paste a pair's cables on a random background: image uint8 and soft mask of size `canvas`."""
    augmented = source.config.w_aug
    background = read_image(source.backgrounds[rng.integers(len(source.backgrounds))])
    background = random_crop(background, canvas, rng)
    indices = [pair_index]
    if augmented:
        background = flip(background, np.zeros(canvas, np.float32), rng)[0]
        background = recolour_scene(background, rng)
        if rng.random() < SECOND_CUT_OUT:
            indices.insert(0, int(rng.integers(len(source.pairs))))
    image, mask = background, np.zeros(canvas, np.float32)
    for index in indices:
        pair = source.pairs[index]
        foreground, alpha = cut_out(*read_pair(pair, longest=max(2 * max(canvas), 1024)))
        if augmented:
            foreground, alpha = flip(foreground, alpha, rng)
            foreground, alpha = move(foreground, alpha, canvas, rng)
            foreground = recolour_cables(foreground, rng)
        else:
            foreground, alpha = resize_image(foreground, canvas), resize_mask(alpha, canvas)
        image = paste(foreground, alpha, image)
        mask = 1 - (1 - mask) * (1 - alpha)
    return (degrade(image, rng) if augmented else image), mask


# --- Augmentation -----------------------------------------------------------------------------

SECOND_CUT_OUT = 0.3  # probability
SCALE = (0.6, 1.6)  # relative to the whole photo filling the canvas
SHIFT = 0.3  # of the canvas side, to either direction
MIN_IN_FRAME = 0.25  # of the cables' pixels


def flip(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mirror left-right and top-bottom, each half of the time."""
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if rng.random() < 0.5:
        image, mask = image[::-1], mask[::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def move(
    image: np.ndarray, mask: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate, scale and shift a cut-out on a canvas of size (h, w), never out of the frame.

    At least a quarter of the pixels that the cables have after scaling stay in the frame.
    """
    fit = min(canvas[0] / mask.shape[0], canvas[1] / mask.shape[1])
    cable = np.argwhere(mask > 0.5)[::7, ::-1].astype(np.float32)  # (n, 2) as (x, y)
    for _ in range(20):
        scale = fit * np.exp(rng.uniform(*np.log(SCALE)))
        angle = rng.uniform(-180, 180)
        shift = rng.uniform(-SHIFT, SHIFT, 2) * canvas[::-1]
        matrix = _similarity(mask.shape, canvas, scale, angle, shift)
        if _share_in_frame(cable, matrix, canvas) >= MIN_IN_FRAME:
            break
    else:  # far off-centre cables: as they were in the photo
        scale, matrix = fit, _similarity(mask.shape, canvas, fit, 0.0, np.zeros(2))
    return _warp(image, mask, matrix, canvas, scale)


def _similarity(
    size: tuple[int, int], canvas: tuple[int, int], scale: float, angle: float, shift: np.ndarray
) -> np.ndarray:
    """The 2 x 3 matrix that scales and turns about the centre and moves it to the canvas's centre."""
    centre = (np.array(size[::-1]) - 1) / 2
    matrix = cv2.getRotationMatrix2D(centre, angle, scale)
    matrix[:, 2] += (np.array(canvas[::-1]) - 1) / 2 - centre + shift
    return matrix


def _share_in_frame(points: np.ndarray, matrix: np.ndarray, canvas: tuple[int, int]) -> float:
    if len(points) == 0:
        return 1.0
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    inside = (moved >= -0.5) & (moved < np.array(canvas[::-1]) - 0.5)
    return float(inside.all(axis=1).mean())


def _warp(
    image: np.ndarray, mask: np.ndarray, matrix: np.ndarray, canvas: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Warp with antialiasing: what shrinks is first averaged down to its final scale."""
    if scale < 1:
        size = (max(1, round(mask.shape[0] * scale)), max(1, round(mask.shape[1] * scale)))
        ratio = np.array(mask.shape[::-1]) / size[::-1]  # old pixels per new one, (x, y)
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        mask = resize_mask(mask, size)
        # Pixel centres of the shrunk picture in coordinates of the old one: (x + 0.5) * ratio - 0.5.
        offset = matrix[:, :2] @ (0.5 * ratio - 0.5) + matrix[:, 2]
        matrix = np.column_stack([matrix[:, :2] * ratio, offset])
    image = cv2.warpAffine(image, matrix, canvas[::-1], borderMode=cv2.BORDER_REPLICATE)
    return image, cv2.warpAffine(mask, matrix, canvas[::-1])


def random_crop(image: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of a background in the canvas's proportions, resized to it.

    The part's sides are from 40 % to all of the largest that fits.
    """
    height, width = image.shape[:2]
    largest = min(height / canvas[0], width / canvas[1])
    scale = largest * rng.uniform(0.4, 1.0)
    crop_h, crop_w = max(1, int(canvas[0] * scale)), max(1, int(canvas[1] * scale))
    top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
    return resize_image(image[top : top + crop_h, left : left + crop_w], canvas)


def recolour_cables(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Any hue, from grey to vivid, from dark to bright: cables come in every colour."""
    return _shift_hsv(
        image,
        hue=rng.uniform(0, 180),
        saturation=(rng.uniform(0.3, 1.5), rng.uniform(-20, 60)),
        gamma=np.exp(rng.uniform(-0.7, 0.7)),
    )


def recolour_scene(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mild changes of hue, saturation and brightness of a background or a whole photo."""
    return _shift_hsv(
        image,
        hue=rng.uniform(-15, 15),
        saturation=(rng.uniform(0.6, 1.4), 0.0),
        gamma=np.exp(rng.uniform(-0.4, 0.4)),
    )


def _shift_hsv(image: np.ndarray, *, hue: float, saturation: tuple[float, float], gamma: float) -> np.ndarray:
    """Shift the hue (in OpenCV's half degrees), scale and offset saturation, bend brightness."""
    h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    h = ((h.astype(np.float32) + hue) % 180).astype(np.uint8)
    levels = np.arange(256, dtype=np.float32)
    s = cv2.LUT(s, np.clip(levels * saturation[0] + saturation[1], 0, 255).astype(np.uint8))
    v = cv2.LUT(v, (255 * (levels / 255) ** gamma).astype(np.uint8))
    return cv2.cvtColor(cv2.merge([h, s, v]), cv2.COLOR_HSV2RGB)


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera adds: brightness and contrast, and sometimes blur, noise, JPEG artefacts."""
    levels = np.arange(256) * rng.uniform(0.75, 1.25) + rng.uniform(-25, 25)
    image = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        noise = rng.normal(0, rng.uniform(2, 10), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
        image = np.asarray(Image.open(buffer))
    return image


def zoom(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random part of a photo and its mask, with sides from 60 % to all of the whole."""
    share = rng.uniform(0.6, 1.0)
    height, width = (max(1, round(side * share)) for side in mask.shape)
    top = rng.integers(mask.shape[0] - height + 1)
    left = rng.integers(mask.shape[1] - width + 1)
    part = np.s_[top : top + height, left : left + width]
    return image[part], mask[part]


def photo(
    source: Source, pair_index: int, canvas: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A photo that is used as it is: image uint8 and soft mask of size `canvas`."""
    pair = source.pairs[pair_index]
    image, mask = read_image(pair.image_path), read_mask(pair.mask_path).astype(np.float32)
    if source.config.w_aug:
        image, mask = zoom(*flip(image, mask, rng), rng)
    image, mask = resize_image(image, canvas), resize_mask(mask, canvas)
    if source.config.w_aug:
        image = degrade(recolour_scene(image, rng), rng)
    return image, mask


# --- Prompts ----------------------------------------------------------------------------------

BOX_JITTER = 0.05  # of the box's side
PROMPT_TOKENS = {"none": 0, "point": 4, "box": 2, "mixed": 4}
# Labels as `model.decode` takes them.
ABSENT, NOT_A_POINT, FOREGROUND_POINT, BOX_CORNERS = -2, -1, 1, (2, 3)


def draw_prompt(kind: str, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a prompt for a mask: 1 to 3 points on the cables, their box (jittered), or none.

    Args:
        kind: one of PROMPTS; "mixed" is one of the other three.
        mask: soft mask (h, w) in the model's input frame. An empty one gets no prompt.

    Returns:
        Points float32 (N, 2) as (x, y) and their labels int64 (N,), N = PROMPT_TOKENS[kind].
    """
    points = np.zeros((PROMPT_TOKENS[kind], 2), np.float32)
    labels = np.full(PROMPT_TOKENS[kind], ABSENT, np.int64)
    if kind == "mixed":
        kind = ("none", "point", "box")[rng.integers(3)]
    if kind == "none" or not (mask > 0).any():
        return points, labels
    # A very thin cable may cover no pixel of the frame by half: take its best covered ones.
    rows, columns = np.nonzero(mask >= min(0.5, mask.max()))
    if kind == "point":
        count = int(rng.integers(1, 4))
        chosen = rng.integers(len(rows), size=count)
        points[:count] = np.column_stack([columns, rows])[chosen]
        labels[:count] = FOREGROUND_POINT
        labels[count] = NOT_A_POINT
    else:
        low = np.array([columns.min(), rows.min()], np.float32)
        high = np.array([columns.max(), rows.max()], np.float32)
        jitter = rng.uniform(-BOX_JITTER, BOX_JITTER, (2, 2)) * (high - low + 1)
        frame = np.array(mask.shape[::-1]) - 1
        points[:2] = np.clip(np.stack([low, high]) + jitter, 0, frame)
        labels[:2] = BOX_CORNERS
    return points, labels


# --- Datasets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """What a model takes: `img_size` is the side of its square input, `grid` of its logits."""

    img_size: int
    grid: int


def make_rng(seed: int, *key: int) -> np.random.Generator:
    """An independent generator for each (seed, key)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# First part of every generator's key: what the generator is for.
PLAN, TRAIN, TEST = range(3)


def epoch_plan(sources: list[Source], seed: int, epoch: int) -> np.ndarray:
    """Which pairs one epoch uses, shuffled: int (n, 2) rows of (source, pair).

    Of each dataset `round(percentage * n_pairs)` samples (at least 1): whole passes, plus a subset
    drawn anew each epoch in which no pair occurs twice.
    """
    rng = make_rng(seed, PLAN, epoch)
    rows = []
    for number, source in enumerate(sources):
        n_pairs = len(source.pairs)
        passes, rest = divmod(max(1, round(source.config.percentage * n_pairs)), n_pairs)
        drawn = np.concatenate([np.tile(np.arange(n_pairs), passes), rng.permutation(n_pairs)[:rest]])
        rows.append(np.column_stack([np.full(len(drawn), number), drawn]))
    return rng.permutation(np.concatenate(rows))


def make_sample(
    source: Source, pair_index: int, canvas: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A composite or a photo as the dataset's config says: image uint8 and soft mask."""
    make = composite if source.config.composites else photo
    return make(source, pair_index, canvas, rng)


def model_input(
    image: np.ndarray, mask: np.ndarray, frame: Frame, prompt: str, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Bring an image and its soft mask to the model's frame and draw a prompt.

    Returns:
        image: uint8 (3, S, S), longest side S = img_size, padded at the bottom and right.
        size: int64 (2,), the (h, w) of the picture in it.
        target: float32 (1, grid, grid), the soft mask averaged over the cells of the logits' grid.
        points, labels: see `draw_prompt`.
    """
    size = fit_size(mask.shape, frame.img_size)
    image, mask = resize_image(image, size), resize_mask(mask, size)
    points, labels = draw_prompt(prompt, mask, rng)
    target = resize_mask(pad_to_square(mask, frame.img_size), (frame.grid, frame.grid))
    square = pad_to_square(image, frame.img_size)
    return {
        "image": torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1))),
        "size": torch.tensor(size),
        "target": torch.from_numpy(target)[None],
        "points": torch.from_numpy(points),
        "labels": torch.from_numpy(labels),
    }


class TrainSet(Dataset):
    """Training samples, each a function of (seed, epoch, index) alone; keys are (epoch, index)."""

    def __init__(self, sources: list[Source], *, frame: Frame, prompt: str, seed: int) -> None:
        self.sources, self.frame, self.prompt, self.seed = sources, frame, prompt, seed
        self.epoch_length = len(epoch_plan(sources, seed, 0))
        self._plan = (-1, np.empty((0, 2), int))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        if self._plan[0] != epoch:
            self._plan = (epoch, epoch_plan(self.sources, self.seed, epoch))
        number, pair_index = self._plan[1][index]
        source = self.sources[number]
        rng = make_rng(self.seed, TRAIN, epoch, index)
        canvas = fit_size(image_size(source.pairs[pair_index].image_path), self.frame.img_size)
        image, mask = make_sample(source, pair_index, canvas, rng)
        return model_input(image, mask, self.frame, self.prompt, rng)


class TestSet(Dataset):
    """Test samples, each a function of (seed, index) alone, with the truth at full resolution.

    With `percentage` below 1 a fixed subset; above 1 counts as 1.
    """

    __test__ = False  # not a pytest class

    def __init__(self, source: Source, *, frame: Frame, prompt: str, seed: int) -> None:
        self.source, self.frame, self.prompt, self.seed = source, frame, prompt, seed
        n_pairs = len(source.pairs)
        count = min(n_pairs, max(1, round(source.config.percentage * n_pairs)))
        self.pair_indices = np.sort(make_rng(seed, TEST).permutation(n_pairs)[:count])

    def __len__(self) -> int:
        return len(self.pair_indices)

    def __getitem__(self, index: int) -> dict:
        pair_index = self.pair_indices[index]
        rng = make_rng(self.seed, TEST, index)
        size = image_size(self.source.pairs[pair_index].image_path)
        image, mask = make_sample(self.source, pair_index, size, rng)
        sample = model_input(image, mask, self.frame, self.prompt, rng)
        return {**sample, "picture": torch.tensor(image), "truth": torch.from_numpy(mask > 0.5)}


def image_size(path: Path) -> tuple[int, int]:
    """The (h, w) of an upright image file, from its header alone."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 are quarter turns
    return (width, height) if turned else (height, width)


class RunSampler(Sampler):
    """The batches of a whole run, epoch after epoch, as lists of (epoch, index).

    `start` is the number of batches to leave out, for they are done.
    """

    def __init__(self, epoch_length: int, batch_size: int, epochs: int, start: int = 0) -> None:
        self.epoch_length, self.batch_size = epoch_length, batch_size
        self.per_epoch = -(-epoch_length // batch_size)
        self.batches = range(start, epochs * self.per_epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            epoch, number = divmod(batch, self.per_epoch)
            first = number * self.batch_size
            last = min(first + self.batch_size, self.epoch_length)
            yield [(epoch, index) for index in range(first, last)]

    def __len__(self) -> int:
        return len(self.batches)


def train_loader(
    train_set: TrainSet, *, batch_size: int, epochs: int, start: int, num_workers: int, pin_memory: bool
) -> DataLoader:
    """One loader for the rest of a run, from batch `start`: workers start once and prefetch on."""
    return DataLoader(
        train_set,
        batch_sampler=RunSampler(train_set.epoch_length, batch_size, epochs, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
    )


def test_loader(test_set: TestSet, *, num_workers: int) -> DataLoader:
    """The test samples one by one, for their sizes differ."""
    return DataLoader(test_set, batch_size=None, num_workers=num_workers, worker_init_fn=_init_worker)


def _init_worker(worker_id: int) -> None:
    cv2.setNumThreads(0)  # one process per core is parallel enough
