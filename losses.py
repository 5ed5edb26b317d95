"""Losses on mask logits, per sample, over the pixels that belong to the picture.

Every function takes `logits`, `target` and `valid` of shape (B, 1, h, w): float logits, the soft
target in 0..1, and bool or 0/1 marks of pixels inside the picture (outside is padding). Every one
returns a float tensor of shape (B,). Callers average over samples, so that a gradient accumulated
over several batches equals that of one batch of all their samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, target: Tensor, valid: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Mean focal loss over each sample's valid pixels (Lin et al., ICCV 2017, eq. 5).

    `-alpha_t (1 - p_t)^gamma log p_t` with weight `alpha` for foreground and `1 - alpha` for
    background. A soft target is read as the probability of foreground: the loss is its expectation.
    """
    probs = torch.sigmoid(logits)
    foreground = -alpha * (1 - probs) ** gamma * F.logsigmoid(logits)
    background = -(1 - alpha) * probs**gamma * F.logsigmoid(-logits)
    per_pixel = target * foreground + (1 - target) * background
    return _sum_pixels(per_pixel * valid) / _sum_pixels(valid.to(logits.dtype))


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice loss `1 - (2 sum(p t) + 1) / (sum p + sum t + 1)` (Milletari et al., 3DV 2016)."""
    probs = torch.sigmoid(logits) * valid
    target = target * valid
    overlap = _sum_pixels(probs * target)
    return 1 - (2 * overlap + 1) / (_sum_pixels(probs) + _sum_pixels(target) + 1)


SKELETON_STEPS = 10  # erosions, of a pixel on either side: cables are at most 20 wide on the loss's grid


def cldice_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Soft clDice loss: 1 - the harmonic mean of topology precision and sensitivity.

    They are the share of the predicted center lines on the truth, and of the true ones on the prediction
    (Shit et al., clDice, CVPR 2021, eq. 1 to 3, with 1 added to numerators and denominators).
    """
    probs, target = torch.sigmoid(logits) * valid, target * valid
    lines, true_lines = soft_skeleton(probs), soft_skeleton(target)
    precision = (_sum_pixels(lines * target) + 1) / (_sum_pixels(lines) + 1)
    sensitivity = (_sum_pixels(true_lines * probs) + 1) / (_sum_pixels(true_lines) + 1)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def soft_skeleton(probs: Tensor) -> Tensor:
    """Centre lines, (B, 1, h, w) in 0..1, of what is likely foreground (clDice, algorithm 1).

    Shrinks it a pixel at a time and keeps what an opening would remove: where it is but a line. What is
    outside the grid is background, as padding is.
    """
    skeleton = torch.zeros_like(probs)
    for _ in range(SKELETON_STEPS):
        smaller = _erode(probs)
        line = torch.relu(probs - _dilate(smaller))
        skeleton = skeleton + torch.relu(line - skeleton * line)
        probs = smaller
    return skeleton


def _erode(x: Tensor) -> Tensor:
    """The least of each pixel and its four neighbors. (Faster on a CPU than pooling, as is the next.)"""
    around = F.pad(x, (1, 1, 1, 1))
    of_rows = torch.minimum(around[..., :-2, 1:-1], around[..., 2:, 1:-1])
    of_columns = torch.minimum(around[..., 1:-1, :-2], around[..., 1:-1, 2:])
    return torch.minimum(x, torch.minimum(of_rows, of_columns))


def _dilate(x: Tensor) -> Tensor:
    """The largest of each pixel and its eight neighbors."""
    x = F.pad(x, (1, 1, 1, 1))
    x = torch.maximum(torch.maximum(x[..., :-2, :], x[..., 2:, :]), x[..., 1:-1, :])
    return torch.maximum(torch.maximum(x[..., :-2], x[..., 2:]), x[..., 1:-1])


def iou_mse(iou_pred: Tensor, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared error of the IoU head, `iou_pred` (B, 1), against the IoU of the predicted mask.

    Prediction is logit > 0, truth is target > 0.5; both empty counts as IoU 1. Gradient flows to
    `iou_pred` alone.
    """
    valid = valid.bool()
    prediction = (logits > 0) & valid
    truth = (target > 0.5) & valid
    intersection = _sum_pixels((prediction & truth).float())
    union = _sum_pixels((prediction | truth).float())
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    return (iou_pred[:, 0].float() - iou.detach()) ** 2


def _sum_pixels(x: Tensor) -> Tensor:
    return x.sum(dim=(1, 2, 3))
