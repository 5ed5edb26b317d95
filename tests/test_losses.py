import math

import pytest
import torch

from losses import cldice_loss, dice_loss, focal_loss, iou_mse, soft_skeleton


def column(*values):
    """A (1, 1, n, 1) tensor."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


ALL = torch.ones(1, 1, 2, 1, dtype=torch.bool)


def test_focal_against_hand_computed_values():
    # p = 0.75 on foreground, p = 0.25 on background, gamma 2, alpha 0.7
    logits = column(math.log(3), -math.log(3))
    expected = (0.7 * 0.25**2 * -math.log(0.75) + 0.3 * 0.25**2 * -math.log(0.75)) / 2
    loss = focal_loss(logits, column(1, 0), ALL, alpha=0.7, gamma=2.0)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_focal_alpha_weighs_foreground():
    logits, target = column(-1.0, -9.0), column(1, 0)  # all the loss is on the missed foreground
    high, low = (focal_loss(logits, target, ALL, alpha=a, gamma=2.0) for a in (0.8, 0.2))
    torch.testing.assert_close(high / low, torch.tensor([4.0]), rtol=1e-3, atol=0)


def test_focal_without_focus_is_half_the_cross_entropy():
    logits, target = torch.randn(3, 1, 5, 7), torch.rand(3, 1, 5, 7)
    valid = torch.ones_like(target, dtype=torch.bool)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = focal_loss(logits, target, valid, alpha=0.5, gamma=0.0)
    torch.testing.assert_close(loss, 0.5 * expected.mean(dim=(1, 2, 3)))


def test_focal_is_finite_at_extreme_logits():
    logits = column(-200.0, 200.0).requires_grad_()
    loss = focal_loss(logits, column(1, 0), ALL, alpha=0.7, gamma=2.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([(0.7 * 200 + 0.3 * 200) / 2]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gradients_of_focal_are_finite_for_small_gamma_and_certain_predictions(gamma):
    logits = column(200.0, -200.0).requires_grad_()
    focal_loss(logits, column(1, 0), ALL, alpha=0.7, gamma=gamma).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() < 1e-3


def test_dice_against_hand_computed_values():
    logits = column(math.log(3), 0.0)  # p = 0.75, 0.5
    expected = 1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)
    torch.testing.assert_close(dice_loss(logits, column(1, 0), ALL), torch.tensor([expected]))


def test_dice_of_empty_truth_and_empty_prediction_is_zero():
    torch.testing.assert_close(dice_loss(column(-50.0, -50.0), column(0, 0), ALL), torch.zeros(1))


def test_iou_mse_against_hand_computed_values():
    logits = column(1.0, 1.0, -1.0, -1.0)
    target = column(0.9, 0.4, 0.6, 0.0)  # truth: first and third; intersection 1, union 3
    valid = torch.ones(1, 1, 4, 1, dtype=torch.bool)
    loss = iou_mse(torch.tensor([[0.5]]), logits, target, valid)
    torch.testing.assert_close(loss, torch.tensor([(0.5 - 1 / 3) ** 2]))
    empty = iou_mse(torch.tensor([[0.25]]), column(-1.0, -1.0), column(0, 0), ALL)
    torch.testing.assert_close(empty, torch.tensor([0.75**2]))


def bars(*rows, size=40):
    """A (1, 1, size, size) mask with bars `first` to `last` row, all but the outermost columns long."""
    mask = torch.zeros(1, 1, size, size)
    for first, last in rows:
        mask[:, :, first : last + 1, 4:-4] = 1
    return mask


def test_soft_skeleton_is_the_centerline():
    skeleton = soft_skeleton(bars((8, 14), (30, 30)))[0, 0]  # 7 wide, and 1
    assert skeleton[11, 8:-8].eq(1).all() and skeleton[30, 4:-4].eq(1).all()
    skeleton[[11, 30]] = 0
    assert skeleton[:, 8:-8].eq(0).all()
    assert skeleton.sum() < 30  # nothing else apart from branches to the corners


def test_cldice_sees_gaps_and_forgives_width():
    truth = bars((10, 16))
    valid = torch.ones_like(truth, dtype=torch.bool)
    whole, wider, broken = truth.clone(), bars((9, 17)), truth.clone()
    broken[:, :, :, 17:23] = 0

    def cldice(mask):
        return cldice_loss(40 * mask - 20, truth, valid).item()

    def dice(mask):
        return dice_loss(40 * mask - 20, truth, valid).item()

    assert cldice(whole) == pytest.approx(0, abs=1e-3)
    assert dice(wider) > 0.1 and cldice(wider) < 0.5 * dice(wider)
    assert cldice(broken) > 0.08
    assert cldice(bars((24, 30))) > 0.9  # beside it


def test_cldice_gradient_closes_a_gap():
    truth = bars((10, 16))
    logits = (4 * truth - 2).requires_grad_()
    with torch.no_grad():
        logits[:, :, 10:17, 18:22] = -2
    cldice_loss(logits, truth, torch.ones_like(truth, dtype=torch.bool)).sum().backward()
    assert logits.grad[:, :, 10:17, 18:22].sum() < 0  # a step against it adds foreground there
    assert logits.grad.isfinite().all()


LOSSES = {
    "focal": lambda logits, target, valid: focal_loss(logits, target, valid, alpha=0.7, gamma=2.0),
    "dice": dice_loss,
    "cldice": cldice_loss,
    "iou_mse": lambda logits, target, valid: iou_mse(
        torch.full((len(logits), 1), 0.3), logits, target, valid
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_padding_does_not_count(loss):
    logits, target = torch.randn(2, 1, 6, 6), torch.rand(2, 1, 6, 6)
    valid = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    valid[:, :, :4, :5] = True
    inside = loss(logits[:, :, :4, :5], target[:, :, :4, :5], valid[:, :, :4, :5])
    torch.testing.assert_close(loss(logits, target, valid), inside)
    noise = torch.where(valid, 0.0, 50 * torch.randn_like(logits))
    torch.testing.assert_close(loss(logits + noise, target, valid), inside)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_samples_do_not_mix(loss):
    logits, target = torch.randn(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    valid = torch.rand(3, 1, 4, 4) > 0.3
    one_by_one = torch.cat([loss(logits[i : i + 1], target[i : i + 1], valid[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(logits, target, valid), one_by_one)


def test_a_focusing_power_below_one_has_a_finite_gradient():
    logits = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0]).view(1, 1, 1, 5).requires_grad_()
    for target in (torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 1, 5)):
        loss = focal_loss(logits, target, torch.ones(1, 1, 1, 5), alpha=0.5, gamma=0.5).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all() and gradient.any()
