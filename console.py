"""The texts of a run: the table of its data, its summaries, an error message, the commands that come next."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from base.atomic import MIB
from checkpoint import BEST_FILE, LAST_FILE
from dataset_index import DatasetIndex
from embeddings import TrainBatch, pool_spec
from experiment import Experiment
from imaging.files import first_few
from train_state import TrainState

REPORT_FILE = "report.html"  # see report.py

# --- Data -------------------------------------------------------------------------------------


def dataset_table(train: list[DatasetIndex], test: DatasetIndex | None) -> str:
    """One line for each dataset: pairs, foreground of the masks, backgrounds, augmentation, percentage.

    Below each line follow the notes of the dataset, see `DatasetIndex.notes`.
    """
    columns = f"{'pairs':>6} {'foreground':>11} {'backgrounds':>12} {'augmented':>10} {'percentage':>11}"
    lines = [f"{'dataset':40} {columns}"]
    for dataset in [*train, *([test] if test else [])]:
        config = dataset.config
        name = f"{'test' if dataset is test else 'train'} {_shorten(str(config.data_dir), 34)}"
        lines.append(
            f"{name:40} {len(dataset.pairs):6} {dataset.foreground:11.2%} {len(dataset.backgrounds):12} "
            f"{config.w_aug!s:>10} {config.percentage:11g}"
        )
        lines += [f"  {note}" for note in dataset.notes()]
    return "\n".join(lines)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[3 - length :]


# --- Summaries --------------------------------------------------------------------------------

EMPTY_IOU = 5e-5  # a test IoU that shows as 0.0000
EMPTY_HINT = (
    "warning: the predictions are empty or contain no cable (test IoU 0.0000); train longer (--epoch_num) "
    "or with --train encoder, and check the data with --preview"
)
# A mask of the whole image has a recall of 1 and the share of cable as its precision.
FULL_RECALL, FULL_PRECISION = 0.97, 0.2
FULL_HINT = (
    "warning: the predictions cover nearly the whole image; train for more epochs (--epoch_num) or with "
    "--train encoder, and check the data with --preview"
)


def start_summary(experiment: Experiment, is_unmeasured: bool) -> str:
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


def result_summary(
    baseline: dict[str, float] | None,
    best: dict[str, float] | None,
    folder: Path,
    images: Path,
    prompt: str = "none",
) -> str:
    """The closing lines of a run: baseline against best, where the files are, and how to predict `images`.

    prompt: the flag `--prompt` of the training.
    """
    best_weights, last_weights = (folder / "checkpoints" / name for name in (BEST_FILE, LAST_FILE))
    lines = []
    if baseline and best:
        lines += [
            f"baseline -> fine-tuned: IoU {baseline['iou']:.4f} -> {best['iou']:.4f}, "
            f"Dice {baseline['dice']:.4f} -> {best['dice']:.4f} (best at iteration {best['iteration']})",
            f"best weights     {best_weights}",
        ]
        if best["iou"] < EMPTY_IOU:
            lines.append(EMPTY_HINT)
        if best.get("recall", 0) > FULL_RECALL and best.get("precision", 1) < FULL_PRECISION:
            lines.append(FULL_HINT)
    if last_weights.exists():
        lines.append(f"last weights     {last_weights}")
    lines.append(f"report           {folder / REPORT_FILE}")
    lines.append(f"curves           {shell_command('tensorboard', '--logdir', folder)}")
    weights = next((path for path in (best_weights, last_weights) if path.exists()), None)
    if weights:
        flags = ("--checkpoint", weights, "--input", images, "--output", Path("predictions") / folder.name)
        lines.append(f"next             {tool_command('predict.py', *flags, *prompt_flags(prompt))}")
        if prompt_flags(prompt):
            lines.append(f"{'':17}FILE: points or boxes of the images, as in docs/prediction.md#prompts")
    return "\n".join(lines)


def bad_steps_message(state: TrainState, experiment: Experiment, batch: TrainBatch) -> str:
    """Why a run ends whose losses or gradients are not finite."""
    datasets, best = experiment.train_set.datasets, experiment.checkpoints / BEST_FILE
    names = sorted({str(datasets[key.dataset].pairs[key.pair].image_path) for key in batch["keys"]})
    return (
        f"iteration {state.iteration + 1}: the loss or its gradient was not finite in "
        f"{state.bad_steps_in_a_row} steps in a row (--max_bad_steps); a lower --lr may help\n"
        f"the last batch holds {first_few(names)}; best weights: {best if state.best else 'none were saved'}"
    )


# --- Commands ---------------------------------------------------------------------------------


def prompt_flags(prompt: str) -> tuple[str, ...]:
    """What predict.py also needs after a training with this `--prompt`; the user must write the file."""
    return ("--prompt", "FILE") if prompt in ("point", "box") else ()


def tool_command(script: str, *arguments: str | Path, processes: int = 1) -> str:
    """The command line to paste into a shell, which runs a script of this tool in the current directory."""
    python = "python" if shutil.which("python") == sys.executable else Path(sys.executable)
    start = [python] if processes == 1 else ["torchrun", f"--nproc_per_node={processes}"]
    return shell_command(*start, Path(__file__).parent / script, *arguments)


def shell_command(*parts: str | Path) -> str:
    """A command line, quoted where a shell needs it. Paths below the current directory are relative to it."""
    here = Path.cwd()
    texts = [
        str(part.relative_to(here)) if isinstance(part, Path) and part.is_relative_to(here) else str(part)
        for part in parts
    ]
    return shlex.join(texts) if os.name == "posix" else subprocess.list2cmdline(texts)
