"""Where a run stands: its schedule, and the state that it saves."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from sam.trainable import ParameterGroup, prepare_training
from train_config import TrainConfig

# --- Schedule ---------------------------------------------------------------------------------


def learning_rate(step: int, *, total_steps: int, peak: float, warmup: int, power: float) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then power decay."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / (total_steps - warmup)) ** power


@dataclass(frozen=True)
class Schedule:
    """How samples make iterations (batches of all processes), and iterations make optimizer steps."""

    epoch_length: int
    batch_size: int
    virtual_batch_size: int
    epochs: int

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.epoch_length // self.batch_size)

    @property
    def iterations(self) -> int:
        return self.epochs * self.batches_per_epoch

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.batches_per_epoch // self.virtual_batch_size)

    def samples_in_batch(self, batch: int) -> int:
        """Samples of the epoch's batch `batch` (from 0)."""
        return min(self.batch_size, self.epoch_length - batch * self.batch_size)

    def samples_in_step(self, batch: int) -> int:
        """Samples of the optimizer step that the epoch's batch `batch` (from 0) belongs to."""
        whole = self.batch_size * self.virtual_batch_size
        start = batch // self.virtual_batch_size * whole
        return min(whole, self.epoch_length - start)

    def ends_step(self, batch: int) -> bool:
        """Whether the optimizer steps after the epoch's batch `batch` (from 0)."""
        return (batch + 1) % self.virtual_batch_size == 0 or batch + 1 == self.batches_per_epoch

    def is_mid_step(self, iterations: int) -> bool:
        """Whether an optimizer step is unfinished after that number of iterations, so its gradients exist."""
        batch = iterations % self.batches_per_epoch
        return batch > 0 and not self.ends_step(batch - 1)


# --- Optimizer --------------------------------------------------------------------------------


def build_optimizer(
    groups: list[ParameterGroup], weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW; on CUDA, one fused kernel updates all parameters, with other rounding than on other devices."""
    # `None` leaves the choice to PyTorch, which does not take the fused kernel.
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW([dict(group) for group in groups], weight_decay=weight_decay, fused=fused)


def prepare_optimizer(sam: Sam, config: TrainConfig) -> torch.optim.AdamW:
    """Make trainable what `--train` says, and return the optimizer of its parameters."""
    groups = prepare_training(
        sam,
        train=config.train,
        lr=config.lr,
        encoder_lr=config.encoder_lr,
        layer_decay=config.layer_decay,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        grad_checkpointing=config.grad_checkpointing,
    )
    return build_optimizer(groups, config.weight_decay, sam.device)


# --- State ------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """The progress of a run. With the trained weights, it is all that a resumed run needs.

    loss_sums, samples: since the last log, the losses summed over samples, and the number of samples.
    step: optimizer steps, with bad ones, without those that were repeated with a lower scale (float16).
    bad_steps, bad_steps_in_a_row: skipped optimizer steps of the run, and those since the last good step.
    baseline, best: metrics of the first and of the best test, with their iteration.
    last_test, last_metrics: iteration and metrics of the last test after the baseline.
    tests_without_gain: tests since the best one.
    epochs: how many fit into --minutes; None until that is measured, and without --minutes.
    cable_width: see `evaluation.training_cable_width`; None until it is measured, and if no cable was seen.
    is_finished: whether the tests and checkpoints of the current iteration are done.
    is_consistent: whether it can be saved; false while an iteration changes it. It is not saved itself.
    has_saved: whether a state of the run exists. It is not saved itself.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_sums: dict[str, Tensor]
    samples: int = 0
    iteration: int = 0
    step: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    baseline: dict[str, float] | None = None
    best: dict[str, float] | None = None
    last_test: int = 0
    last_metrics: dict[str, float] | None = None
    tests_without_gain: int = 0
    epochs: int | None = None
    cable_width: float | None = None
    is_finished: bool = True
    is_consistent: bool = True
    has_saved: bool = False

    def state_dict(self) -> dict[str, Any]:
        no_counters = ("optimizer", "scaler", "is_consistent", "has_saved")
        names = [f.name for f in fields(self) if f.name not in no_counters]
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "counters": {name: getattr(self, name) for name in names},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The state may come from another device: whether the optimizer is fused follows from the present one.
        saved, fused = state["optimizer"], self.optimizer.param_groups[0]["fused"]
        groups = [group | {"fused": fused} for group in saved["param_groups"]]
        self.optimizer.load_state_dict(saved | {"param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.has_saved = True
        self.loss_sums = {name: value.to(self.device) for name, value in self.loss_sums.items()}

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def has_finite_weights(self) -> bool:
        """Whether all weights that train are finite. This waits for the device once."""
        return bool(torch.stack([weight.isfinite().all() for weight in self.parameters]).all())

    def can_lower_scale(self) -> bool:
        """Whether gradients that are not finite may come from a scale that is too high (float16 only).

        The scaler then halves its scale until they are finite, at most to 1. From there on, the cause is
        another. This waits for the device.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def count_step(self, is_finite: bool) -> None:
        self.step += 1
        self.bad_steps += not is_finite
        self.bad_steps_in_a_row = 0 if is_finite else self.bad_steps_in_a_row + 1

    def count_iteration(self, losses: dict[str, Tensor], samples: int) -> None:
        """Count an iteration with its losses, summed over samples. Its tests and checkpoints are to come."""
        self.iteration += 1
        self.is_finished, self.is_consistent = False, True
        for name, value in losses.items():
            self.loss_sums[name] += value
        self.samples += samples

    def take_mean_losses(self) -> dict[str, float]:
        """The mean losses since the last call. This waits for the device."""
        means = (torch.stack(list(self.loss_sums.values())) / self.samples).tolist()
        for value in self.loss_sums.values():
            value.zero_()
        self.samples = 0
        return dict(zip(self.loss_sums, means, strict=True))
