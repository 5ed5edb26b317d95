"""What a run works with: its data, its model and its folder, all checked before anything is written."""

import hashlib
import os
import shutil
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import runtime
from base.atomic import MIB, require_free_space
from base.errors import UserError
from checkpoint import RESUME_FILE, ResumeState
from config import Config, load_config
from dataset import TestSet, TrainSet
from dataset_index import DatasetIndex, file_digests, find_cables_in_backgrounds, find_leaks, index_datasets
from embeddings import pool_spec, raised_in_all, reserve_or_keep_less
from imaging.files import format_list
from imaging.geometry import InputSpec
from imaging.pairing import Pair, normalized
from inference import LoadedSam
from memory_trial import with_batch_size
from preview import write_preview
from run_logger import dataset_table
from sam.decoder import decode
from sam.encoder import move_to_device
from sam.variants import VARIANTS, load_state_dict, pretrained_path, with_finer_input
from train_config import CONFIG_FILE, TrainConfig
from train_state import Schedule

FINER_LOSS_GRID = 2  # how much finer than the decoder's grid the loss is where the encoder trains
LOGS = 100 * MIB  # on disk: images and curves of TensorBoard, and other small files of a run; an estimate


@dataclass(frozen=True)
class Experiment:
    """Data, model and folder of a run, all checked. Nothing is written before this exists.

    config: the flags, with the `test_interval` and the batch sizes of this run.
    """

    config: TrainConfig
    data: Config
    train_set: TrainSet
    test_set: TestSet | None
    net: LoadedSam
    initial_state_dict: dict[str, Tensor]
    initial_weights: str
    schedule: Schedule
    folder: Path
    resume_state: ResumeState | None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def datasets(self) -> list[DatasetIndex]:
        return [*self.train_set.datasets, *([self.test_set.dataset] if self.test_set else [])]


def preview(config: TrainConfig) -> None:
    """What `--preview` does, without weights. Raises UserError as `prepare` does."""
    train, test = find_data(load_data_config(config), config.max_pixels, config.val_percentage)
    variant = VARIANTS[config.model_type]
    write_preview(
        train,
        test,
        spec=InputSpec(variant.img_size, variant.mask_grid),
        prompt=config.prompt,
        seed=config.seed,
        folder=config.folder / "preview",
    )


def find_data(
    data: Config, max_pixels: int, val_percentage: float = 0.0
) -> tuple[list[DatasetIndex], DatasetIndex | None]:
    """The datasets to train on and the one to test on, all checked. Warns of images that are in both.

    Process 0 checks the files. The others get what it found, or raise the same UserError.
    """
    configs = [*data.dataset.train, *([data.dataset.test] if data.dataset.test else [])]
    datasets = runtime.from_main(
        lambda: index_datasets(configs, max_pixels=max_pixels, show_progress=runtime.is_main())
    )
    test = datasets.pop() if data.dataset.test else None
    if val_percentage:
        datasets, test = split_off_test(datasets, val_percentage)
    labeled = find_cables_in_backgrounds(datasets)
    if labeled and runtime.is_main():
        warnings.warn(
            "bg_paths contains photos of cables, and training takes these cables for background:\n  "
            f"{format_list(labeled)}",
            stacklevel=2,
        )
    leaks = find_leaks(datasets, test) if test else []
    if leaks and runtime.is_main():
        warnings.warn(
            "test images are also used in training, so the test does not measure generalization:\n  "
            f"{format_list(leaks)}",
            stacklevel=2,
        )
    return datasets, test


def split_off_test(
    datasets: list[DatasetIndex], percentage: float
) -> tuple[list[DatasetIndex], DatasetIndex]:
    """Take about `percentage` percent of the pairs of each dataset for a test set of photos as they are.

    A hash of the stem decides, so a photo stays on its side when others are added. At least one pair of each
    dataset is taken, and one is left.
    """
    train: list[DatasetIndex] = []
    tested: dict[Path, Pair] = {}
    for dataset in datasets:
        by_hash = sorted((_stem_hash(pair), number) for number, pair in enumerate(dataset.pairs))
        count = sum(hashed < percentage / 100 for hashed, _ in by_hash)
        count = min(max(1, count), len(by_hash) - 1)
        numbers = {number for _, number in by_hash[:count]}
        tested |= {pair.image_path: pair for n, pair in enumerate(dataset.pairs) if n in numbers}
        rest = tuple(pair for n, pair in enumerate(dataset.pairs) if n not in numbers)
        train.append(replace(dataset, pairs=rest))
    if not tested:
        raise UserError(f"--val_percentage {percentage:g}: no dataset has more than one pair")
    plain = {"bg_paths": (), "w_aug": False, "aug_details": None, "percentage": 1.0}
    infos = {path: info for dataset in datasets for path, info in dataset.infos.items()}
    config = datasets[0].config.model_copy(update=plain)
    return train, DatasetIndex(config, tuple(tested.values()), (), infos)


