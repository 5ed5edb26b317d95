"""The report of a run: from its folder to one HTML file that needs no server, network or JavaScript."""

import base64
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator

import runtime
from base.atomic import write_atomically
from base.errors import UserError
from checkpoint import BEST_FILE, LAST_FILE
from console import EMPTY_HINT, EMPTY_IOU, REPORT_FILE, dataset_table, prompt_flags, tool_command
from experiment import Experiment, with_test_interval
from imaging.media import encode_image
from imaging.metrics import THRESHOLDS
from imaging.visualize import LEGEND
from preview import render_sample
from run_logger import LAST_TEST_FILE, METRICS_FILE, printable
from sidecar import Sidecar, read_sidecar
from train_config import parse_args

N_SAMPLES = 6  # training samples that are shown
MAX_POINTS = 200  # of a curve; more are averaged
MAX_DOTS = 30  # points of a curve that are marked each

# Curves in blue and orange (Okabe and Ito, 2008), which stay apart with color vision deficiencies.
CURVES = (("#0072b2", "none"), ("#d55e00", "7 3"))  # color and dashes

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto; padding: 1rem;
       max-width: 70rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #bbb; }
.result { overflow-wrap: anywhere; font-size: 1.3rem; font-weight: 600; margin: .5rem 0; }
.note { color: #555; margin: .3rem 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0 0 1rem; break-inside: avoid; }
figcaption { overflow-wrap: anywhere; margin: .2rem 0; }
.pair { display: grid; gap: .3rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.wide { gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
img, svg { width: 100%; height: auto; display: block; }
.wrapped { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f3f3f3; padding: .6rem; font-size: .85rem; }
.columns { columns: 20rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border: 1px solid #ccc; padding: .15rem .6rem; text-align: left; overflow-wrap: anywhere; }
.key { display: inline-block; width: .9em; height: .9em; border: 1px solid #333; vertical-align: -.1em; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


class TestScores(BaseModel):
    """What the report takes of a line of METRICS_FILE."""

    iteration: int
    iou: float
    cldice: float


class ShownTest(BaseModel):
    """An image of the last test: JPEG files in base 64 of it and of what was found in it."""

    name: str
    iou: float
    role: str
    images: tuple[str, str]


class LastTest(BaseModel):
    """The content of LAST_TEST_FILE; see `run_logger`. `iou_by_threshold` is at THRESHOLDS."""

    iteration: int
    count: int
    threshold: float
    iou_by_threshold: Annotated[list[float], Field(min_length=len(THRESHOLDS), max_length=len(THRESHOLDS))]
    images: list[ShownTest]


@dataclass(frozen=True)
class Records:
    """What the folder of a run holds.

    last_test: None without a test.
    losses: (iteration, training loss).
    best: the sidecar of the best checkpoint, or None without one.
    """

    tests: list[TestScores]
    last_test: LastTest | None
    losses: list[tuple[float, float]]
    best: Sidecar | None


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(model: type[Parsed], text: bytes, where: str) -> Parsed | None:
    """Parse JSON as `model`; None, with a warning that names `where`, if it does not fit."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        fault = f"{key}: {first['msg']}" if key else first["msg"]
        warnings.warn(f"the report leaves out {where}: {fault}", stacklevel=2)
        return None


def read_records(folder: Path, model_type: str) -> Records:
    """Read the logs of a run. What is damaged is left out with a warning. Raises OSError."""
    tests_path, last_path = folder / METRICS_FILE, folder / LAST_TEST_FILE
    lines = tests_path.read_bytes().splitlines() if tests_path.exists() else []
    parsed = [parse(TestScores, line, f"line {n} of {tests_path}") for n, line in enumerate(lines, 1)]
    tests = [scores for scores in parsed if scores is not None]
    last_test = parse(LastTest, last_path.read_bytes(), str(last_path)) if last_path.exists() else None
    best = read_sidecar(folder / "checkpoints" / BEST_FILE, model_type)
    kept = {SCALARS: 0, IMAGES: 1, TENSORS: 1}  # 0: all
    events = EventAccumulator(str(folder), size_guidance=kept).Reload()
    has_losses = "train/loss" in events.Tags()[SCALARS]
    losses = events.Scalars("train/loss") if has_losses else []
    # Events of two files are not in order.
    return Records(tests, last_test, sorted((float(e.step), e.value) for e in losses), best)


def write_report(experiment: Experiment, iteration: int, is_done: bool, with_samples: bool = True) -> None:
    """Write REPORT_FILE in the folder of a run; only process 0 does. A failure is a warning.

    Args:
        iteration: how many iterations the run has done.
        is_done: whether these are all.
        with_samples: whether to show training samples. After an error, their files may be out of reach.
    """
    if not runtime.is_main():
        return
    path = experiment.folder / REPORT_FILE
    try:
        records = read_records(experiment.folder, experiment.config.model_type)
        page = render(experiment, records, iteration, is_done, with_samples)
        write_atomically(path, lambda file: file.write(page.encode()))
    except (UserError, OSError, ValueError) as error:
        warnings.warn(f"the report {path} was not written: {error}", stacklevel=2)


def render(
    experiment: Experiment, records: Records, iteration: int, is_done: bool, with_samples: bool = True
) -> str:
    """The report as HTML."""
    name = escape(experiment.config.exp_name)
    state = "finished" if is_done else "ended early"
    test_set = experiment.test_set
    table = dataset_table(experiment.train_set.datasets, test_set.dataset if test_set else None)
    sections = [
        f"<h1>{name}</h1>",
        f'<p class="result">{escape(result_line(records, experiment))}</p>',
        empty_hint(records),
        f'<p class="note">The run {state} after {iteration} iterations, {datetime.now():%Y-%m-%d %H:%M}.</p>',
        "<h2>Curves</h2>",
        curves(records),
        "<h2>Test images</h2>",
        test_images(records),
        f"<h2>Data</h2><pre>{escape(printable(table))}</pre>",
        training_samples(experiment) if with_samples else "",
        "<h2>Flags</h2>",
        flags_table(experiment),
        "<h2>Next commands</h2>",
        *(
            f'<p>{purpose}:</p><pre class="wrapped">{escape(printable(command))}</pre>'
            for purpose, command in next_commands(experiment, is_done).items()
        ),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style>"
    )
    body = "\n".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def result_line(records: Records, experiment: Experiment) -> str:
    """The result of the run, in one line."""
    before = [test.iou for test in records.tests if test.iteration == 0]
    best, weights = records.best, experiment.checkpoints / BEST_FILE
    iou = best.metrics.get("iou") if best else None
    if best is None or iou is None or not before or not experiment.test_set:
        return "No result yet." if experiment.test_set else "No result: the run has no test set."
    return (
        f"Test IoU {before[0]:.3f} → {iou:.3f} on {len(experiment.test_set)} images, "
        f"with {weights} of iteration {best.iteration}"
    )


def empty_hint(records: Records) -> str:
    """What helps if even the best predictions are empty."""
    is_empty = records.best is not None and (records.best.metrics.get("iou") or 0.0) < EMPTY_IOU
    return f"<p>{escape(EMPTY_HINT)}</p>" if is_empty and records.tests else ""


# --- Curves -----------------------------------------------------------------------------------

Points = Sequence[tuple[float, float]]


def curves(records: Records) -> str:
    """Charts of the training loss, of the tests, and of the thresholds."""
    charts = [
        chart("Training loss by iteration", {"loss": thinned(records.losses)}),
        chart(
            "Test by iteration",
            {
                "IoU": [(test.iteration, test.iou) for test in records.tests],
                "clDice": [(test.iteration, test.cldice) for test in records.tests],
            },
            top=1.0,
            mark=records.best.iteration if records.best else None,
        ),
    ]
    if records.last_test:
        sweep = list(zip(THRESHOLDS.tolist(), records.last_test.iou_by_threshold, strict=True))
        threshold = records.last_test.threshold
        title = f"IoU by threshold (logit) in the last test; {threshold:g} is stored with the weights"
        charts.append(chart(title, {"IoU": sweep}, top=1.0, mark=threshold))
    return f'<div class="grid">{"".join(charts)}</div>'


def thinned(points: Points) -> Points:
    """At most MAX_POINTS points; each is the mean of neighboring ones."""
    parts = np.array_split(np.array(points), min(MAX_POINTS, len(points))) if points else []
    return [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in parts)]


def chart(title: str, series: dict[str, Points], top: float | None = None, mark: float | None = None) -> str:
    """Curves as an SVG figure, from 0 upwards.

    Args:
        series: the points (x, y) of each curve, at most two; points that are not finite are left out.
        top: the upper end of the y axis; by default, the largest value.
        mark: where a dashed vertical line is.
    """
    finite = {name: [point for point in curve if np.isfinite(point).all()] for name, curve in series.items()}
    points = [point for curve in finite.values() for point in curve]
    if not points:
        return f"<figure><figcaption>{escape(title)}: nothing was logged.</figcaption></figure>"
    (left, _), (right, highest) = np.min(points, axis=0), np.max(points, axis=0)
    width, height = right - left or 1.0, top or highest or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        """The place of a point in the figure, which is 400 wide and 232 high."""
        return round(45 + 340 * (x - left) / width, 1), round(210 - 190 * y / height, 1)

    parts = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(left + part * width, part * height)
        parts.append(f'<path d="M45 {y}H385" stroke="#ddd"/>')
        parts.append(f'<text x="40" y="{y + 4}" text-anchor="end">{part * height:.3g}</text>')
        parts.append(f'<text x="{x}" y="226" text-anchor="middle">{left + part * width:.4g}</text>')
    if mark is not None:
        parts.append(f'<path d="M{place(mark, 0)[0]} 210V20" stroke="#555" stroke-dasharray="2 3"/>')
    for number, (name, curve) in enumerate(finite.items()):
        color, dashes = CURVES[number]
        style = f'stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"'
        places = [place(*point) for point in curve]
        line = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" {style}/>')
        if len(places) <= MAX_DOTS:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in places]
        x = 50 + 90 * number
        parts.append(f'<path d="M{x} 10h24" {style}/><text x="{x + 30}" y="14">{escape(name)}</text>')
    svg = f'<svg viewBox="0 0 400 232" font-size="11">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


# --- Images -----------------------------------------------------------------------------------


def image_element(jpeg_base64: str, description: str) -> str:
    return f'<img src="data:image/jpeg;base64,{jpeg_base64}" alt="{escape(description)}">'


def test_images(records: Records) -> str:
    """The worst, median and best images of the last test, with found, missed and wrong pixels in color."""
    last_test = records.last_test
    if last_test is None:
        return '<p class="note">There are no images of a test.</p>'
    best = records.best.iteration if records.best else None
    whose = f"with the weights of the last test, at iteration {last_test.iteration}"
    if best == last_test.iteration:
        whose += f", which are those of {BEST_FILE}"
    elif best is not None:
        whose += f"; {BEST_FILE} is of iteration {best}, and its masks differ"
    box = '<span class="key" style="background:rgb{}"></span> {}'
    keys = " &nbsp; ".join(box.format(color, meaning) for meaning, color in LEGEND)
    parts = [f'<p class="note">Predicted {whose}.</p><p class="note">{keys}</p>']
    for shown in last_test.images:
        text = f"{shown.role}, IoU {shown.iou:.3f}: {printable(shown.name)}"
        image, compared = shown.images
        parts.append(
            f'<figure class="test"><figcaption>{escape(text)}</figcaption><div class="pair">'
            f"{image_element(image, 'image')}{image_element(compared, 'found, missed and wrong pixels')}"
            "</div></figure>"
        )
    return "\n".join(parts)


def training_samples(experiment: Experiment) -> str:
    """The first samples of the training, each beside the outline of its target."""
    train_set = experiment.train_set
    try:
        rendered = [render_sample(train_set[key]) for key in train_set.epoch(0)[:N_SAMPLES]]
    except UserError as error:  # a file is gone
        return f'<p class="note">Training samples could not be made: {escape(printable(str(error)))}</p>'
    images = [base64.b64encode(encode_image(image, ".jpg")).decode() for image in rendered]
    figures = "".join(image_element(image, "sample and outline of its target") for image in images)
    note = '<p class="note">Training samples, each beside its target.</p>'
    return f'{note}<div class="pair wide">{figures}</div>'


# --- Flags and commands -----------------------------------------------------------------------


def flags_table(experiment: Experiment) -> str:
    """All flags: first those that differ from the defaults, then the rest."""
    flags, defaults = experiment.config.flags(), default_flags(experiment)
    changed = [name for name in flags if flags[name] != defaults[name]]
    rest = [name for name in flags if flags[name] == defaults[name]]
    return f"<p>Not the defaults:</p>{two_columns(changed, flags)}<p>Defaults:</p>{two_columns(rest, flags)}"


def default_flags(experiment: Experiment) -> dict[str, Any]:
    """The flags of the same run by default. `--train` decides about other defaults, so it counts as given."""
    config = experiment.config
    given = ["--config=.", f"--exp_name={config.exp_name}", f"--device={config.device}"]
    by_train = parse_args([*given, f"--train={config.train}"], quiet=True)
    of_model = (f"--model_type={config.model_type}", f"--embedding_reuse={config.embedding_reuse}")
    train = parse_args([*given, *of_model], quiet=True).train
    defaults = with_test_interval(by_train, experiment.schedule, None).flags()
    return defaults | {"train": train, "device": "auto", "exp_name": None}


def two_columns(names: Iterable[str], flags: dict[str, Any]) -> str:
    cells = (f"<tr><th>--{name}</th><td>{escape(printable(str(flags[name])))}</td></tr>" for name in names)
    return f'<div class="columns"><table>{"".join(cells)}</table></div>'


def next_commands(experiment: Experiment, is_done: bool) -> dict[str, str]:
    """The commands that come next, by their purpose."""
    config, folder = experiment.config, experiment.folder
    dataset = experiment.dataset_to_predict.config
    weights = [path for name in (BEST_FILE, LAST_FILE) if (path := experiment.checkpoints / name).exists()]
    commands = {}
    if weights:
        checkpoint, data = ("--checkpoint", weights[0]), dataset.data_dir
        # predict.py reads only masks that need no `mask_values`
        masks = () if dataset.mask_values else ("--masks", data / "masks")
        output = ("--output", Path("predictions") / folder.name)
        onnx = ("--format", "onnx", "--output", folder / "best.onnx")
        # The test set of --val_percentage has no folder of its own.
        has_test_folder = experiment.test_set and not config.val_percentage
        purpose = f"Predict the {'test' if has_test_folder else 'training'} images"
        flags = (*checkpoint, "--input", data / "imgs", *masks, *prompt_flags(config.prompt), *output)
        commands[purpose] = tool_command("predict.py", *flags)
        if not prompt_flags(config.prompt):  # the graph takes no prompts
            commands["Export for ONNX Runtime"] = tool_command("export.py", *checkpoint, *onnx)
    resume, processes = ("--exp_name", config.exp_name, "--resume"), runtime.local_world_size()
    if not is_done:
        commands["Continue"] = tool_command("finetune.py", *resume, processes=processes)
    elif config.minutes is None:
        more = ("--epoch_num", str(2 * config.epoch_num))
        commands["Train longer"] = tool_command("finetune.py", *resume, *more, processes=processes)
    return commands
