"""Fine-tune the Segment Anything Model to segment deformable linear objects (cables, wires, ropes).

    python finetune.py --config configs/demo.yaml --model_type lite_medsam --exp_name demo

The YAML file describes the data, the flags describe the training. See README.md.
"""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGINT

import torch
from torch import Tensor, nn

import checkpoint
import runtime
from base.atomic import MIB, require_free_space
from base.errors import UserError
from checkpoint import ResumeState
from config import Config, load_config
from dataset import DatasetIndex, TestSet, TrainSet, file_digests, find_leaks, index_datasets
from embeddings import EncodedTestSample, TrainBatch, encode_test_set, pool_spec, training_batches
from evaluation import run_test, train_panels
from imaging.files import format_list
from imaging.geometry import InputSpec
from inference import LoadedSam
from losses import sum_losses
from preview import write_preview
from run_logger import RunLogger, Throughput, Timer, dataset_table, result_summary
from sam.decoder import decode
from sam.encoder import move_to_device, valid_pixels
from sam.trainable import (
    export_state_dict,
    gradients,
    load_gradients,
    load_trained_weights,
    prepare_training,
    trained_weights,
)
from sam.variants import VARIANTS, load_state_dict, pretrained_path
from train_config import TrainConfig, parse_args
from train_state import Schedule, TrainState, learning_rate

RESUME_FILE = "resume.pth"
MEMORY_HINT = (
    "a smaller --batch_size (with a larger --virtual_batch_size), --amp bf16, a smaller --model_type, "
    "or --grad_checkpointing where the encoder trains, need less"
)
FINER_LOSS_GRID = 2  # how much finer than the decoder's grid the loss is where the encoder trains

# --- Preparation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Data, model and folder of a run, all checked. Nothing is written before this exists."""

    data: Config
    train_set: TrainSet
    test_set: TestSet | None
    net: LoadedSam
    initial_state_dict: dict[str, Tensor]
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
    train, test = find_data(load_config(config.config), config.max_pixels)
    variant = VARIANTS[config.model_type]
    write_preview(
        train,
        test,
        spec=InputSpec(variant.img_size, variant.mask_grid),
        prompt=config.prompt,
        seed=config.seed,
        folder=config.folder / "preview",
    )


def find_data(data: Config, max_pixels: int) -> tuple[list[DatasetIndex], DatasetIndex | None]:
    """The datasets to train on and the one to test on, all checked. Warns of images that are in both."""
    configs = [*data.dataset.train, *([data.dataset.test] if data.dataset.test else [])]
    datasets = index_datasets(configs, max_pixels=max_pixels)
    test = datasets.pop() if data.dataset.test else None
    leaks = [f"{tested} = {trained}" for tested, trained in find_leaks(datasets, test)] if test else []
    if leaks and runtime.is_main():
        warnings.warn(
            "test images are also training images, so the test does not measure generalization:\n  "
            f"{format_list(leaks)}",
            stacklevel=2,
        )
    return datasets, test


def prepare(config: TrainConfig) -> Experiment:
    """Check every input and build the model. Raises UserError for what the user can mend."""
    folder = config.folder
    if not config.resume:
        require_unused(folder)
    device = runtime.join_process_group(runtime.pick_device(config.device))
    data = load_config(config.config)
    resume_state = checkpoint.load_resume_state(folder / RESUME_FILE) if config.resume else None
    if resume_state:
        checkpoint.check_same_settings(
            resume_state,
            flags=config.flags(),
            config=data.model_dump_json(),
            world_size=runtime.world_size(),
            folder=folder,
        )
    train, test = find_data(data, config.max_pixels)
    if resume_state:
        checkpoint.check_same_files(resume_state, file_digests([*train, *([test] if test else [])]), folder)

    net, initial_state_dict = build_net(config, device)
    train_set = make_train_set(config, train, net)
    schedule = Schedule(
        train_set.epoch_length,
        config.batch_size * runtime.world_size(),
        config.virtual_batch_size,
        config.epoch_num,
    )
    images_to_encode = config.epoch_num * train_set.epoch_length // config.embedding_reuse
    if runtime.should_compile(config.compile, device, images_to_encode):
        net = replace(
            net,
            compiled_decode=torch.compile(decode, dynamic=False),
            compiled_batch_size=config.batch_size,
        )
    return Experiment(
        data=data,
        train_set=train_set,
        test_set=TestSet(test, spec=net.spec, prompt=config.prompt, seed=config.seed) if test else None,
        net=net,
        initial_state_dict=initial_state_dict,
        schedule=schedule,
        folder=folder,
        resume_state=resume_state,
    )


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


