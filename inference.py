"""Find the cables in pictures with a loaded SAM: whole or in tiles, with prompts or without."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import Sam

import checkpoint
import inference
import runtime
from base.errors import UserError
from imaging.geometry import InputSpec, to_model_input
from imaging.prompts import NO_PROMPT, Prompt
from sam import decoder, encoder, point_labels
from sam.variants import VARIANTS, detect_model_type, load_state_dict

OVERLAP = 0.25  # of a tile's tile_size, to its neighbors


# From pictures, RGB uint8 (H, W, 3), and the prompts of each, at least one, to logits float32 (H, W).
PredictLogits = Callable[[list[np.ndarray], list[Sequence[Prompt]]], Iterator[np.ndarray]]


def load_any(path: Path) -> tuple[Sam, str]:
    """The SAM that a checkpoint is of, and the name of its variant, recognised by its weights.

    Raises UserError naming the file if it is not of any variant.
    """
    weights = checkpoint.load_weights(path)
    model_type = detect_model_type(weights)
    if model_type is None:
        raise UserError(f"{path} holds weights of none of {', '.join(VARIANTS)}")
    sam = VARIANTS[model_type].build()
    load_state_dict(sam, weights, model_type, path)
    return sam, model_type


def load(path: Path, device: torch.device, amp: torch.dtype | None) -> PredictLogits:
    """`predict_logits` with the SAM that the checkpoint is of; raises as `inference.load_any` does."""
    sam, model_type = inference.load_any(path)
    encoder.move_to_device(sam, device, amp)
    return partial(predict_logits, sam, model_type, amp)


@torch.inference_mode()
def predict_logits(
    sam: Sam,
    model_type: str,
    amp: torch.dtype | None,
    images_u8: list[np.ndarray],
    prompts: list[Sequence[Prompt]],
) -> Iterator[np.ndarray]:
    """Logits, float32 (H, W) at each picture's own resolution; above 0 is cable.

    A picture is encoded once and decoded with each of its prompts; of their logits the largest count.
    """
    if not images_u8:
        return
    spec = InputSpec(sam.image_encoder.img_size, decoder.mask_grid(sam))
    samples = [to_model_input(image, np.zeros(image.shape[:2], np.float32), spec) for image in images_u8]
    sizes = torch.stack([sample["size"] for sample in samples])
    images = torch.stack([sample["image"] for sample in samples]).to(sam.device)
    scales = [
        size.flip(0) / torch.tensor(image.shape[1::-1]) for size, image in zip(sizes, images_u8, strict=True)
    ]
    counts = [len(of_picture) for of_picture in prompts]
    points, labels = _batch(
        [(prompt, scale) for of_picture, scale in zip(prompts, scales, strict=True) for prompt in of_picture]
    )
    with runtime.autocast(sam.device, amp):
        embeddings = encoder.encode(sam, images, sizes.to(sam.device), model_type)
        embeddings = embeddings.repeat_interleave(torch.tensor(counts, device=sam.device), dim=0)
        logits, _ = decoder.decode(sam, embeddings, points.to(sam.device), labels.to(sam.device))
    for image, size, low_res in zip(images_u8, sizes.tolist(), logits.float().split(counts), strict=True):
        largest = low_res.amax(dim=0, keepdim=True)
        yield decoder.upscale(sam, largest, tuple(size), image.shape[:2])[0, 0].cpu().numpy()


def _batch(prompts: list[tuple[Prompt, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (P, N, 2) and labels (P, N) of prompts and their scales (2,) to the model's input frame."""
    longest = max(len(prompt.labels) for prompt, _ in prompts)
    points = torch.zeros(len(prompts), longest, 2)
    labels = torch.full((len(prompts), longest), point_labels.ABSENT)
    for i, (prompt, scale) in enumerate(prompts):
        points[i, : len(prompt.labels)] = torch.from_numpy(prompt.points) * scale
        labels[i, : len(prompt.labels)] = torch.from_numpy(prompt.labels)
    return points, labels


def predict_logits_tiled(
    predict: PredictLogits, image: np.ndarray, *, tile_size: int, batch_size: int
) -> np.ndarray:
    """Logits (H, W) of a picture cut into tiles of at most `tile_size` pixels, which overlap and are blended.

    A tile's weight falls to its edges, where it has seen the least around, so that none of them shows.
    """
    height, width = image.shape[:2]
    corners = [(top, left) for top in _starts(height, tile_size) for left in _starts(width, tile_size)]
    total, weights = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    for first in range(0, len(corners), batch_size):
        part = corners[first : first + batch_size]
        windows = [(slice(top, top + tile_size), slice(left, left + tile_size)) for top, left in part]
        found = predict([image[window] for window in windows], [NO_PROMPT] * len(part))
        for window, logits in zip(windows, found, strict=True):
            weight = np.multiply.outer(*(_ramp(length, tile_size) for length in logits.shape))
            total[window] += weight * logits
            weights[window] += weight
    return total / weights


def _starts(length: int, tile_size: int) -> list[int]:
    """Where tiles start along an edge: evenly, the first and the last at its ends."""
    if length <= tile_size:
        return [0]
    count = math.ceil((length - OVERLAP * tile_size) / (tile_size * (1 - OVERLAP)))
    return np.linspace(0, length - tile_size, count).round().astype(int).tolist()


def _ramp(length: int, tile_size: int) -> np.ndarray:
    """Weights (length,) that rise to 1 over the overlap from both ends."""
    steps = np.arange(length, dtype=np.float32) + 1
    return np.minimum(1, np.minimum(steps, steps[::-1]) / max(1, OVERLAP * tile_size))
