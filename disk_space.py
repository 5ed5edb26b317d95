"""Whether the disk can hold what a run writes."""

import shutil
import warnings

from base.atomic import MIB, require_free_space
from dataset import TrainSet
from embeddings import pool_spec, raised_in_all
from inference import LoadedSam
from timing import UNMEASURED_EPOCHS
from train_config import TrainConfig

LOGS = 100 * MIB  # on disk: images and curves of TensorBoard, and other small files of a run; an estimate


def require_disk_space(train_set: TrainSet, *, config: TrainConfig, net: LoadedSam, epochs: int) -> None:
    """Raise UserError, in all processes, if the disk cannot hold all that a run with embeddings writes."""
    if not train_set.n_cache_slots:
        return
    pool, rest = pool_spec(train_set.n_cache_slots, net).size, size_of_saves(config, net, epochs)
    purpose = (
        f"--embedding_reuse {config.embedding_reuse}" if config.embedding_reuse > 1 else "keeping photos"
    )
    with raised_in_all(purpose):
        require_free_space(
            config.folder,
            pool + rest,
            f"{pool / MIB:.0f} MiB of embeddings and {rest / MIB:.0f} MiB of checkpoints (--keep_last)",
        )


def size_of_saves(config: TrainConfig, net: LoadedSam, epochs: int) -> int:
    """Bytes that a run still writes besides embeddings; an upper estimate.

    A file that is replaced exists twice for a moment. As long as the number of epochs is UNMEASURED_EPOCHS,
    their checkpoints are left out; `warn_of_disk_space` counts them later. The parameters with
    `requires_grad` count as trained. Before `finetune.start` sets it, these are the decoder or, if the
    encoder trains too, the whole model.
    """
    weights = 4 * sum(weight.numel() for weight in net.sam.state_dict().values())  # float32
    part = net.sam.mask_decoder if config.train == "decoder" else net.sam
    trained = 4 * sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
    resume_state = 4 * trained  # weights, gradients, and two moments of AdamW
    saved_epochs = 0 if epochs == UNMEASURED_EPOCHS else epochs // config.save_interval
    if config.keep_last is not None:
        saved_epochs = min(saved_epochs, config.keep_last + 1)
    checkpoints = (saved_epochs + 2) * weights  # best.pth and last.pth
    written = sum(path.stat().st_size for path in config.folder.rglob("*.pth"))  # by a run that is resumed
    return max(0, checkpoints + resume_state - written) + max(weights, resume_state) + LOGS


def warn_of_disk_space(config: TrainConfig, net: LoadedSam, epochs: int) -> None:
    """Warn if the disk cannot hold the checkpoints of a run of --minutes, once its epochs are known."""
    needed = size_of_saves(config, net, epochs)
    free = shutil.disk_usage(config.folder).free
    if free < needed:
        warnings.warn(
            f"{epochs} epochs write up to {needed / MIB:.0f} MiB to {config.folder}, but its disk has "
            f"{free / MIB:.0f} MiB left; make space, or stop and resume with --keep_last or --save_interval",
            stacklevel=2,
        )