def build_net(config: TrainConfig, device: torch.device) -> tuple[LoadedSam, dict[str, Tensor]]:
    """The model that the flags name, on the device; and the weights as they were loaded."""
    path = config.checkpoint or pretrained_path(config.model_type)
    initial_state_dict = checkpoint.load_weights(path)
    sam = VARIANTS[config.model_type].build()
    load_state_dict(sam, initial_state_dict, config.model_type, path)
    low_precision = runtime.amp_dtype(config.amp, device)
    move_to_device(sam, device, low_precision, train=config.train)
    net = LoadedSam(sam, config.model_type, low_precision, encoder_trains=config.train == "encoder")
    return net, initial_state_dict


def make_train_set(config: TrainConfig, datasets: list[DatasetIndex], net: LoadedSam) -> TrainSet:
    """The training samples. Raises UserError if --embedding_reuse needs more disk space than there is."""
    spec = net.spec
    if config.train != "decoder":
        spec = replace(spec, mask_grid=FINER_LOSS_GRID * spec.mask_grid)

    def make(keep_photos: bool) -> TrainSet:
        return TrainSet(
            datasets,
            spec=spec,
            prompt=config.prompt,
            seed=config.seed,
            reuse=config.embedding_reuse,
            keep_photos=keep_photos,
            cache_bytes=config.cache_mb * MIB,
        )

    train_set = make(keep_photos=config.epoch_num > 1 and config.train == "decoder")
    try:
        size_of_pools = runtime.local_world_size() * pool_spec(train_set.n_cache_slots, net).size
        require_free_space(config.folder, size_of_pools, "keeping the embeddings")
    except UserError as error:
        if config.embedding_reuse > 1:
            raise
        warnings.warn(f"{error}: photos are encoded again in every epoch", stacklevel=2)
        return make(keep_photos=False)
    return train_set


# --- Start and state ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run under way: what it computes with, where it stands, what it shows, and who may stop it."""

    config: TrainConfig
    experiment: Experiment
    schedule: Schedule
    state: TrainState
    logger: RunLogger
    stop: runtime.StopRequest
    tests: list[EncodedTestSample]

    @property
    def is_last(self) -> bool:
        """Whether the current iteration is the last one."""
        return self.state.iteration == self.schedule.iterations

    @property
    def is_test(self) -> bool:
        """Whether the current iteration ends with a test."""
        return self.is_last or self.state.iteration % self.config.test_interval == 0


def start(config: TrainConfig, experiment: Experiment, stop: runtime.StopRequest) -> Run:
    """Make trainable what trains, load the state to resume if there is one, and open the folder."""
    net, resume_state = experiment.net, experiment.resume_state
    torch.manual_seed(config.seed)
    groups = prepare_training(
        net.sam,
        train=config.train,
        lr=config.lr,
        encoder_lr=config.encoder_lr,
        layer_decay=config.layer_decay,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        grad_checkpointing=config.grad_checkpointing,
    )
    state = TrainState(
        torch.optim.AdamW([dict(group) for group in groups], weight_decay=config.weight_decay),
        torch.amp.GradScaler(net.device.type, enabled=net.low_precision is torch.float16),
        {name: torch.zeros((), device=net.device) for name in config.loss_weights},
    )
    if resume_state:
        load_trained_weights(net.sam, resume_state["weights"])
        if runtime.is_main():  # the sum over all processes
            load_gradients(net.sam, resume_state["gradients"])
        state.load_state_dict(resume_state["train_state"])
    if net.compiled_decode:
        net.sam.image_encoder.compile(dynamic=False)
    logger = open_logger(config, experiment, state)
    runtime.barrier()
    tests: list[EncodedTestSample] = []
    if experiment.test_set:
        tests = encode_test_set(experiment.test_set, net, num_workers=config.num_workers, stop=stop)
    return Run(config, experiment, experiment.schedule, state, logger, stop, tests)


