"""The preparation of a run: what it works with, checked before anything is written; then its folder."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import resume
import runtime
from base.atomic import MIB
from base.errors import UserError
from config import Config, load_config
from dataset import TestSet, TrainSet
from dataset_index import DatasetIndex, file_digests, find_data
from disk_space import require_disk_space
from embeddings import reserve_or_keep_less
from imaging.geometry import InputSpec
from inference import LoadedSam
from memory_trial import with_batch_size
from preview import write_preview
from resume import ResumeState
from sam.decoder import decode
from sam.encoder import move_to_device
from sam.variants import VARIANTS, load_state_dict, pretrained_path, with_finer_input
from timing import UNMEASURED_EPOCHS
from train_config import CONFIG_FILE, TrainConfig
from train_state import Schedule


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

    @property
    def dataset_to_predict(self) -> DatasetIndex:
        """The dataset on which the commands that come next predict: the test set if there is one."""
        return self.test_set.dataset if self.test_set else self.train_set.datasets[0]


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


def prepare(config: TrainConfig) -> Experiment:
    """Check every input and build the model. Raises UserError for what the user can correct."""
    folder = config.folder
    resume_state = resume.find_resume_state(folder) if config.resume else None
    if not config.resume:
        require_unused(folder)
    device = runtime.join_process_group(runtime.pick_device(config.device))
    data = runtime.from_main(partial(load_data_config, config))
    if resume_state:
        resume.check_same_settings(
            resume_state,
            flags=config.flags(),
            config=data.model_dump_json(),
            world_size=runtime.world_size(),
            folder=folder,
        )
    train, test = find_data(data, config.max_pixels, config.val_percentage)
    if resume_state:
        resume.check_same_files(resume_state, file_digests([*train, *([test] if test else [])]), folder)

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


# --- Folder -----------------------------------------------------------------------------------


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


def make_folder(experiment: Experiment) -> None:
    """Make the folder of the run. Raises UserError if this fails, or if another run made it meanwhile."""
    config, checkpoints = experiment.config, experiment.checkpoints
    try:
        checkpoints.mkdir(parents=True, exist_ok=config.resume)
    except OSError as error:
        if isinstance(error, FileExistsError) and not config.resume:
            raise UserError(
                f"another run has just started in {config.folder}; choose another --exp_name"
            ) from error
        raise UserError(f"{checkpoints} cannot be made: {error}") from error


# --- Data -------------------------------------------------------------------------------------


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


# --- Length -----------------------------------------------------------------------------------

TESTS = 8  # of a run, at most, by default
UNMEASURED_INTERVAL = 100  # iterations between tests, if the length of the run is not known
# Images that a fast encoder encodes per second on CUDA, as in `runtime.MIN_IMAGES_TO_COMPILE`. With a slower
# encoder, the count is too high, but the share of time that compiling saves is the same.
IMAGES_PER_SECOND = 150


def find_epochs(config: TrainConfig, state: ResumeState | None) -> int:
    """How many epochs the run has, as far as this is known."""
    if config.minutes is None:
        return config.epoch_num
    measured = state["train_state"]["counters"]["epochs"] if state else None
    return measured or UNMEASURED_EPOCHS


def images_to_encode(config: TrainConfig, epoch_length: int) -> int:
    """How many images the run encodes, for `runtime.should_compile`; an estimate with --minutes."""
    images = config.epoch_num * epoch_length
    if config.minutes:
        images = round(60 * config.minutes * IMAGES_PER_SECOND)
    return images // config.embedding_reuse


def with_test_interval(config: TrainConfig, schedule: Schedule, state: ResumeState | None) -> TrainConfig:
    """The flags with `test_interval`: by the flag, else as before the run was resumed, else by `TESTS`."""
    if config.test_interval is not None:
        return config
    interval = -(-schedule.iterations // TESTS) if config.minutes is None else UNMEASURED_INTERVAL
    interval = state["flags"]["test_interval"] if state else interval
    return replace(config, test_interval=interval)


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


# --- Model ------------------------------------------------------------------------------------

FINER_LOSS_GRID = 2  # how much finer than the decoder's grid the loss is where the encoder trains


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


def with_compiled_decoder(net: LoadedSam, batch_size: int) -> LoadedSam:
    """The same model with a decoder that is compiled for whole batches.

    `finetune.start` compiles the encoder, after it has been made trainable.
    """
    return replace(net, compiled_decode=torch.compile(decode, dynamic=False), compiled_batch_size=batch_size)