def _stem_hash(pair: Pair) -> float:
    """A number in 0..1 that depends on nothing but the stem of the image."""
    stem = normalized(pair.image_path.stem).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(stem, digest_size=6).digest(), "big") / 2**48


def prepare(config: TrainConfig) -> Experiment:
    """Check every input and build the model. Raises UserError for what the user can correct."""
    folder = config.folder
    resume_state = find_resume_state(folder) if config.resume else None
    if not config.resume:
        require_unused(folder)
    device = runtime.join_process_group(runtime.pick_device(config.device))
    data = load_data_config(config)
    if resume_state:
        checkpoint.check_same_settings(
            resume_state,
            flags=config.flags(),
            config=data.model_dump_json(),
            world_size=runtime.world_size(),
            folder=folder,
        )
    train, test = find_data(data, config.max_pixels, config.val_percentage)
    if resume_state:
        checkpoint.check_same_files(resume_state, file_digests([*train, *([test] if test else [])]), folder)

    weights_path = find_weights(config)
    config = with_batch_size(config, device, partial(build_trial_net, config, weights_path, device))
    net, initial_state_dict = build_net(config, weights_path, device)
    epochs = find_epochs(config, resume_state)
    train_set = make_train_set(config, train, net, epochs)
    batch_size = config.batch_size * runtime.world_size()
    schedule = Schedule(train_set.epoch_length, batch_size, config.virtual_batch_size, epochs)
    if resume_state:
        require_iterations_left(resume_state, schedule, config)
    if runtime.should_compile(config.compile, device, images_to_encode(config, train_set.epoch_length)):
        net = with_compiled_decoder(net, config.batch_size)
    return Experiment(
        config=with_test_interval(config, schedule, resume_state),
        data=data,
        train_set=train_set,
        test_set=TestSet(test, spec=net.spec, prompt=config.prompt, seed=config.seed) if test else None,
        net=net,
        initial_state_dict=initial_state_dict,
        initial_weights=checkpoint.file_digest(weights_path),
        schedule=schedule,
        folder=folder,
        resume_state=resume_state,
    )


def summary(experiment: Experiment, is_unmeasured: bool) -> str:
    """What is about to run, in a few lines.

    is_unmeasured: whether the number of epochs of `--minutes` is not known yet.
    """
    config, net, schedule = experiment.config, experiment.net, experiment.schedule
    train_set, test_set = experiment.train_set, experiment.test_set
    trainable = sum(p.numel() for p in net.sam.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.sam.parameters()) - trainable
    precision = str(net.low_precision).removeprefix("torch.") if net.low_precision else "float32"
    length = (
        f"{schedule.epochs} epochs of {schedule.epoch_length} samples: "
        f"{schedule.iterations} iterations, {schedule.steps} optimizer steps"
    )
    if is_unmeasured:
        length = f"epochs of {schedule.epoch_length} samples, as many as fit into {config.minutes:g} minutes"
    lines = [
        dataset_table(train_set.datasets, test_set.dataset if test_set else None),
        f"training    {length}",
        f"model       {config.model_type}, prompt {config.prompt}, --train {config.train}: "
        f"{trainable / 1e6:.2f} M parameters train, {frozen / 1e6:.2f} M are frozen",
        f"device      {net.device}, {precision}{', compiled' * bool(net.compiled_decode)}, "
        f"{config.num_workers} data workers",
        f"results     {experiment.folder}",
    ]
    if train_set.n_cache_slots:
        size = pool_spec(train_set.n_cache_slots, net).size
        lines.append(
            f"embeddings  {size / MIB:.0f} MiB on disk until the end; each composite is used in "
            f"{config.embedding_reuse} epoch(s), each photo without augmentation in all"
        )
    return "\n".join(lines)