def open_logger(config: TrainConfig, experiment: Experiment, state: TrainState) -> RunLogger:
    """Make the folder, write the settings, and say what is about to run."""
    is_main, resumed = runtime.is_main(), experiment.resume_state is not None
    if is_main:
        try:
            experiment.checkpoints.mkdir(parents=True, exist_ok=resumed)
        except OSError as error:
            raise UserError(f"{experiment.checkpoints} cannot be made: {error}") from error
    logger = RunLogger(
        experiment.folder,
        iterations=experiment.schedule.iterations,
        done=state.iteration,
        resumed=resumed,
        enabled=is_main,
    )
    flags = config.flags()
    logger.settings(flags, json.loads(experiment.data.model_dump_json()), state.iteration)
    logger.print(summary(config, experiment))
    if resumed:
        logger.print(f"resumed     after iteration {state.iteration}")
    return logger


def summary(config: TrainConfig, experiment: Experiment) -> str:
    """What is about to run, in a few lines."""
    net, train_set, test_set = experiment.net, experiment.train_set, experiment.test_set
    schedule = experiment.schedule
    trainable = sum(p.numel() for p in net.sam.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.sam.parameters()) - trainable
    precision = str(net.low_precision).removeprefix("torch.") if net.low_precision else "float32"
    lines = [
        dataset_table(train_set.datasets, test_set.dataset if test_set else None),
        f"training    {schedule.epochs} epochs of {schedule.epoch_length} samples: "
        f"{schedule.iterations} iterations, {schedule.steps} optimizer steps",
        f"model       {config.model_type}, prompt {config.prompt}, --train {config.train}: "
        f"{trainable / 1e6:.2f} M parameters train, {frozen / 1e6:.2f} M are frozen",
        f"device      {net.device}, {precision}{', compiled' * bool(net.compiled_decode)}, "
        f"{config.num_workers} data workers",
        f"results     {experiment.folder}",
    ]
    if train_set.n_cache_slots:
        size = runtime.local_world_size() * pool_spec(train_set.n_cache_slots, net).size
        lines.append(
            f"embeddings  {size / MIB:.0f} MiB on disk until the end; each composite is used in "
            f"{config.embedding_reuse} epoch(s), each photo without augmentation in all"
        )
    return "\n".join(lines)


def save_state(run: Run) -> None:
    """Save what `--resume` needs. Every process must call this."""
    sam, experiment = run.experiment.net.sam, run.experiment
    unfinished = gradients(sam) if run.schedule.is_mid_step(run.state.iteration) else {}
    runtime.all_reduce_sum(unfinished.values())
    if not runtime.is_main():
        return
    run.logger.flush()
    resume_state: ResumeState = {
        "train_state": run.state.state_dict(),
        "weights": trained_weights(sam),
        "gradients": unfinished,
        "flags": run.config.flags(),
        "config": experiment.data.model_dump_json(),
        "files": file_digests(experiment.datasets),
        "world_size": runtime.world_size(),
    }
    checkpoint.save_resume_state(resume_state, experiment.folder / RESUME_FILE)


def save_checkpoint(experiment: Experiment, name: str) -> None:
    if runtime.is_main():
        state_dict = export_state_dict(experiment.net.sam, experiment.initial_state_dict)
        checkpoint.save_weights(state_dict, experiment.checkpoints / name)


def remove_old_checkpoints(folder: Path, keep: int | None) -> None:
    """Remove the checkpoints of epochs except for the last `keep`."""
    if keep and runtime.is_main():
        by_epoch = sorted(folder.glob("epoch_*.pth"), key=lambda path: int(path.stem.removeprefix("epoch_")))
        for path in by_epoch[:-keep]:
            path.unlink()


# --- Training ---------------------------------------------------------------------------------


