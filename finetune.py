"""Fine-tune the Segment Anything Model to segment deformable linear objects (cables, wires, ropes).

    python finetune.py --config configs/demo.yaml --exp_name demo

The YAML file describes the data, the flags describe the training. See README.md.
"""

import sys

from base.flag_types import answer_first
from train_config import ARGS_FILE, TrainConfig, parse_args, read_flags

if __name__ == "__main__":
    answer_first(read_flags, ("config", "checkpoint"))

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import SIGINT

import torch
from torch import Tensor, nn

import checkpoint
import resume
import runtime
from base.errors import UserError
from console import bad_steps_message, result_summary, shell_command, start_summary, tool_command
from dataset_index import file_digests
from disk_space import warn_of_disk_space
from embeddings import EncodedTestSample, TrainBatch, encode_test_set, training_batches
from evaluation import run_test, train_panels, training_cable_width
from experiment import Experiment, make_folder, prepare, preview
from losses import sum_losses
from report import write_report
from resume import LOCK_FILE, RESUME_FILE, ResumeState
from run_logger import RunLogger, remove_logs
from sam.encoder import valid_pixels
from sam.trainable import (
    export_state_dict,
    gradients,
    load_gradients,
    load_trained_weights,
    trained_weights,
)
from sidecar import Sidecar, write_sidecar
from timing import Budget, Throughput, Timer
from train_state import Schedule, TrainState, learning_rate, prepare_optimizer

MEMORY_HINT = (
    "a smaller --batch_size (with a larger --virtual_batch_size), --amp bf16, a smaller --model_type, "
    "or --grad_checkpointing where the encoder trains, need less"
)

# --- Start and state ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run under way: its settings, model and data, its state, its logs, and the request to stop it."""

    config: TrainConfig
    experiment: Experiment
    state: TrainState
    logger: RunLogger
    stop: runtime.StopRequest
    tests: list[EncodedTestSample]
    budget: Budget

    @property
    def schedule(self) -> Schedule:
        """The schedule, with the number of epochs of `--minutes` once it is known."""
        schedule = self.experiment.schedule
        return replace(schedule, epochs=self.state.epochs) if self.state.epochs else schedule

    @property
    def is_out_of_patience(self) -> bool:
        """Whether `--patience` tests in a row brought no gain, so that the run ends."""
        return self.state.tests_without_gain >= (self.config.patience or math.inf)

    @property
    def is_last(self) -> bool:
        """Whether the current iteration is the last one."""
        return self.state.iteration == self.schedule.iterations or self.is_out_of_patience

    @property
    def is_test(self) -> bool:
        """Whether the current iteration ends with a test."""
        return self.is_last or self.state.iteration % self.config.test_interval == 0


def start(config: TrainConfig, experiment: Experiment, stop: runtime.StopRequest) -> Run:
    """Make trainable what trains, load the state to resume if there is one, and open the folder."""
    net, resume_state, train_set = experiment.net, experiment.resume_state, experiment.train_set
    encoding = experiment.schedule.batches_per_epoch if train_set.n_cache_slots else 0
    budget = Budget(config.minutes, encoding)
    torch.manual_seed(config.seed)
    state = TrainState(
        prepare_optimizer(net.sam, config),
        torch.amp.GradScaler(net.device.type, enabled=net.low_precision is torch.float16),
        {name: torch.zeros((), device=net.device) for name in config.loss_weights},
    )
    if resume_state:
        load_state(config, experiment, state, resume_state)
    if net.compiled_decode:
        net.sam.image_encoder.compile(dynamic=False)
    logger = open_logger(config, experiment, state)
    runtime.barrier()
    tests: list[EncodedTestSample] = []
    if experiment.test_set:
        tests = encode_test_set(
            experiment.test_set,
            net,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            stop=stop,
        )
    if runtime.is_main() and state.cable_width is None:
        state.cable_width = training_cable_width(experiment.train_set)
    return Run(config, experiment, state, logger, stop, tests, budget)


