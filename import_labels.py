"""Import the labels of a labeling tool: write its images and binary masks as a dataset.

    python import_labels.py --input EXPORT --output my_cables

Reads COCO, labelme, YOLO segmentation, CVAT for images, Label Studio, PASCAL VOC masks and binary masks that
are named like their image. Writes `imgs/` (files as they are), `masks/` (0 and 255) and `contact_sheet.jpg`.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from base import flag_types
from base.errors import UserError
from imaging.files import IMAGE_SUFFIXES, FileError, check_size, decode, format_list, to_rgb
from imaging.label_files import (
    FORMATS,
    VOC_FOLDERS,
    YOLO_LINE,
    LabeledImage,
    image_stem,
    load_json,
    read_labels,
)
from imaging.media import write_image
from imaging.pairing import normalized
from imaging.visualize import contact_sheet, label, outline, shrink

SHEET = "contact_sheet.jpg"
N_SHOWN = 24  # images on the contact sheet
SHOWN_SIDE = 400  # pixels
NAME_HEIGHT = 16  # pixels below an image, for one line of text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Import the labels of a labeling tool as a dataset.")
    add = parser.add_argument
    add("--input", type=flag_types.path, required=True, help="label file, or folder of label files or masks")
    add("--output", type=flag_types.path, required=True, help="dataset to write; it must not exist yet")
    add("--images", type=flag_types.path, help="folder of the images (default: the folder of --input)")
    add("--format", choices=FORMATS, help="format of the labels (default: detected)")
    add("--classes", nargs="+", metavar="NAME", help="classes that are cables (default: the only one)")
    width_help = "width of polylines (default: they are left out)"
    add("--line_width", type=flag_types.positive, metavar="PIXELS", help=width_help)
    add("--keep_empty", action="store_true", help="also import images without a label, with empty masks")
    add("--hard_links", action="store_true", help="link images instead of copying them")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 if images were left out because of a fault, 2 for an error, 130."""
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may lack letters of a file name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return 1 if run(args) else 0
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:  # OSError: a file that cannot be opened; it names the file
        print(f"error: {error}", file=sys.stderr)
        return 2


@dataclass
class Summary:
    """What was imported and what was not.

    classes: regions per label, of all images that the label files name.
    faults: why an image was left out, one line per image.
    n_without_label: images without a label.
    shapes: shapes that were left out, by kind.
    """

    classes: Counter[str]
    faults: list[str] = field(default_factory=list)
    n_with_label: int = 0
    n_without_label: int = 0
    shapes: Counter[str] = field(default_factory=Counter)


def run(args: argparse.Namespace) -> list[str]:
    """Import; returns why images were left out.

    Raises UserError: nothing can be imported, the labels are damaged, or the output cannot be written.
    """
    if os.path.lexists(args.output):
        raise UserError(f"--output {args.output} already exists: choose a new folder, or remove it first")
    label_format, label_files = find_label_files(args.input, args.format)
    labeled = list(read_labels(label_format, label_files, args.line_width))
    summary = Summary(count_classes(labeled))
    if not summary.classes:
        kinds = Counter(kind for labels in labeled for kind in labels.left_out)
        seen = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common()) or "nothing"
        raise UserError(f"{args.input}: expected polygons, masks or brush strokes, found {seen}")
    selected = select_classes(summary.classes, args.classes)
    root = args.images or (args.input if args.input.is_dir() else args.input.parent)
    root = Path(os.path.abspath(root))
    by_image = group_by_image(labeled, root, set(map(os.path.abspath, label_files)), summary)
    stems = output_stems(by_image, root)
    try:
        args.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output.absolute().parent, prefix=".import_") as temporary:
            folder = Path(temporary) / "dataset"
            options = {"keep_empty": args.keep_empty, "hard_links": args.hard_links}
            write_dataset(folder, by_image, stems, selected, summary, **options)
            folder.rename(args.output)
    except OSError as error:
        raise UserError(f"--output {args.output}: could not be written ({error})") from error
    print(f"labels        {label_format}, {len(label_files)} file(s) in {args.input}")
    print_summary(summary, selected, args.output, keep_empty=args.keep_empty)
    return summary.faults


# --- Finding ----------------------------------------------------------------------------------


