"""Prediction: from images to masks with a loaded SAM, whole or in tiles, with prompts or without.

    from inference import load

    segment = load("exp/NAME/checkpoints/best.pth")
    mask = segment(image)  # bool (H, W), of an image that is RGB uint8 (H, W, 3)

The test during training, predict.py and Python callers all compute their logits here.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

import checkpoint
import runtime
from base.errors import UserError
from base.flag_types import MIN_TILE
from imaging.geometry import InputSpec, fit_size, resize_mask, to_model_input
from imaging.prompts import NO_PROMPT, Prompt
from sam.decoder import decode, mask_grid, upscale
from sam.encoder import encode, move_to_device
from sam.point_labels import ABSENT, BOX_CORNER_1, BOX_CORNER_2
from sam.variants import VARIANTS, detect_model_type, load_state_dict
from sidecar import Sidecar, median_cable_width, read_sidecar, sidecar_path
from train_config import PRECISIONS

TILE_OVERLAP = 0.25  # of a tile's side, with each neighbor

Decode = Callable[[Sam, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# From images, RGB uint8 (H, W, 3), and the prompts of each (at least one) to logits, float32 (H, W).
PredictLogits = Callable[[list[np.ndarray], list[Sequence[Prompt]]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class LoadedSam:
    """A SAM on its device, and how it computes.

    low_precision: dtype for autocast in the decoder; None means float32. The weights of a frozen encoder are
        stored in its compute dtype.
    encoder_trains: whether the encoder has float32 weights and computes under autocast.
    compiled_decode, compiled_batch_size: the decoder compiled for whole batches of that size, or None.
    """

    sam: Sam = field(repr=False)
    model_type: str
    low_precision: torch.dtype | None
    encoder_trains: bool = False
    compiled_decode: Decode | None = None
    compiled_batch_size: int | None = None

    @property
    def device(self) -> torch.device:
        return self.sam.device

    @property
    def spec(self) -> InputSpec:
        return InputSpec(self.sam.image_encoder.img_size, mask_grid(self.sam))

    def encode(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Embeddings (B, C, e, e) of images uint8 (B, S, S, 3) of sizes (B, 2); see `sam.encoder.encode`."""
        with runtime.autocast(self.device, self.low_precision if self.encoder_trains else None):
            return encode(
                self.sam,
                images.to(self.device),
                sizes.to(self.device),
                self.model_type,
                eager=self._is_partial(images) and self.device.type != "cpu",  # encodes images one by one
            )

    def decode(self, embeddings: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Low-resolution logits and predicted IoU, on the device; see `sam.decoder.decode`."""
        run = decode if self._is_partial(embeddings) else self.compiled_decode or decode
        with runtime.autocast(self.device, self.low_precision):
            return run(self.sam, embeddings, points.to(self.device), labels.to(self.device))

    def _is_partial(self, batch: Tensor) -> bool:
        """Whether nothing is compiled for a batch of this size, which would take longer than it saves."""
        return len(batch) != self.compiled_batch_size


def load_any(path: Path) -> tuple[Sam, str]:
    """The SAM of a checkpoint, on the CPU, and its model type, detected from the weights.

    Raises UserError, which names the file, if it cannot be read, fits no model type, or holds weights that
    are NaN or infinite.
    """
    weights = checkpoint.load_weights(path)
    checkpoint.require_finite(weights, path, "give another checkpoint")
    model_type = detect_model_type(weights)
    if model_type is None:
        raise UserError(f"{path} holds weights of none of {', '.join(VARIANTS)}")
    sam = VARIANTS[model_type].build()
    load_state_dict(sam, weights, model_type, path)
    return sam, model_type


@torch.inference_mode()
def predict_logits(
    net: LoadedSam,
    images: list[np.ndarray],
    prompts: list[Sequence[Prompt]],
    *,
    prompt_batch_size: int | None = None,
) -> Iterator[np.ndarray]:
    """Logits, float32 (H, W), of each image at its own resolution; above 0 is cable.

    Args:
        images: RGB uint8 (H, W, 3), of any sizes.
        prompts: at least one for each image. An image is encoded once and decoded with each of its prompts;
            the result is the pixel-wise maximum.
        prompt_batch_size: how many prompts are decoded together; None decodes all.
    """
    if not images:
        return
    inputs = [to_model_input(image, np.zeros(image.shape[:2], np.float32), net.spec) for image in images]
    sizes = torch.stack([sample["size"] for sample in inputs])
    scales = [
        size.flip(0) / torch.tensor(image.shape[1::-1]) for size, image in zip(sizes, images, strict=True)
    ]
    points, labels = _batch_prompts(
        [(prompt, scale) for several, scale in zip(prompts, scales, strict=True) for prompt in several]
    )
    yield from decode_logits(
        net,
        net.encode(torch.stack([sample["image"] for sample in inputs]), sizes),
        points,
        labels,
        sizes=[tuple(size) for size in sizes.tolist()],
        original_sizes=[image.shape[:2] for image in images],
        prompts_per_image=[len(several) for several in prompts],
        prompt_batch_size=prompt_batch_size,
    )


@torch.no_grad()
def decode_logits(
    net: LoadedSam,
    embeddings: Tensor,
    points: Tensor,
    labels: Tensor,
    *,
    sizes: list[tuple[int, int]],
    original_sizes: list[tuple[int, int]],
    prompts_per_image: list[int],
    prompt_batch_size: int | None = None,
) -> Iterator[np.ndarray]:
    """The second half of `predict_logits`, from embeddings.

    Args:
        embeddings: (B, C, e, e).
        points, labels: (P, N, 2) and (P, N), the prompts of all images; see `sam.decoder.decode`.
        sizes: (h, w) of each image in the model's input.
        original_sizes: (h, w) of each image.
        prompts_per_image: how many of the P prompts belong to each image.
        prompt_batch_size: how many prompts are decoded together; None decodes all.
    """
    embeddings = embeddings.to(net.device)
    image_of = torch.arange(len(embeddings)).repeat_interleave(torch.tensor(prompts_per_image))
    decoded = []
    for chunk in torch.arange(len(points)).split(prompt_batch_size or len(points)):
        repeated = embeddings[image_of[chunk].to(net.device)]
        decoded.append(net.decode(repeated, points[chunk], labels[chunk])[0])
    shares = torch.cat(decoded).float().split(prompts_per_image)
    for share, size, original_size in zip(shares, sizes, original_sizes, strict=True):
        largest = share.amax(dim=0, keepdim=True)
        yield upscale(net.sam, largest, size, original_size)[0, 0].cpu().numpy()


def _batch_prompts(prompts: list[tuple[Prompt, Tensor]]) -> tuple[Tensor, Tensor]:
    """Points (P, N, 2) and labels (P, N) of prompts, scaled by (2,) to the model's input."""
    longest = max(len(prompt.labels) for prompt, _ in prompts)
    points = torch.zeros(len(prompts), longest, 2)
    labels = torch.full((len(prompts), longest), ABSENT)
    for i, (prompt, scale) in enumerate(prompts):
        points[i, : len(prompt.labels)] = torch.from_numpy(prompt.points) * scale
        labels[i, : len(prompt.labels)] = torch.from_numpy(prompt.labels)
    return points, labels


# --- Segmenter --------------------------------------------------------------------------------

Tiles = int | Literal["auto"] | None
MAX_ENLARGEMENT = 2
MAX_TILES = 64  # of an image that "auto" cuts
MAX_TILE_SHARE = 0.8  # of the longest side of the image; larger tiles would show little more than the whole
MEASURED_SIDE = 1024  # longest side of the prediction in which the width of cables is measured
# "auto" blends the logits of the tiles with those of the whole image, which shows more of the scene. This is
# the largest weight of the whole image. It falls with the size of the tiles, because cables then have too few
# pixels in the whole image.
MAX_WEIGHT_OF_WHOLE = 0.5


@dataclass(frozen=True)
class Segmenter:
    """A loaded checkpoint that segments images; see `load`.

    threshold: a pixel is cable if its logit is above it.
    tiles: side in pixels of the tiles that images are cut into; None predicts whole images; "auto" predicts
        both, in tiles of the side that `tile_size` gives for each image. With prompts, "auto" is None.
    cable_width: median width of the cables in training, in pixels of the model's input; "auto" needs it.
    batch_size: how many images, tiles or prompts are computed together.
    sidecar: what is known of the checkpoint, if it has a sidecar.
    path: the checkpoint, for messages.
    """

    net: LoadedSam
    threshold: float = 0.0
    tiles: Tiles = None
    cable_width: float | None = None
    batch_size: int = 4
    sidecar: Sidecar | None = field(default=None, repr=False)
    path: Path | None = field(default=None, repr=False)

    @overload
    def __call__(
        self, images: np.ndarray, prompts: Sequence[Prompt] | None = None, *, return_probs: bool = False
    ) -> np.ndarray: ...

    @overload
    def __call__(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[Prompt]] | None = None,
        *,
        return_probs: bool = False,
    ) -> list[np.ndarray]: ...

    def __call__(self, images, prompts=None, *, return_probs=False):  # type: ignore[no-untyped-def]
        """The mask of an image, bool (H, W); of a list of images, the list of their masks.

        Args:
            images: RGB uint8 (H, W, 3), or a list of such, of any sizes.
            prompts: those of the image (see `box_prompt`), or a list with those of each image. The mask of
                an image is the union of the masks of its prompts. By default there are none.
            return_probs: return probabilities instead, float32 (H, W) in 0..1.

        Raises:
            UserError: an image is no such array, an image has no list of prompts, or there are prompts and
                tiles of a given side.
        """
        if images is None:
            raise UserError("no image: None; does the file exist that it was read from?")
        if isinstance(images, np.ndarray):
            prompts = None if prompts is None else [prompts]
            return self([images], prompts, return_probs=return_probs)[0]
        if not isinstance(images, Sequence):  # an image of Pillow or PyTorch, for example
            _check_image(images, 0)
        logits = self.logits(images, prompts)
        return [sigmoid(x) if return_probs else x > self.threshold for x in logits]

    def logits(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[Prompt]] | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the logits, float32 (H, W), of each image. Arguments and errors are those of a call."""
        return (logits for logits, _ in self.logits_and_tiles(images, prompts))

    def logits_and_tiles(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[Prompt]] | None = None
    ) -> Iterator[tuple[np.ndarray, int | None]]:
        """Yield the logits of each image, and the side of its tiles in pixels or None, without tiles."""
        if isinstance(self.tiles, int) and prompts is not None:
            raise UserError(
                f"tiles={self.tiles} cannot be combined with prompts: prompts are for whole images"
            )
        if prompts is None:
            self.warn_of_missing_prompts()
        given = [NO_PROMPT] * len(images) if prompts is None else prompts
        if len(given) != len(images):
            raise UserError(
                f"{len(images)} images but {len(given)} lists of prompts; expected one list for each"
            )
        for number, (image, several) in enumerate(zip(images, given, strict=True)):
            _check_image(image, number)
            is_list = isinstance(several, Sequence) and all(isinstance(one, Prompt) for one in several)
            if not is_list or not several:
                raise UserError(
                    f"image {number}: expected a list of at least one prompt, got {several!r}; "
                    "box_prompt(x1, y1, x2, y2) makes one of a box"
                )
        predict = partial(predict_logits, self.net, prompt_batch_size=self.batch_size)
        in_tiles = partial(predict_logits_tiled, predict, batch_size=self.batch_size)
        for first in range(0, len(images), self.batch_size):
            batch = list(images[first : first + self.batch_size])
            if isinstance(self.tiles, int):
                for image in batch:
                    yield in_tiles(image, tile_size=self.tiles), self.tiles
                continue
            wholes = predict(batch, list(given[first : first + self.batch_size]))
            for image, whole in zip(batch, wholes, strict=True):
                side = self.tile_size(whole) if self.tiles and prompts is None else None
                if side is None:
                    yield whole, None
                    continue
                weight = min(MAX_WEIGHT_OF_WHOLE, side / max(whole.shape))
                yield weight * whole + (1 - weight) * in_tiles(image, tile_size=side), side

    def warn_of_missing_prompts(self) -> None:
        """Warn, once in a process, if the checkpoint was trained with points or boxes."""
        if self.sidecar and self.sidecar.prompt in ("point", "box"):
            _warn_of_missing_prompts(self.path, self.sidecar.prompt)

    def tile_size(self, whole: np.ndarray) -> int | None:
        """Side in pixels of the tiles that "auto" cuts an image into; None: the image stays whole.

        In tiles of this side, cables are as wide for the model as in training, or thinner: a tile is enlarged
        at most by MAX_ENLARGEMENT, and an image has at most MAX_TILES.

        Args:
            whole: float32 (H, W), the logits of the whole image. If they show no cable, it stays whole.
        """
        side = self.fitting_side(whole)
        if side is None:
            return None
        side = max(side, self.net.spec.img_size // MAX_ENLARGEMENT)
        while math.prod(len(_tile_starts(length, side)) for length in whole.shape) > MAX_TILES:
            side = math.ceil(1.05 * side)
        return side if side < MAX_TILE_SHARE * max(whole.shape) else None

    def fitting_side(self, whole: np.ndarray) -> int | None:
        """Side in pixels of a square in which cables are as wide for the model as in training.

        Args:
            whole: float32 (H, W), the logits of the whole image. If they show no cable, the result is None.
        """
        assert self.cable_width  # for "auto", `load` requires it
        longest = max(whole.shape)
        measured_longest = min(longest, MEASURED_SIDE)
        size = fit_size((whole.shape[0], whole.shape[1]), measured_longest)
        width = median_cable_width([resize_mask(whole, size) > self.threshold])
        if width is None:
            return None
        return round(width * longest / measured_longest * self.net.spec.img_size / self.cable_width)


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    threshold: float | None = None,
    *,
    tiles: Tiles | Literal["off"] = None,
    cable_width: float | None = None,
    batch_size: int = 4,
    amp: str = "auto",
) -> Segmenter:
    """Load a checkpoint of any model type.

    From then on, this process keeps freed memory (see `runtime.keep_freed_memory`). On a GPU, a blank image
    is predicted once, so that the first real one is not slower than the next.

    Args:
        device: a device of PyTorch, such as "cuda:1"; "auto" takes the first available of cuda, mps, cpu.
        threshold: see `Segmenter`; None takes that of the checkpoint's sidecar, or 0 without a sidecar.
        tiles: see `Segmenter`; "off" predicts whole images. None is "auto" if the width of the cables in
            training is known, else "off".
        cable_width: see `Segmenter`; None takes that of the sidecar.
        batch_size: see `Segmenter`.
        amp: precision: "auto" (what the hardware computes fast), "bf16", "fp16", or "off" for float32.

    Raises:
        UserError: the file cannot be read or fits no model type, an argument has a wrong value, or `tiles` is
            "auto" and the width of the cables is not known.
    """
    _check_arguments(device, threshold, cable_width, batch_size, amp)
    runtime.keep_freed_memory()
    path = Path(path)
    device = runtime.pick_device(device) if isinstance(device, str) else device
    low_precision = runtime.amp_dtype(amp, device)
    sam, model_type = load_any(path)
    sidecar = read_sidecar(path, model_type)
    move_to_device(sam, device, low_precision)
    if threshold is None:
        threshold = sidecar.threshold if sidecar else 0.0
    if cable_width is None and sidecar:
        cable_width = sidecar.cable_width
    tiles = _tiles(tiles, cable_width, path)
    net = LoadedSam(sam, model_type, low_precision)
    if device.type != "cpu":
        list(predict_logits(net, [np.zeros((*[net.spec.img_size] * 2, 3), np.uint8)], [NO_PROMPT]))
    return Segmenter(net, threshold, tiles, cable_width, batch_size, sidecar, path)


def _check_arguments(
    device: object, threshold: object, cable_width: object, batch_size: object, amp: object
) -> None:
    """Raise UserError for an argument of `load` with a wrong value."""
    is_width = isinstance(cable_width, Real) and 0 < float(cable_width) < math.inf
    is_threshold = isinstance(threshold, Real) and math.isfinite(threshold)
    is_size = isinstance(batch_size, Integral) and int(batch_size) >= 1
    is_device = isinstance(device, str | torch.device)
    for name, value, is_valid, expected in (
        ("device", device, is_device, "'auto' or a device of PyTorch, such as 'cuda:1'"),
        ("threshold", threshold, is_threshold or threshold is None, "a finite number"),
        ("cable_width", cable_width, is_width or cable_width is None, "a number above 0"),
        ("batch_size", batch_size, is_size, "a whole number of at least 1"),
        ("amp", amp, amp in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    ):
        if not is_valid:
            raise UserError(f"{name}={value!r}: expected {expected}")


def _tiles(chosen: Tiles | Literal["off"], cable_width: float | None, path: Path) -> Tiles:
    """The tiles of a `Segmenter` for the argument of `load`; raises UserError."""
    if chosen is None or chosen == "off":
        return "auto" if chosen is None and cable_width else None
    if chosen == "auto":
        if not cable_width:
            raise UserError(
                f"--tiles auto needs the width of the cables in training, and {sidecar_path(path)} does not "
                "say it: give --cable_width PIXELS, in pixels of the model's input"
            )
        return "auto"
    if not isinstance(chosen, Integral) or chosen < MIN_TILE:
        raise UserError(f"tiles={chosen!r}: expected a whole number of at least {MIN_TILE}, 'auto' or 'off'")
    return int(chosen)


@cache  # Python's own filter of repeated warnings is reset by other libraries
def _warn_of_missing_prompts(path: Path | None, prompt: str) -> None:
    warnings.warn(
        f"{path or 'this checkpoint'} was trained with --prompt {prompt}, and there are no prompts: "
        "its masks may be bad; for images, give prompts (predict.py: --prompt FILE)",
        stacklevel=3,
    )


def box_prompt(x1: float, y1: float, x2: float, y2: float) -> Prompt:
    """The prompt that is a box, from two opposite corners in pixels of the image."""
    corners = np.array([[x1, y1], [x2, y2]], np.float32)
    corners.sort(axis=0)  # SAM expects the top left corner first
    return Prompt(corners, np.array([BOX_CORNER_1, BOX_CORNER_2]))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities in 0..1 of logits, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _check_image(image: object, number: int) -> None:
    """Raise UserError unless it is RGB uint8 (H, W, 3) with at least one pixel."""
    if not isinstance(image, np.ndarray):
        found = type(image).__name__
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        found = f"{image.dtype} {image.shape}"
    else:
        return
    raise UserError(f"image {number}: expected a NumPy array, RGB uint8 (H, W, 3), got {found}")


# --- Tiles ------------------------------------------------------------------------------------


def predict_logits_tiled(
    predict: PredictLogits, image: np.ndarray, *, tile_size: int, batch_size: int
) -> np.ndarray:
    """Logits (H, W) of an image that is cut into overlapping tiles of at most `tile_size` pixels a side.

    Logits are blended where tiles overlap. The weight of a tile falls toward its edges, where it has the
    least context, so that no seam shows.
    """
    height, width = image.shape[:2]
    corners = [
        (top, left) for top in _tile_starts(height, tile_size) for left in _tile_starts(width, tile_size)
    ]
    total, weights = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    for first in range(0, len(corners), batch_size):
        batch = corners[first : first + batch_size]
        windows = [(slice(top, top + tile_size), slice(left, left + tile_size)) for top, left in batch]
        predictions = predict([image[window] for window in windows], [NO_PROMPT] * len(batch))
        for window, logits in zip(windows, predictions, strict=True):
            weight = np.multiply.outer(*(_blend_weights(length, tile_size) for length in logits.shape))
            total[window] += weight * logits
            weights[window] += weight
    return total / weights


def _tile_starts(length: int, tile_size: int) -> list[int]:
    """Where tiles start along an edge: evenly spaced, the first and the last at the ends."""
    if length <= tile_size:
        return [0]
    count = math.ceil((length - TILE_OVERLAP * tile_size) / (tile_size * (1 - TILE_OVERLAP)))
    return np.linspace(0, length - tile_size, count).round().astype(int).tolist()


def _blend_weights(length: int, tile_size: int) -> np.ndarray:
    """Weights (length,) that rise to 1 over the overlap from both ends."""
    steps = np.arange(length, dtype=np.float32) + 1
    return np.minimum(1, np.minimum(steps, steps[::-1]) / max(1, TILE_OVERLAP * tile_size))