UNMEASURED_EPOCHS = 10**6  # of a run of --minutes, until its speed is known


def find_epochs(config: TrainConfig, state: ResumeState | None) -> int:
    """How many epochs the run has, as far as this is known."""
    if config.minutes is None:
        return config.epoch_num
    measured = state["train_state"]["counters"]["epochs"] if state else None
    return measured or UNMEASURED_EPOCHS


# Images that a fast encoder encodes per second on CUDA, as in `runtime.MIN_IMAGES_TO_COMPILE`. With a slower
# encoder, the count is too high, but the share of time that compiling saves is the same.
IMAGES_PER_SECOND = 150


def images_to_encode(config: TrainConfig, epoch_length: int) -> int:
    """How many images the run encodes, for `runtime.should_compile`; an estimate with --minutes."""
    images = config.epoch_num * epoch_length
    if config.minutes:
        images = round(60 * config.minutes * IMAGES_PER_SECOND)
    return images // config.embedding_reuse


def load_data_config(config: TrainConfig) -> Config:
    """The YAML file that describes the data, checked against the flags of the test. Raises UserError."""
    try:
        data = load_config(config.config)
    except UserError as error:
        if config.config != config.folder / CONFIG_FILE:
            raise
        raise UserError(
            f"{error}\nIf the data was moved, give --config with a YAML file of its new paths."
        ) from error
    if data.dataset.test and config.val_percentage:
        raise UserError(
            f"--val_percentage {config.val_percentage:g}: the YAML file has a test set already; "
            "leave out dataset.test or the flag"
        )
    if config.patience and not data.dataset.test and not config.val_percentage:
        raise UserError(
            f"--patience {config.patience}: needs a test set; "
            "add dataset.test to the YAML file, or the flag --val_percentage"
        )
    return data


TESTS = 8  # of a run, at most, by default
UNMEASURED_INTERVAL = 100  # iterations between tests, if the length of the run is not known


