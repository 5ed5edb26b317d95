"""`--batch_size auto`: the largest batch that the memory of a CUDA device holds, found by trial."""

from collections.abc import Callable
from dataclasses import replace

import torch

import runtime
from imaging.geometry import InputSpec
from imaging.prompts import PROMPT_TOKENS
from inference import LoadedSam
from losses import sum_losses
from sam.encoder import valid_pixels
from train_config import AUTO, TrainConfig, default_batch_size
from train_state import prepare_optimizer

SPARE = 0.1  # of the memory that is free at the start


def with_batch_size(
    config: TrainConfig, device: torch.device, build: Callable[[], tuple[LoadedSam, InputSpec]]
) -> TrainConfig:
    """The flags with numbers instead of `--batch_size auto`.

    An optimizer step has the default batch size times --virtual_batch_size samples. On CUDA they are divided
    into the largest batches of equal size that fit. Elsewhere "auto" is the default batch size. Several
    processes take the smallest size that one of them finds.

    build: builds the same model as the run, and returns it with the sizes of its samples. The trial changes
        this model.
    """
    if config.batch_size != AUTO:
        return config
    default = default_batch_size(config.train)
    if device.type != "cuda":
        return replace(config, batch_size=default)
    samples = default * config.virtual_batch_size
    found = largest_that_fits(config, device, samples, build)
    found = -runtime.all_reduce_max([-found])[0]
    return replace(config, batch_size=found, virtual_batch_size=samples // found)


def largest_that_fits(
    config: TrainConfig,
    device: torch.device,
    samples: int,
    build: Callable[[], tuple[LoadedSam, InputSpec]],
) -> int:
    """The largest divisor of `samples` whose batches train with SPARE left; the smallest batch is 1."""
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    net, spec = build()
    step = trial_step(config, net, spec)
    found = 1
    for batch_size in (n for n in range(1, samples + 1) if samples % n == 0):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(batch_size)
        except torch.OutOfMemoryError:
            break
        if torch.cuda.max_memory_reserved(device) > (1 - SPARE) * available:
            break
        found = batch_size
    del net, step
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return found


def trial_step(config: TrainConfig, net: LoadedSam, spec: InputSpec) -> Callable[[int], None]:
    """A function that trains `net` on an empty batch of a given size, as finetune.py does.

    The second backward pass needs as much memory as any iteration: there are gradients of an earlier batch,
    and the moments of the optimizer.
    """
    optimizer = prepare_optimizer(net.sam, config)
    side, grid, n_tokens = spec.img_size, spec.mask_grid, PROMPT_TOKENS[config.prompt]

    def step(batch_size: int) -> None:
        images = torch.zeros(batch_size, side, side, 3, dtype=torch.uint8, device=net.device)
        sizes = torch.full((batch_size, 2), side, device=net.device)
        target = torch.zeros(batch_size, 1, grid, grid, dtype=torch.uint8, device=net.device)
        points = torch.zeros(batch_size, n_tokens, 2, device=net.device)
        labels = torch.zeros(batch_size, n_tokens, dtype=torch.int64, device=net.device)
        for _ in range(2):
            logits, iou_pred = net.decode(net.encode(images, sizes), points, labels)
            losses = sum_losses(
                logits,
                iou_pred,
                target,
                valid_pixels(sizes, grid, grid / side),
                alpha=config.alpha,
                gamma=config.gamma,
                with_cldice="cldice" in config.loss_weights,
            )
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()

    return step