def train(run: Run) -> None:
    """The training loop. It ends early, with its state saved, once `run.stop` notes a signal."""
    config, experiment, schedule, state = run.config, run.experiment, run.schedule, run.state
    net, train_set, parameters = experiment.net, experiment.train_set, state.parameters
    optimizer, scaler, loss_weights, logger = state.optimizer, state.scaler, config.loss_weights, run.logger
    first_iteration, spec = state.iteration + 1, train_set.spec
    throughput, since_save = Throughput(), Timer()
    batches = training_batches(
        train_set,
        net,
        folder=experiment.folder,
        batch_size=schedule.batch_size,
        epochs=schedule.epochs,
        start=state.iteration,
        num_workers=config.num_workers,
    )
    for batch in batches:
        batch_index = state.iteration % schedule.batches_per_epoch

        # learning rates of this optimizer step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                state.step,
                total_steps=schedule.steps,
                peak=group["peak_lr"],
                warmup=config.warmup_steps,
                power=config.lr_power,
            )

        # forward
        logits, iou_pred = net.decode(batch["embedding"], batch["points"], batch["labels"])
        valid = valid_pixels(batch["size"], spec.mask_grid, spec.mask_grid / spec.img_size)
        losses = sum_losses(
            logits,
            iou_pred,
            batch["target"],
            valid,
            alpha=config.alpha,
            gamma=config.gamma,
            with_cldice="cldice" in loss_weights,
        )
        total = torch.stack([loss_weights[name] * loss for name, loss in losses.items()]).sum()

        # backward; losses are sums over samples, so every sample of the step weighs the same
        state.is_consistent = not schedule.is_mid_step(state.iteration)  # if this fails
        scaler.scale(total / schedule.samples_in_step(batch_index)).backward()
        state.is_consistent = False

        # optimizer step, after its last batch
        if schedule.ends_step(batch_index):
            runtime.all_reduce_gradients(parameters)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            is_finite = bool(norm.isfinite())
            is_overflow = not is_finite and state.can_lower_scale()
            if is_finite:
                optimizer.step()  # `scaler.step` would look for numbers that are not finite once more
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if not is_overflow:  # this step is repeated with the next samples and a lower scale
                state.count_step(is_finite)
            if state.bad_steps_in_a_row >= config.max_bad_steps:
                raise UserError(bad_steps_message(state, experiment, batch))

        # count; log at intervals, because reading the losses waits for the device
        samples = schedule.samples_in_batch(batch_index)
        losses = {name: loss.detach() for name, loss in losses.items()}
        runtime.all_reduce_sum(losses.values())
        state.count_iteration(losses, samples)
        throughput.count(samples, batch["data_wait"])
        logger.bar.update()
        if is_log := state.iteration % config.log_interval == 0 or run.is_last:
            logger.training(training_scalars(state, loss_weights) | throughput.rates(), state.iteration)
        if is_log or state.iteration == first_iteration:  # the first iteration warms up: it is not timed
            throughput.restart()

        # test and save; this time is not part of images per second
        with throughput.paused():
            saves_weights = finish_iteration(run)
            is_due = since_save.seconds() >= 60 * config.resume_interval
            signal, save_now = runtime.all_reduce_max([run.stop.signal or 0, int(is_due)])
            if saves_weights or save_now or signal:
                save_state(run)
                since_save.restart()
            if run.is_test and logger.enabled:  # reads files again, so the state is saved first
                logger.training_panels(train_panels(net, train_set, batch, logits), state.iteration)
        if signal:
            run.stop.signal = signal
            return


def finish_iteration(run: Run) -> bool:
    """Test after the current iteration and save checkpoints, where they are due; returns whether any was.

    A run that stops in here finishes the iteration when it is resumed.
    """
    config, experiment, state, logger = run.config, run.experiment, run.state, run.logger
    if run.is_test and experiment.test_set and state.last_test != state.iteration:
        metrics = run_test(experiment.net, run.tests, config.batch_size, state.iteration, logger, run.stop)
        state.last_test = state.iteration
        is_best = state.best is None or metrics["iou"] > state.best["iou"]
        if is_best and state.has_finite_weights():
            state.best = metrics
            logger.best(metrics, state.iteration)
            save_checkpoint(experiment, "best.pth")
    epoch, batch_index = divmod(state.iteration, run.schedule.batches_per_epoch)
    is_save = batch_index == 0 and epoch % config.save_interval == 0
    if is_save:
        save_checkpoint(experiment, f"epoch_{epoch:04d}.pth")
        remove_old_checkpoints(experiment.checkpoints, config.keep_last)
    if run.is_last:
        save_checkpoint(experiment, "last.pth")
    state.is_finished = True
    return run.is_test or is_save