def load_state(
    config: TrainConfig, experiment: Experiment, state: TrainState, resume_state: ResumeState
) -> None:
    """Load the state to resume into `state`, the model and the folder of the run."""
    net = experiment.net
    resume.check_same_weights(
        resume_state,
        initial_weights=experiment.initial_weights,
        precision=str(net.low_precision),
        trained=trained_weights(net.sam),
        path=config.checkpoint or Path("the published weights"),
    )
    load_trained_weights(net.sam, resume_state["weights"])
    state.load_state_dict(resume_state["train_state"])
    if runtime.is_main():
        load_gradients(net.sam, resume_state["gradients"])  # the sum over all processes
        best_iteration = int(state.best["iteration"]) if state.best else None
        checkpoint.restore_best(experiment.checkpoints, best_iteration)


def open_logger(config: TrainConfig, experiment: Experiment, state: TrainState) -> RunLogger:
    """Open the logs, write the settings, and say what is about to run."""
    is_main, resumed = runtime.is_main(), experiment.resume_state is not None
    if is_main and not resumed:
        remove_logs(experiment.folder)  # of a run that died before its first state
    logger = RunLogger(
        experiment.folder,
        iterations=None if is_unmeasured(config, state) else experiment.schedule.iterations,
        done=state.iteration,
        resumed=resumed,
        enabled=is_main,
    )
    flags = config.flags()
    logger.settings(flags, json.loads(experiment.data.model_dump_json()), state.iteration)
    logger.print(start_summary(experiment, is_unmeasured(config, state)))
    if resumed:
        logger.print(f"resumed     after iteration {state.iteration}")
    elif config.resume:
        logger.print("resumed     from the start: the run had saved no state")
    return logger


def is_unmeasured(config: TrainConfig, state: TrainState) -> bool:
    """Whether the run has as many epochs as fit into `--minutes`, and this number is not known yet."""
    return config.minutes is not None and state.epochs is None


def save_state(run: Run) -> None:
    """Save what `--resume` needs. Every process must call this."""
    sam, experiment = run.experiment.net.sam, run.experiment
    unfinished = gradients(sam) if run.schedule.is_mid_step(run.state.iteration) else {}
    runtime.all_reduce_sum(unfinished.values())
    run.state.has_saved = True
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
        "initial_weights": experiment.initial_weights,
        "precision": str(experiment.net.low_precision),
        "world_size": runtime.world_size(),
    }
    resume.save_resume_state(resume_state, experiment.folder / RESUME_FILE)
    checkpoint.remove_kept_best(experiment.checkpoints)


def save_checkpoint(run: Run, name: str) -> None:
    """Save the weights and their sidecar. Every process must call this."""
    if not run.state.has_saved:  # a run with weights and without a state could not be resumed
        save_state(run)
    if runtime.is_main():
        path = run.experiment.checkpoints / name
        state_dict = export_state_dict(run.experiment.net.sam, run.experiment.initial_state_dict)
        checkpoint.save_weights(state_dict, path)
        write_sidecar(describe_checkpoint(run), path)


def describe_checkpoint(run: Run) -> Sidecar:
    """What is known of the weights as they are now."""
    config, experiment, metrics = run.config, run.experiment, run.state.last_metrics or {}
    test_set = experiment.test_set
    return Sidecar(
        model_type=config.model_type,
        input_size=experiment.net.spec.img_size,
        train=config.train,
        prompt=config.prompt,
        iteration=run.state.iteration,
        threshold=metrics.get("threshold", 0.0),
        cable_width=run.state.cable_width,
        metrics=metrics,
        flags=config.flags(),
        data={
            "train": [dataset.summary() for dataset in experiment.train_set.datasets],
            "test": test_set.dataset.summary() if test_set else None,
        },
    )


# --- Training ---------------------------------------------------------------------------------