def with_test_interval(config: TrainConfig, schedule: Schedule, state: ResumeState | None) -> TrainConfig:
    """The flags with `test_interval`: by the flag, else as before the run was resumed, else by `TESTS`."""
    if config.test_interval is not None:
        return config
    interval = -(-schedule.iterations // TESTS) if config.minutes is None else UNMEASURED_INTERVAL
    interval = state["flags"]["test_interval"] if state else interval
    return replace(config, test_interval=interval)


def with_compiled_decoder(net: LoadedSam, batch_size: int) -> LoadedSam:
    """The same model with a decoder that is compiled for whole batches.

    `finetune.start` compiles the encoder, after it has been made trainable.
    """
    return replace(net, compiled_decode=torch.compile(decode, dynamic=False), compiled_batch_size=batch_size)


def find_resume_state(folder: Path) -> ResumeState | None:
    """The saved state of a run; None if the run died before it saved a state or weights, and starts again."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run to resume (--exp_name, --resume)")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"{folder} may not be read or written; change its permissions to resume it")
    weights = max(folder.glob("checkpoints/*.pth"), key=lambda path: path.stat().st_mtime, default=None)
    if not (folder / RESUME_FILE).exists():
        if weights is None:
            return None
        raise UserError(
            f"{folder / RESUME_FILE} is missing, and no run continues without it; start a new run with "
            f"another --exp_name and --checkpoint {weights}"
        )
    best = folder / "checkpoints" / checkpoint.BEST_FILE
    weights_left = f" and --checkpoint {best}" if best.exists() else ""
    way = f"start the run again with another --exp_name{weights_left}"
    state = checkpoint.load_resume_state(folder / RESUME_FILE, way)
    checkpoint.require_finite(state["weights"], folder / RESUME_FILE, f"{way}; a lower --lr may help")
    return state


def require_unused(folder: Path) -> None:
    """Raise UserError if the folder of a new run holds more than what `--preview` wrote."""
    try:
        is_used = folder.exists() and any(path.name != "preview" for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot hold a run ({error}); choose another --exp_name") from error
    if is_used:
        raise UserError(
            f"{folder} already holds a run; choose another --exp_name, remove the folder, or add --resume"
        )


def require_iterations_left(state: ResumeState, schedule: Schedule, config: TrainConfig) -> None:
    """Raise UserError if a run that is to be resumed has done all its iterations."""
    counters = state["train_state"]["counters"]
    done = counters["iteration"]
    if config.patience and counters["is_finished"] and counters["tests_without_gain"] >= config.patience:
        raise UserError(
            f"{config.folder} has ended after {counters['tests_without_gain']} tests without a gain "
            f"(--patience {config.patience}): give a larger --patience"
        )
    if done > schedule.iterations or (done == schedule.iterations and counters["is_finished"]):
        asked = f"--minutes {config.minutes:g}" if config.minutes else f"--epoch_num {config.epoch_num}"
        way = "start a new run from its weights" if config.minutes else "give a larger --epoch_num"
        raise UserError(
            f"{config.folder} has done {done} iterations; {asked} asks for {schedule.iterations}: {way}"
        )


def find_weights(config: TrainConfig) -> Path:
    """The weights file to start from. The first process of each machine downloads it, if need be."""
    if config.checkpoint:
        return config.checkpoint
    if not runtime.is_first_on_machine():
        runtime.barrier()
    path = pretrained_path(config.model_type)
    if runtime.is_first_on_machine():
        runtime.barrier()
    return path


def build_net(config: TrainConfig, path: Path, device: torch.device) -> tuple[LoadedSam, dict[str, Tensor]]:
    """The model that the flags name, on the device; and the weights that it starts from."""
    weights = checkpoint.load_weights(path)
    checkpoint.require_finite(weights, path, "give other weights with --checkpoint")
    initial_state_dict = with_finer_input(weights, config.model_type)
    sam = VARIANTS[config.model_type].build()
    load_state_dict(sam, initial_state_dict, config.model_type, path)
    low_precision = runtime.amp_dtype(config.amp, device)
    runtime.allow_tf32(low_precision, device)
    move_to_device(sam, device, low_precision, train=config.train)
    net = LoadedSam(sam, config.model_type, low_precision, encoder_trains=config.train == "encoder")
    return net, initial_state_dict


def build_trial_net(config: TrainConfig, path: Path, device: torch.device) -> tuple[LoadedSam, InputSpec]:
    """What `memory_trial.with_batch_size` builds."""
    net, _ = build_net(config, path, device)
    return net, sample_spec(config, net)


def sample_spec(config: TrainConfig, net: LoadedSam) -> InputSpec:
    """The sizes of training samples; the loss has a finer grid where the encoder trains."""
    is_finer = config.train != "decoder"
    return replace(net.spec, mask_grid=FINER_LOSS_GRID * net.spec.mask_grid) if is_finer else net.spec


def make_train_set(
    config: TrainConfig, datasets: list[DatasetIndex], net: LoadedSam, epochs: int
) -> TrainSet:
    """The training samples. Photos that never change are kept if the disk has space for their embeddings.

    Raises UserError if --embedding_reuse needs more disk space than there is.
    """
    train_set = TrainSet(
        datasets,
        spec=sample_spec(config, net),
        prompt=config.prompt,
        seed=config.seed,
        reuse=config.embedding_reuse,
        keep_photos=epochs > 1 and config.train == "decoder",
        cache_bytes=config.cache_mb * MIB,
    )
    check = partial(require_disk_space, config=config, net=net, epochs=epochs)
    train_set, _ = reserve_or_keep_less(train_set, check)
    return train_set


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
    """Bytes that a run still writes besides embeddings; an estimate from above.

    A file that is replaced exists twice for a moment. As long as the number of epochs is UNMEASURED_EPOCHS,
    their checkpoints are left out; `warn_of_disk_space` counts them later. What trains is counted by
    `requires_grad`. Before `finetune.start` has set it, that is the decoder or, where the encoder trains too,
    the whole model.
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


def warn_of_disk_space(experiment: Experiment, epochs: int) -> None:
    """Warn if the disk cannot hold the checkpoints of a run of --minutes, whose epochs are now known."""
    needed = size_of_saves(experiment.config, experiment.net, epochs)
    free = shutil.disk_usage(experiment.folder).free
    if free < needed:
        warnings.warn(
            f"{epochs} epochs write up to {needed / MIB:.0f} MiB to {experiment.folder}, but its disk has "
            f"{free / MIB:.0f} MiB left; make space, or stop and resume with --keep_last or --save_interval",
            stacklevel=2,
        )