def training_scalars(state: TrainState, loss_weights: dict[str, float]) -> dict[str, float]:
    """Mean losses since the last log, and the rest that `train/` shows."""
    means = state.take_mean_losses()
    scalars = {
        "loss": sum(loss_weights[name] * mean for name, mean in means.items()),
        **means,
        "lr": state.optimizer.param_groups[0]["lr"],
        "bad_steps": state.bad_steps,
    }
    if state.device.type == "cuda":
        scalars["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return scalars


def bad_steps_message(state: TrainState, experiment: Experiment, batch: TrainBatch) -> str:
    """Why a run ends whose losses or gradients are not finite."""
    datasets, best = experiment.train_set.datasets, experiment.checkpoints / "best.pth"
    names = sorted({str(datasets[key.dataset].pairs[key.pair].image_path) for key in batch["keys"]})
    return (
        f"iteration {state.iteration + 1}: the loss or its gradient was not finite in "
        f"{state.bad_steps_in_a_row} steps in a row (--max_bad_steps); "
        f"the last batch holds {', '.join(names)}; "
        f"the best weights so far are {f'in {best}' if state.best else 'not saved'}; a lower --lr may help"
    )


def run_training(config: TrainConfig, experiment: Experiment, stop: runtime.StopRequest) -> None:
    """Train. If an error ends the training, save the state of the last iteration and raise the error.

    Nothing is saved with several processes, or after an error amid an optimizer step.
    """
    run = start(config, experiment, stop)
    state, logger = run.state, run.logger
    try:
        if experiment.test_set and not state.iteration and state.baseline is None:
            state.baseline = run_test(experiment.net, run.tests, config.batch_size, 0, logger, stop)
        if not state.is_finished:
            finish_iteration(run)
        train(run)
    except Exception:
        save_last_state(run)
        raise
    finally:
        logger.bar.close()
    logger.print(result_summary(state.baseline, state.best, experiment.checkpoints))
    logger.close()


def save_last_state(run: Run) -> None:
    """Save the state of the last iteration, if it is whole, before an error is raised further."""
    # Several processes do not fail in the same iteration, and saving needs all of them.
    if not run.state.iteration or not run.state.is_consistent or runtime.world_size() > 1:
        return
    try:
        save_state(run)
    except UserError as error:  # the disk is full, for example
        print(f"error: {error}", file=sys.stderr)


# --- Command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 if the run failed; 2 if nothing was started, for a mistake that the user can mend; 128 + n
    after signal n. A bug raises, and shows its traceback.
    """
    runtime.init()
    config = parse_args(argv)
    try:
        if config.preview:
            preview(config)
            return 0
        experiment = prepare(config)
        runtime.barrier()
    except Exception as error:
        message = runtime.user_message(error, MEMORY_HINT)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    code = 1
    try:
        code = train_to_exit_code(config, experiment)
    finally:
        runtime.end_data_workers()
        runtime.leave_process_group()
        if code:
            print_resume_hint(config)
    return code


def train_to_exit_code(config: TrainConfig, experiment: Experiment) -> int:
    """Train; returns what `main` does. A bug raises."""
    stop = runtime.StopRequest()
    try:
        with stop:
            run_training(config, experiment, stop)
    except (
        runtime.Stopped,
        KeyboardInterrupt,
    ):  # the latter after a second signal, which ends the run at once
        stop.signal = stop.signal or SIGINT
    except Exception as error:
        message = runtime.user_message(error, MEMORY_HINT)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 128 + stop.signal if stop.signal else 0


def print_resume_hint(config: TrainConfig) -> None:
    """Say how an interrupted run continues."""
    state = config.folder / RESUME_FILE
    if runtime.is_main() and state.exists():
        print(
            f"the last state is in {state}; to continue from it, run the same command with "
            f"--exp_name {config.exp_name} --resume",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
