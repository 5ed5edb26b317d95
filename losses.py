"""Losses on mask logits, per sample, over the pixels that belong to the image.

Every function takes `logits`, `target` and `valid` of shape (B, 1, h, w): float logits, the soft
target in 0..1, and bool or 0/1 marks of pixels inside the image (outside is padding). Every one
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
    away_from_1, away_from_0 = 1 - probs, probs
    if gamma < 1:  # the slope of x ** gamma is infinite at 0
        away_from_1, away_from_0 = away_from_1.clamp(min=1e-6), away_from_0.clamp(min=1e-6)
    foreground = -alpha * away_from_1**gamma * F.logsigmoid(logits)
    background = -(1 - alpha) * away_from_0**gamma * F.logsigmoid(-logits)
    per_pixel = target * foreground + (1 - target) * background
    return _sum_pixels(per_pixel * valid) / _sum_pixels(valid.to(logits.dtype))


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice loss `1 - (2 sum(p t) + 1) / (sum p + sum t + 1)` (Milletari et al., 3DV 2016)."""
    probs = torch.sigmoid(logits) * valid
    target = target * valid
    overlap = _sum_pixels(probs * target)
    return 1 - (2 * overlap + 1) / (_sum_pixels(probs) + _sum_pixels(target) + 1)


# Each erosion removes one pixel on either side: enough for cables up to 20 cells wide on the loss grid.
SKELETON_STEPS = 10


def cldice_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Soft clDice loss: 1 - the harmonic mean of topology precision and sensitivity.

    Precision is the share of the predicted centerlines inside the ground truth, and sensitivity the share of
    the true centerlines inside the prediction (Shit et al., clDice, CVPR 2021, eq. 1 to 3, with 1 added to
    numerators and denominators).
    """
    probs, target = torch.sigmoid(logits) * valid, target * valid
    lines, true_lines = soft_skeleton(probs), soft_skeleton(target)
    precision = (_sum_pixels(lines * target) + 1) / (_sum_pixels(lines) + 1)
    sensitivity = (_sum_pixels(true_lines * probs) + 1) / (_sum_pixels(true_lines) + 1)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def soft_skeleton(probs: Tensor) -> Tensor:
    """Soft centerlines (B, 1, h, w) in 0..1 of a soft mask (clDice, algorithm 1).

    Erodes the mask pixel by pixel and collects what an opening would remove: the parts that are one pixel
    wide. Pixels outside the grid are background, as padding is.
    """
    skeleton = torch.zeros_like(probs)
    for _ in range(SKELETON_STEPS):
        smaller = _erode(probs)
        line = torch.relu(probs - _dilate(smaller))
        skeleton = skeleton + torch.relu(line - skeleton * line)
        probs = smaller
    return skeleton


def _erode(x: Tensor) -> Tensor:
    """Minimum of each pixel and its four neighbors. Shifted minima are faster than pooling on a CPU."""
    around = F.pad(x, (1, 1, 1, 1))
    of_rows = torch.minimum(around[..., :-2, 1:-1], around[..., 2:, 1:-1])
    of_columns = torch.minimum(around[..., 1:-1, :-2], around[..., 1:-1, 2:])
    return torch.minimum(x, torch.minimum(of_rows, of_columns))


def _dilate(x: Tensor) -> Tensor:
    """Maximum of each pixel and its eight neighbors."""
    x = F.pad(x, (1, 1, 1, 1))
    x = torch.maximum(torch.maximum(x[..., :-2, :], x[..., 2:, :]), x[..., 1:-1, :])
    return torch.maximum(torch.maximum(x[..., :-2], x[..., 2:]), x[..., 1:-1])


def iou_mse(iou_pred: Tensor, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared error of the IoU head, `iou_pred` (B, 1), against the IoU of the predicted mask.

    The prediction is logit > 0 and the ground truth is target > 0.5; if both are empty, the IoU is 1. The
    gradient flows to `iou_pred` alone.
    """
    valid = valid.bool()
    prediction = (logits > 0) & valid
    ground_truth = (target > 0.5) & valid
    intersection = _sum_pixels((prediction & ground_truth).float())
    union = _sum_pixels((prediction | ground_truth).float())
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    return (iou_pred[:, 0].float() - iou.detach()) ** 2


def _sum_pixels(x: Tensor) -> Tensor:
    return x.sum(dim=(1, 2, 3))


def sum_losses(
    logits: Tensor,
    iou_pred: Tensor,
    target_u8: Tensor,
    valid: Tensor,
    *,
    alpha: float,
    gamma: float,
    with_cldice: bool,
) -> dict[str, Tensor]:
    """Every loss by name, in float32, summed over the samples of a batch.

    `target_u8` (B, 1, h, w) is 255 times the soft target. Logits (B, 1, ., .) of any float dtype are resized
    to its grid.
    """
    target, logits = target_u8.float() / 255, logits.float()
    if logits.shape != target.shape:
        logits = F.interpolate(logits, target.shape[2:], mode="bilinear")
    losses = {
        "focal": focal_loss(logits, target, valid, alpha=alpha, gamma=gamma).sum(),
        "dice": dice_loss(logits, target, valid).sum(),
        "iou_mse": iou_mse(iou_pred, logits, target, valid).sum(),
    }
    if with_cldice:
        losses["cldice"] = cldice_loss(logits, target, valid).sum()
    return losses