def find_label_files(source: Path, label_format: str | None) -> tuple[str, list[Path]]:
    """The format of a file or folder, and its label files, sorted.

    Raises FileError if there are none, or if files of several formats are found and `label_format` is None.
    """
    paths = [source] if source.is_file() else visible_files(source)
    found: dict[str, list[Path]] = defaultdict(list)
    unknown: list[str] = []
    for path in paths:
        kind, seen = _describe(path)
        if kind:
            found[kind].append(path)
        elif seen:
            unknown.append(f"{path}: {seen}")
    found["suffix"] = _named_masks(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    kinds = [kind for kind in FORMATS if found[kind] and label_format in (None, kind)]
    if kinds == ["yolo"]:  # the other files of their folders are labels too: empty ones, and damaged ones
        folders = {path.parent for path in found["yolo"]}
        texts = [path for path in paths if path.suffix.lower() == ".txt" and path.name != "classes.txt"]
        found["yolo"] = [path for path in texts if path.parent in folders]
    if len(kinds) == 1:
        return kinds[0], found[kinds[0]]
    expected = label_format or "labels of one of the formats " + ", ".join(FORMATS)
    seen_kinds = [f"{len(found[kind])} files of {kind}, such as {found[kind][0]}" for kind in kinds]
    if kinds:
        raise FileError(f"{source}: choose one with --format:\n  {format_list(seen_kinds)}")
    seen_files = unknown or [f"{len(paths)} other files"]
    raise FileError(f"{source}: expected {expected}, found none\n  {format_list(seen_files)}")


def visible_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileError(f"{folder}: no such file or folder")
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _describe(path: Path) -> tuple[str | None, str]:
    """The format of a file by its content, or None and what it holds if it could have been a label file."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _describe_json(load_json(path))
    if suffix == ".xml":
        with path.open("rb") as file:
            start = file.read(4096)
        if b"<annotations" in start:
            return "cvat", ""
        return None, "XML without the element <annotations>; boxes of PASCAL VOC are no masks"
    if suffix == ".txt":
        with path.open("rb") as file:
            first_line = file.readline(100_000).decode("utf-8-sig", errors="replace")
        if YOLO_LINE.fullmatch(first_line.strip()):
            return "yolo", ""
        return None, f"no polygons of YOLO, but {first_line[:40].strip()!r}" if first_line else "it is empty"
    if suffix in IMAGE_SUFFIXES and path.parent.name in VOC_FOLDERS:
        return "voc", ""
    return None, "packed; unpack it first" if suffix in (".zip", ".rar", ".7z", ".gz") else ""


def _describe_json(document: Any) -> tuple[str | None, str]:
    if isinstance(document, dict):
        if {"images", "annotations", "categories"} <= document.keys():
            return "coco", ""
        if {"shapes", "imagePath"} <= document.keys():
            return "labelme", ""
        return None, f"JSON with the keys {', '.join(sorted(document)[:8]) or '(none)'}"
    if isinstance(document, list) and document and isinstance(document[0], dict):
        if {"data", "annotations"} <= document[0].keys():
            return "labelstudio", ""
        return None, f"a list with the keys {', '.join(sorted(document[0])[:8])}; export JSON, not JSON-MIN"
    return None, f"JSON of type {type(document).__name__}"


def _named_masks(paths: Iterable[Path]) -> list[Path]:
    """The masks among image files: what is named like another image, with a suffix."""
    files = [path for path in paths if not path.parent.name.startswith("Segmentation")]
    stems = {normalized(path.stem) for path in files}
    with_suffix = [path for path in files if image_stem(path) != path.stem]
    return [path for path in with_suffix if normalized(image_stem(path)) in stems]


def group_by_image(
    labeled: Sequence[LabeledImage], root: Path, label_files: set[str], summary: Summary
) -> dict[Path, list[LabeledImage]]:
    """The labels of each image file; labels without a file become faults of `summary`.

    `root` and `label_files` are absolute paths without "..".
    """
    files = [path for path in visible_files(root) if path.suffix.lower() in IMAGE_SUFFIXES]
    index: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if str(path) not in label_files and not path.parent.name.startswith("Segmentation"):
            index[normalized(path.stem)].append(path)
    by_image: dict[Path, list[LabeledImage]] = defaultdict(list)
    for labels in labeled:
        try:
            by_image[find_image(labels, index, root)].append(labels)
        except FileError as error:
            summary.faults.append(str(error))
    return by_image


def find_image(labels: LabeledImage, index: dict[str, list[Path]], root: Path) -> Path:
    """The file of a labeled image: beside its label file, or the only one in `root` whose path fits best."""
    for name in (PurePosixPath(name.replace("\\", "/")) for name in labels.names):
        beside = labels.source.parent / name
        if beside.suffix.lower() in IMAGE_SUFFIXES and beside.is_file():
            return Path(os.path.abspath(beside))
        candidates = index.get(normalized(name.stem), [])
        candidates = [path for path in candidates if path.name == name.name] or candidates
        n_common = [common_parents(path, name) for path in candidates]
        best = [path for path, n in zip(candidates, n_common, strict=True) if n == max(n_common)]
        if len(best) > 1:
            raise FileError(f"{name}: may be {best[0]} or {best[1]}; give the right folder with --images")
        if best:
            return best[0]
    raise FileError(f"{labels.names[0]}: no such image in {root}; give its folder with --images")


def common_parents(path: Path, name: PurePosixPath) -> int:
    """How many folders at the ends of two paths are the same."""
    pairs = zip(reversed(path.parent.parts), reversed(name.parent.parts), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(path.parts), len(name.parts)) - 1)


def output_stems(paths: Iterable[Path], root: Path) -> dict[Path, str]:
    """A stem for each image: its own, or with the names of its folders if several images have the same."""
    paths = list(paths)
    counts = Counter(normalized(path.stem).casefold() for path in paths)
    stems = {}
    for path in paths:
        base = root if path.is_relative_to(root) else path.parents[1]
        is_unique = counts[normalized(path.stem).casefold()] == 1
        stems[path] = path.stem if is_unique else "_".join(path.relative_to(base).with_suffix("").parts)
    counts = Counter(normalized(stem).casefold() for stem in stems.values())
    same = [f"{path}: {stem}" for path, stem in stems.items() if counts[normalized(stem).casefold()] > 1]
    if same:
        raise UserError(f"{len(same)} images have the stem of another; rename them:\n  {format_list(same)}")
    return stems


# --- Classes ----------------------------------------------------------------------------------


def count_classes(labeled: Iterable[LabeledImage]) -> Counter[str]:
    classes: Counter[str] = Counter()
    for labels in labeled:
        for instance in labels.instances:
            classes[instance.label] += instance.n_regions
    return classes


def select_classes(classes: Counter[str], names: Sequence[str] | None) -> set[str]:
    """The classes that are cables; raises UserError if this is not clear, or if a name is unknown."""
    seen = ", ".join(f"{name} ({count})" for name, count in classes.most_common())
    if names is None and len(classes) > 1:
        raise UserError(f"the labels have several classes; name those of cables with --classes: {seen}")
    unknown = set(names or ()) - classes.keys()
    if unknown:
        raise UserError(f"--classes {' '.join(sorted(unknown))}: no such class; the labels have {seen}")
    return set(names or classes)


# --- Writing ----------------------------------------------------------------------------------


def write_dataset(
    folder: Path,
    by_image: dict[Path, list[LabeledImage]],
    stems: dict[Path, str],
    selected: set[str],
    summary: Summary,
    *,
    keep_empty: bool,
    hard_links: bool,
) -> None:
    """Write imgs/, masks/ and the contact sheet to a new folder; raises UserError if no image is left."""
    for name in ("imgs", "masks"):
        (folder / name).mkdir(parents=True)
    written: list[tuple[Path, Path]] = []
    for path, labels in tqdm(by_image.items(), "images", leave=False):
        summary.shapes.update(kind for one in labels for kind in one.left_out)
        try:
            mask = draw_mask(path, labels, selected, summary.shapes)
        except FileError as error:
            summary.faults.append(f"{path}: {error}")
            continue
        summary.n_with_label += bool(mask.any())
        summary.n_without_label += not mask.any()
        if mask.any() or keep_empty:
            image_path = folder / "imgs" / f"{stems[path]}{path.suffix}"
            mask_path = folder / "masks" / f"{stems[path]}.png"
            copy_image(path, image_path, hard_links=hard_links)
            write_image(mask_path, mask.astype(np.uint8) * 255)
            written.append((image_path, mask_path))
    if not written:
        shapes = [f"{count} shape(s) left out: {kind}" for kind, count in (+summary.shapes).most_common()]
        reasons = summary.faults + shapes or ["no image has a label of the selected classes"]
        raise UserError(f"no image could be imported:\n  {format_list(reasons)}")
    write_sheet(folder / SHEET, written)


def draw_mask(
    path: Path, labels: Sequence[LabeledImage], selected: set[str], shapes: Counter[str]
) -> np.ndarray:
    """The mask, bool (H, W), of all selected regions of an image. Empty regions are counted in `shapes`.

    Raises FileError if the image cannot be read, or if its labels are for another image or damaged.
    """
    check_size(path)
    file = decode(path)
    to_rgb(file)  # refuses more than 8 bits, as training does
    size = (file.image.height, file.image.width)
    mask = np.zeros(size, bool)
    for one in labels:
        if one.fault:
            raise FileError(one.fault)
        if one.size not in (None, size):
            raise FileError(f"has {size[0]} x {size[1]} pixels, but its labels are for {one.size}")
        # A rotation by 90 degrees shows in the sizes, if there are any.
        if file.orientation != 1 and (file.orientation < 5 or one.size is None or size[0] == size[1]):
            raise FileError(
                f"has the EXIF orientation {file.orientation}, and its labels may not have it; "
                "rotate it in an editor and label it again"
            )
        if one.left_out and not one.instances:
            raise FileError(f"has only shapes that are no regions: {', '.join(sorted(set(one.left_out)))}")
        for instance in one.instances:
            if instance.label in selected:
                region = instance.draw(size)
                shapes["region that covers no pixel"] += not region.any()
                mask |= region
    return mask


def copy_image(source: Path, target: Path, *, hard_links: bool) -> None:
    """Copy a file, or make another name of it; raises UserError."""
    try:
        if hard_links:
            os.link(source.resolve(), target)
        else:
            shutil.copy2(source, target)
    except OSError as error:
        hint = "; without --hard_links it is copied" if hard_links else ""
        raise UserError(f"{source}: cannot be written to the output ({error}){hint}") from error


def write_sheet(path: Path, written: Sequence[tuple[Path, Path]]) -> None:
    """Write a contact sheet of evenly chosen images with the outlines of their masks, each above its name."""
    chosen = np.unique(np.linspace(0, len(written) - 1, N_SHOWN).astype(int))
    cells = []
    for image_path, mask_path in (written[index] for index in chosen):
        mask = np.asarray(decode(mask_path).image) > 0
        image = outline(shrink(to_rgb(decode(image_path)), SHOWN_SIDE), shrink(mask, SHOWN_SIDE))
        name = label(np.zeros((NAME_HEIGHT, SHOWN_SIDE, 3), np.uint8), image_path.name)
        cells.append(np.vstack([contact_sheet([image], columns=1, width=SHOWN_SIDE), name]))
    write_image(path, contact_sheet(cells, width=SHOWN_SIDE))


def print_summary(summary: Summary, selected: set[str], output: Path, *, keep_empty: bool) -> None:
    """Print what was imported, what was left out, and what comes next."""
    print(f"images        {summary.n_with_label} with label, {summary.n_without_label} without label")
    if summary.n_without_label:
        verb = "imported with empty masks" if keep_empty else "left out; --keep_empty imports them"
        print(f"              without label: {verb}")
    for name, count in summary.classes.most_common():
        print(f"regions       {count} of {name}{'' if name in selected else ' (not selected)'}")
    for kind, count in (+summary.shapes).most_common():
        print(f"left out      {count} shape(s): {kind}")
    if summary.faults:
        print(f"left out      {len(summary.faults)} image(s):\n  {format_list(summary.faults)}")
    print(f"written       {output / 'imgs'}, {output / 'masks'}; look at {output / SHEET}")
    print(f"next          write data_dir: {output} to a YAML file, and check it with finetune.py --preview")


if __name__ == "__main__":
    sys.exit(main())
