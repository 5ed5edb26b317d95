"""Sizes and frames: resizing and padding images and masks for a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:  # import_labels.py reads files without torch
    import torch


@dataclass(frozen=True)
class InputSpec:
    """The sizes that a model works with.

    img_size: side of its square input in pixels.
    mask_grid: side of the square grid of its targets in cells.
    """

    img_size: int
    mask_grid: int

    @property
    def finest_side(self) -> int:
        """The longest side at which a sample is made, before it is reduced to input and target."""
        return max(self.img_size, self.mask_grid)


class ModelInput(TypedDict):
    """An image and its target in a model's frame (S = img_size, M = mask_grid).

    image: uint8 (S, S, 3) RGB, longest side S, padded with zeros at the bottom and right.
    size: int64 (2,), the (h, w) of the image without padding.
    target: uint8 (1, M, M), 255 times the mask averaged over each cell of the grid.
    """

    image: "torch.Tensor"
    size: "torch.Tensor"
    target: "torch.Tensor"


def fit_size(size: tuple[int, int], longest: float) -> tuple[int, int]:
    """Scale `size` (h, w) to the longest side `longest`, rounded as in SAM's ResizeLongestSide."""
    scale = longest / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a uint8 image to (h, w) exactly as `SamPredictor` does (Pillow's antialiased bilinear filter).

    Returns the argument itself if it already has this size.
    """
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a uint8 image (H, W, C) to (h, w), faster than `resize_image`.

    Uses area averaging if a side shrinks, else bilinear interpolation.
    """
    shrinks = image.shape[0] > size[0] or image.shape[1] > size[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a soft mask float32 (H, W) to (h, w) by area averaging, which keeps the area of thin cables.

    Returns the argument itself if it already has this size.
    """
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA)


def touched_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
    """The rows and columns of a box that contains all pixels above 0 of a mask uint8 (H, W).

    The box has `margin` more pixels on each side, but ends where the mask ends. The box of an empty mask
    contains its first pixel.
    """
    left, top, width, height = cv2.boundingRect(mask)
    rows = slice(max(top - margin, 0), max(top + height, 1) + margin)
    return rows, slice(max(left - margin, 0), max(left + width, 1) + margin)


def to_u8(mask: np.ndarray) -> np.ndarray:
    """Convert a soft mask in 0..1 to uint8 in 0..255."""
    return np.rint(mask * 255).astype(np.uint8)


def pad_to_square(array: np.ndarray, side: int) -> np.ndarray:
    """Copy an array (h, w, ...) into (side, side, ...), padded with zeros at the bottom and right."""
    square = np.zeros((side, side, *array.shape[2:]), array.dtype)
    square[: array.shape[0], : array.shape[1]] = array
    return square


def to_model_input(image: np.ndarray, mask: np.ndarray, spec: InputSpec) -> ModelInput:
    """Bring an image uint8 (h, w, 3) and its soft mask float32 (h', w') to the model's frame.

    The two may differ in size but not in proportions. The result shares no memory with the arguments.
    """
    import torch

    mask_size = (mask.shape[0], mask.shape[1])
    size = fit_size(mask_size, spec.img_size)
    mask = resize_mask(mask, fit_size(mask_size, spec.finest_side))
    target = resize_mask(pad_to_square(mask, spec.finest_side), (spec.mask_grid, spec.mask_grid))
    return {
        "image": torch.from_numpy(pad_to_square(resize_image(image, size), spec.img_size)),
        "size": torch.tensor(size),
        "target": torch.from_numpy(to_u8(target))[None],
    }