def train(run: Run) -> None:
    """The training loop. It ends early, with its state saved, once `run.stop` notes a signal."""
    config, experiment, schedule, state = run.config, run.experiment, run.schedule, run.state
    first_iteration, throughput, since_save = state.iteration + 1, Throughput(), Timer()
    batches = training_batches(
        experiment.train_set,
        experiment.net,
        folder=experiment.folder,
        batch_size=schedule.batch_size,
        epochs=schedule.epochs,
        start=state.iteration,
        num_workers=config.num_workers,
    )
    for batch in batches:
        batch_index = state.iteration % schedule.batches_per_epoch
        samples = schedule.samples_in_batch(batch_index)

        # forward and backward; the optimizer steps after the last batch of its step
        set_learning_rates(run)
        logits, losses = compute_losses(run, batch)
        add_gradients(run, losses, samples_in_step=schedule.samples_in_step(batch_index))
        if schedule.ends_step(batch_index):
            step_optimizer(run, batch)

        # count; log at intervals, because reading the losses waits for the device
        count_iteration(run, losses, samples)
        throughput.count(samples, batch["data_wait"])
        epochs = measured_epochs(run, state.iteration - first_iteration + 1)
        if is_log := state.iteration % config.log_interval == 0 or run.is_last:
            scalars = training_scalars(state, config.loss_weights)
            run.logger.training(scalars | throughput.rates(), state.iteration)
        if is_log or state.iteration == first_iteration:  # the first iteration warms up: it is not timed
            throughput.restart()

        # test and save; this time is not part of images per second
        with throughput.paused(), run.budget.paused():
            finish_iteration(run)
            if run.is_test and run.logger.enabled:
                panels = train_panels(experiment.net, experiment.train_set, batch, logits)
                run.logger.training_panels(panels, state.iteration)
            signal = save_if_due(run, since_save, epochs)
        if signal or run.is_last:
            return


def set_learning_rates(run: Run) -> None:
    """Set the learning rates of the current optimizer step."""
    for group in run.state.optimizer.param_groups:
        group["lr"] = learning_rate(
            run.state.step,
            total_steps=run.schedule.steps,
            peak=group["peak_lr"],
            warmup=run.config.warmup_steps,
            power=run.config.lr_power,
        )


