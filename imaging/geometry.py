"""Sizes and frames: how images and masks are resized and padded for a model."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class InputSpec:
    """What a model takes: `img_size` is the side of its square input, `mask_grid` that of the targets."""

    img_size: int
    mask_grid: int

    @property
    def finest_side(self) -> int:
        """The longest side of what samples are made of."""
        return max(self.img_size, self.mask_grid)


def fit_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` (h, w) scaled so that its longest side is `longest`, rounded as SAM does."""
    scale = longest / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (h, w) exactly as `SamPredictor` does (Pillow's antialiased bilinear filter)."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a uint8 picture of any channels to (h, w), fast: by area averaging if it shrinks."""
    shrinks = image.shape[0] > size[0] or image.shape[1] > size[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a soft mask to (h, w) by area averaging, which keeps a thin cable's total area."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA)


def to_u8(mask: np.ndarray) -> np.ndarray:
    """A soft mask in 0..1 as uint8 in 0..255."""
    return np.rint(mask * 255).astype(np.uint8)


def pad_to_square(array: np.ndarray, side: int) -> np.ndarray:
    """A copy padded with zeros at the bottom and right to (side, side, ...)."""
    square = np.zeros((side, side, *array.shape[2:]), array.dtype)
    square[: array.shape[0], : array.shape[1]] = array
    return square


def to_model_input(image: np.ndarray, mask: np.ndarray, spec: InputSpec) -> dict[str, torch.Tensor]:
    """Bring an image and its soft mask to the model's spec.

    Returns:
        image: uint8 (S, S, 3), longest side S = img_size, padded at the bottom and right.
        size: int64 (2,), the (h, w) of the picture in it.
        target: uint8 (1, mask_grid, mask_grid), 255 times the mask averaged over the cells of the mask_grid.
    """
    size = fit_size(mask.shape, spec.img_size)
    mask = resize_mask(mask, fit_size(mask.shape, spec.finest_side))
    target = resize_mask(pad_to_square(mask, spec.finest_side), (spec.mask_grid, spec.mask_grid))
    return {
        "image": torch.from_numpy(pad_to_square(resize_image(image, size), spec.img_size)),
        "size": torch.tensor(size),
        "target": torch.from_numpy(to_u8(target))[None],
    }