def compute_losses(run: Run, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a batch, and its losses by name, each summed over samples."""
    config, net, spec = run.config, run.experiment.net, run.experiment.train_set.spec
    logits, iou_pred = net.decode(batch["embedding"], batch["points"], batch["labels"])
    losses = sum_losses(
        logits,
        iou_pred,
        batch["target"],
        valid_pixels(batch["size"], spec.mask_grid, spec.mask_grid / spec.img_size),
        alpha=config.alpha,
        gamma=config.gamma,
        with_cldice="cldice" in config.loss_weights,
    )
    return logits, losses


def add_gradients(run: Run, losses: dict[str, Tensor], samples_in_step: int) -> None:
    """Add the gradients of a batch to those of its optimizer step.

    Losses are sums over samples, so every sample of the step weighs the same.
    """
    state, weights = run.state, run.config.loss_weights
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    state.is_consistent = not run.schedule.is_mid_step(state.iteration)  # a failure would mix gradients
    state.scaler.scale(total / samples_in_step).backward()
    state.is_consistent = False


def step_optimizer(run: Run, batch: TrainBatch) -> None:
    """Change the weights by the gradients of all processes, unless these are not finite.

    batch: the last one of the step. Raises UserError after `--max_bad_steps` bad steps in a row.
    """
    state, config = run.state, run.config
    runtime.all_reduce_gradients(state.parameters)
    state.scaler.unscale_(state.optimizer)
    is_finite = bool(nn.utils.clip_grad_norm_(state.parameters, config.grad_clip).isfinite())
    is_overflow = not is_finite and state.can_lower_scale()
    if is_finite:
        state.optimizer.step()  # `scaler.step` would look for numbers that are not finite once more
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if not is_overflow:  # this step is repeated with the next samples and a lower scale
        state.count_step(is_finite)
    if state.bad_steps_in_a_row >= config.max_bad_steps:
        raise UserError(bad_steps_message(state, run.experiment, batch))


def count_iteration(run: Run, losses: dict[str, Tensor], samples: int) -> None:
    """Count an iteration with the losses of all processes."""
    losses = {name: loss.detach() for name, loss in losses.items()}
    runtime.all_reduce_sum(losses.values())
    run.state.count_iteration(losses, samples)
    run.logger.bar.update()


def save_if_due(run: Run, since_save: Timer, epochs: int) -> int:
    """Save the state if it is due, after a signal and at the end; returns the signal of any process, else 0.

    epochs: how many the run has, if process 0 has just measured it; else 0.
    """
    is_due = since_save.seconds() >= 60 * run.config.resume_interval
    signal, save_now, epochs = runtime.all_reduce_max([run.stop.signal or 0, int(is_due), epochs])
    if epochs:
        fix_epochs(run, epochs)
    if save_now or signal or run.is_last or epochs:
        save_state(run)
        since_save.restart()
    if signal:
        run.stop.signal = signal
    return signal


def measured_epochs(run: Run, done: int) -> int:
    """How many epochs fit into `--minutes`, in process 0 and only once; else 0.

    done: iterations of this process.
    """
    if run.state.epochs or not runtime.is_main():
        return 0
    return run.budget.epochs(done, run.state.iteration, run.schedule, run.config.test_interval)


def fix_epochs(run: Run, epochs: int) -> None:
    """Fix the number of epochs of a run of `--minutes`. A resumed run keeps it."""
    run.state.epochs = epochs
    iterations = run.schedule.iterations
    run.logger.bar.total = iterations
    run.logger.print(f"--minutes {run.config.minutes:g}: {epochs} epochs fit, {iterations} iterations")
    if runtime.is_main():
        warn_of_disk_space(run.config, run.experiment.net, epochs)


def finish_iteration(run: Run) -> None:
    """Test after the current iteration and save weights, where that is due.

    A run that stops in here finishes the iteration when it is resumed.
    """
    config, experiment, state, logger = run.config, run.experiment, run.state, run.logger
    if run.is_test and experiment.test_set and state.last_test != state.iteration:
        metrics = test_model(run)
        state.last_test, state.last_metrics = state.iteration, metrics
        is_gain = state.best is None or metrics["iou"] > state.best["iou"]
        state.tests_without_gain = 0 if is_gain else state.tests_without_gain + 1
        # As long as nothing is found, the later weights are better: they have learned more.
        finds_nothing_yet = state.best is not None and state.best["iou"] == metrics["iou"] == 0
        if (is_gain or finds_nothing_yet) and state.has_finite_weights():
            if state.best and runtime.is_main():
                checkpoint.keep_best(experiment.checkpoints, int(state.best["iteration"]))
            state.best = metrics
            logger.best(metrics, state.iteration)
    if state.best is not None and state.best["iteration"] == state.iteration:
        save_checkpoint(run, checkpoint.BEST_FILE)
    epoch, batch_index = divmod(state.iteration, run.schedule.batches_per_epoch)
    if batch_index == 0 and epoch % config.save_interval == 0:
        save_checkpoint(run, f"epoch_{epoch:04d}.pth")
        if config.keep_last and runtime.is_main():
            checkpoint.remove_old_checkpoints(experiment.checkpoints, config.keep_last)
    if run.is_last:
        save_checkpoint(run, checkpoint.LAST_FILE)
    state.is_finished = True


def test_model(run: Run) -> dict[str, float]:
    """Test the model as it is now, and log the result."""
    return run_test(
        run.experiment.net,
        run.tests,
        batch_size=run.config.batch_size,
        num_threads=max(1, run.config.num_workers),
        iteration=run.state.iteration,
        logger=run.logger,
        stop=run.stop,
    )


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


def run_training(config: TrainConfig, experiment: Experiment, stop: runtime.StopRequest) -> None:
    """Train in the folder of the run, and keep other processes out of it."""
    if not runtime.is_main():
        train_to_the_end(config, experiment, stop)
        return
    with resume.locked(experiment.folder):
        train_to_the_end(config, experiment, stop)


def train_to_the_end(config: TrainConfig, experiment: Experiment, stop: runtime.StopRequest) -> None:
    """Train. If an error ends the training, save the state of the last iteration and raise the error.

    Nothing is saved with several processes, or after an error in the middle of an optimizer step.
    """
    run = start(config, experiment, stop)
    state, logger = run.state, run.logger
    try:
        if experiment.test_set and not state.iteration and state.baseline is None:
            before = run.budget.elapsed.seconds()
            state.baseline = test_model(run)
            run.budget.test_seconds = run.budget.elapsed.seconds() - before
        if not state.is_finished:
            finish_iteration(run)
            save_state(run)  # so that a run that is killed soon does not log this iteration twice
        if not run.is_last:
            train(run)
    except Exception as error:
        save_last_state(run, error)
        write_report(experiment, state.iteration, is_done=False, with_samples=False)
        raise
    finally:
        logger.bar.close()
    write_report(experiment, state.iteration, run.is_last)
    if run.is_out_of_patience:
        logger.print(f"the last {state.tests_without_gain} tests brought no gain: --patience ends the run")
    images = experiment.dataset_to_predict.config.data_dir / "imgs"
    logger.print(result_summary(state.baseline, state.best, experiment.folder, images, config.prompt))
    logger.close()


def save_last_state(run: Run, reason: Exception) -> None:
    """Save the state of the last iteration, if it is whole, before the error `reason` is raised further."""
    # Several processes do not fail in the same iteration, and saving needs all of them.
    if not run.state.iteration or not run.state.is_consistent or runtime.world_size() > 1:
        return
    try:
        save_state(run)
    except UserError as error:  # the disk is full, for example
        if str(error) != str(reason):
            print(f"error: {error}", file=sys.stderr)


# --- Command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 if the run failed; 2 if nothing was started, for a mistake that the user can correct; 128 + n
    after signal n. A bug raises, and shows its traceback.
    """
    runtime.init()
    config = parse_args(argv)
    try:
        with runtime.interrupt_on_signals():
            if config.preview:
                preview(config)
                return 0
            experiment = prepare(config)
            runtime.barrier()
            runtime.from_main(partial(make_folder, experiment))
    except runtime.Interrupted as signal:
        if runtime.is_main():
            print(f"{signal.name}: nothing was trained", file=sys.stderr)
        return signal.exit_code
    except Exception as error:
        print_error(error)
        return 2
    code = 1
    try:
        code = train_to_exit_code(experiment.config, experiment)
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
    except (runtime.Stopped, KeyboardInterrupt):  # the latter after a second signal
        stop.signal = stop.signal or SIGINT
    except Exception as error:
        print_error(error)
        return 1
    return 128 + stop.signal if stop.signal else 0


def print_error(error: Exception) -> None:
    """Print the message of an error that the user can correct, unless process 0 does. Raises a bug."""
    message = runtime.user_message(error, MEMORY_HINT)
    if message is None:
        raise error
    if not isinstance(error, runtime.ShownByMain):
        print(f"error: {message}", file=sys.stderr)


def print_resume_hint(config: TrainConfig) -> None:
    """Say how an interrupted run continues, unless a lock file says that another process trains it."""
    if not runtime.is_main() or (config.folder / LOCK_FILE).exists():
        return
    state = config.folder / RESUME_FILE
    where = f"the last state is in {state}" if state.exists() else "no state was saved yet"
    flags = ("--exp_name", config.exp_name, "--resume")
    command = tool_command("finetune.py", *flags, processes=runtime.local_world_size())
    if not (config.folder / ARGS_FILE).exists():
        command = f"run the same command with {shell_command(*flags)}"
    print(f"{where}; to continue: {command}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
