"""Label files of labeling tools: which format a file has, and the labeled regions of each image in it.

Every format becomes a list of `LabeledImage`. Masks are drawn only when they are needed.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml
from pydantic import BaseModel, Discriminator, Field, FiniteFloat, Tag, TypeAdapter, ValidationError
from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt as Length

from imaging.coco import decode_brush, decode_rle, draw_line, expand_runs, fill_polygons, paste
from imaging.files import IMAGE_SUFFIXES, FileError, decode, format_list, to_rgb
from imaging.masks import VOID, Color, read_mask
from imaging.pairing import MASK_SUFFIX

Size = tuple[int, int]  # (h, w)
Point = tuple[FiniteFloat, FiniteFloat]  # (x, y); the outer corner of the first pixel is (0, 0)
Model = TypeVar("Model")


class Instance(NamedTuple):
    """A labeled region, or several of one label.

    draw: its mask, bool (H, W), from the size of the image. Raises FileError if the label is damaged.
    n_regions: how many regions it stands for.
    """

    label: str
    draw: Callable[[Size], np.ndarray]
    n_regions: int = 1


@dataclass(frozen=True)
class LabeledImage:
    """The labels of one image.

    source: the label file.
    names: what the image may be called. The last parts of a path count; `*` is any suffix.
    size: (h, w) of the image as the label file has it, or None if it does not.
    instances: its labeled regions.
    left_out: the kind of each shape that is not a region.
    fault: why the image cannot be used; empty if it can.
    """

    source: Path
    names: tuple[str, ...]
    size: Size | None
    instances: tuple[Instance, ...] = ()
    left_out: tuple[str, ...] = ()
    fault: str = ""

    @classmethod
    def from_shapes(
        cls, source: Path, names: Iterable[str], size: Size | None, shapes: Iterable[Instance | str]
    ) -> "LabeledImage":
        """Sort shapes into regions and descriptions of those that are left out."""
        shapes = list(shapes)
        regions = tuple(shape for shape in shapes if isinstance(shape, Instance))
        left_out = tuple(shape for shape in shapes if isinstance(shape, str))
        return cls(source, tuple(names), size, regions, left_out)


# --- Shapes -----------------------------------------------------------------------------------


def polygon(label: str, rings: Iterable[Iterable[Point]]) -> Instance | str:
    """A region of one or more filled polygons."""
    usable = [np.array(ring, float) for ring in map(list, rings) if len(ring) >= 3]
    return Instance(label, partial(fill_polygons, usable)) if usable else "polygon of fewer than 3 points"


def line(label: str, points: Iterable[Point], width: float | None) -> Instance | str:
    """A polyline, which is a region only if a width in pixels is given."""
    if width is None:
        return "line without a width (see --line_width)"
    return Instance(label, partial(draw_line, np.array(list(points), float), width))


# --- Reading and checking ---------------------------------------------------------------------


def load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path}: cannot be read as JSON ({error})") from error


def load_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read as text in UTF-8 ({error})") from error


def _validate(kind: type[Model], document: object, where: object) -> Model:
    """`document` as a model; raises FileError, which names `where`, and every key with a wrong value."""
    try:
        return TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {str(fault['input'])[:60]}"
            for fault in error.errors()
        ]
    raise FileError(f"{where}: {len(faults)} error(s)\n  {format_list(faults)}")


def _ints(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def _parse(convert: Callable[[str], Model], text: str | None, where: str) -> Model:
    """Convert a text of a label file; raises FileError with `where`, the file and the key."""
    if text is None:
        raise FileError(f"{where}: is missing")
    try:
        return convert(text)
    except ValueError as error:
        raise FileError(f"{where}: {error}, got {text[:60]!r}") from error


# --- COCO -------------------------------------------------------------------------------------


class CocoRle(BaseModel):
    size: tuple[Length, Length]
    counts: list[Count] | str


class CocoImage(BaseModel):
    id: int | str
    file_name: str
    height: Length
    width: Length


class CocoCategory(BaseModel):
    id: int
    name: str


Segmentation = Annotated[
    Annotated[list[list[FiniteFloat]], Tag("polygons")] | Annotated[CocoRle, Tag("RLE")],
    Discriminator(lambda value: "polygons" if isinstance(value, list) else "RLE"),
]


class CocoAnnotation(BaseModel):
    image_id: int | str
    category_id: int
    segmentation: Segmentation | None = None


class CocoDocument(BaseModel):
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


def read_coco(path: Path) -> Iterator[LabeledImage]:
    """A COCO file of instances. Source: https://cocodataset.org/#format-data"""
    document = _validate(CocoDocument, load_json(path), path)
    _require_distinct(f"{path}: images", ((image.id, image.file_name) for image in document.images))
    _require_distinct(f"{path}: categories", ((kind.id, kind.name) for kind in document.categories))
    labels = {category.id: category.name for category in document.categories}
    shapes: dict[int | str, list[Instance | str]] = {image.id: [] for image in document.images}
    for number, annotation in enumerate(document.annotations):
        where = f"{path}: annotations.{number}"
        if annotation.image_id not in shapes:
            raise FileError(f"{where}.image_id: no image has the id {annotation.image_id}")
        if annotation.category_id not in labels:
            raise FileError(f"{where}.category_id: no category has the id {annotation.category_id}")
        label = labels[annotation.category_id]
        shapes[annotation.image_id].append(_coco_shape(label, annotation.segmentation))
    for image in document.images:
        yield LabeledImage.from_shapes(path, [image.file_name], (image.height, image.width), shapes[image.id])


def _require_distinct(where: str, named_ids: Iterable[tuple[int | str, str]]) -> None:
    """Raise FileError if an id stands for two names, as in files that were joined by hand."""
    names: dict[int | str, str] = {}
    for number, name in named_ids:
        if names.setdefault(number, name) != name:
            raise FileError(f"{where}: {names[number]} and {name} have the same id {number}")


def _coco_shape(label: str, segmentation: list[list[float]] | CocoRle | None) -> Instance | str:
    if not segmentation:
        return "box or keypoints"
    if isinstance(segmentation, CocoRle):
        return Instance(label, partial(_draw_coco_rle, segmentation.size, segmentation.counts))
    if any(len(ring) % 2 for ring in segmentation):
        return "polygon with an odd number of coordinates"
    return polygon(label, [zip(ring[::2], ring[1::2], strict=True) for ring in segmentation])


def _draw_coco_rle(rle_size: Size, counts: list[int] | str, size: Size) -> np.ndarray:
    if rle_size != size:
        raise FileError(f"RLE of size {rle_size}, but the image has {size}")
    return decode_rle(counts, size)


# --- labelme ----------------------------------------------------------------------------------


class LabelmeShape(BaseModel):
    label: str
    points: list[Point]
    shape_type: str = "polygon"
    mask: str | None = None


class LabelmeDocument(BaseModel):
    imagePath: str
    imageHeight: Length | None = None
    imageWidth: Length | None = None
    shapes: list[LabelmeShape]


def read_labelme(path: Path, line_width: float | None) -> Iterator[LabeledImage]:
    """A file of labelme, which has one image. Source: https://github.com/wkentaro/labelme"""
    document = _validate(LabelmeDocument, load_json(path), path)
    height, width = document.imageHeight, document.imageWidth
    size = (height, width) if height is not None and width is not None else None
    shapes = (_labelme_shape(shape, line_width) for shape in document.shapes)
    yield LabeledImage.from_shapes(path, [document.imagePath], size, shapes)


def _labelme_shape(shape: LabelmeShape, line_width: float | None) -> Instance | str:
    if shape.shape_type == "polygon":
        return polygon(shape.label, [shape.points])
    if shape.shape_type in ("line", "linestrip") and shape.points:
        return line(shape.label, shape.points, line_width)
    if shape.shape_type == "mask" and shape.mask and shape.points:
        return Instance(shape.label, partial(_draw_labelme_mask, shape.mask, shape.points[0]))
    return shape.shape_type


def _draw_labelme_mask(encoded: str, corner: Point, size: Size) -> np.ndarray:
    """A PNG of the box that the region fills, from the corner (x, y)."""
    try:
        content = np.frombuffer(base64.b64decode(encoded), np.uint8)
    except ValueError as error:
        raise FileError("mask that is not encoded in base64") from error
    region = cv2.imdecode(content, cv2.IMREAD_GRAYSCALE) if len(content) else None
    if region is None:
        raise FileError("mask that is no PNG")
    return paste(region > 0, int(corner[0]), int(corner[1]), size)


# --- YOLO -------------------------------------------------------------------------------------

YOLO_LINE = re.compile(r"\d+(\s+[-+]?[\d.]+(e[-+]?\d+)?){4,}\s*", re.IGNORECASE)


def read_yolo(path: Path, names: dict[str, str]) -> Iterator[LabeledImage]:
    """A text file of YOLO segmentation: on each line a class and a polygon, in fractions of the image.

    Source: https://docs.ultralytics.com/datasets/segment/
    """
    shapes: list[Instance | str] = []
    for number, text in enumerate(load_text(path).splitlines(), 1):
        if not text.strip():
            continue
        where = f"{path}: line {number}"
        if not YOLO_LINE.fullmatch(text.strip()):
            raise FileError(f"{where}: expected a class number and x y x y ..., got {text[:60]!r}")
        label, *values = text.split()
        name = names.get(label, label)
        corners = _parse(_floats, " ".join(values), where)
        if len(corners) == 4:
            shapes.append("box")
        elif len(corners) % 2:
            shapes.append("polygon with an odd number of coordinates")
        else:
            shapes.append(Instance(name, partial(_fill_yolo, corners.reshape(-1, 2))))
    parts = ["images" if part == "labels" else part for part in path.with_suffix(".*").parts]
    yield LabeledImage.from_shapes(path, ["/".join(parts[-3:])], None, shapes)


def _floats(text: str) -> np.ndarray:
    return np.array(text.split(), float)


MAX_FRACTION = 2.0  # polygons may lie somewhat outside of the image


def _fill_yolo(corners: np.ndarray, size: Size) -> np.ndarray:
    largest = float(np.abs(corners).max())
    if largest > MAX_FRACTION:
        raise FileError(f"coordinate {largest:g} in its labels; expected fractions of the image (not pixels)")
    return _fill_fractions(corners, size)


def _fill_fractions(corners: np.ndarray, size: Size) -> np.ndarray:
    return fill_polygons([corners * size[::-1]], size)


def yolo_names(folder: Path) -> dict[str, str]:
    """The names of the classes by their numbers, from `names` in a YAML file or from classes.txt.

    They are looked for in `folder` and in the two folders above it. None found: no names.
    """
    for place in (folder, *list(folder.parents)[:2]):
        for path in sorted([*place.glob("*.yaml"), *place.glob("*.yml")]):
            try:
                document = yaml.safe_load(load_text(path))
            except yaml.YAMLError as error:
                raise FileError(f"{path}: is not valid YAML ({error})") from error
            names = document.get("names") if isinstance(document, dict) else None
            if isinstance(names, list | dict):
                items = names.items() if isinstance(names, dict) else enumerate(names)
                return {str(number): str(name) for number, name in items}
        for path in (place / "classes.txt", place / "obj.names"):
            if path.is_file():
                return {str(number): name for number, name in enumerate(load_text(path).split("\n")) if name}
    return {}


# --- CVAT -------------------------------------------------------------------------------------


def read_cvat(path: Path, line_width: float | None) -> Iterator[LabeledImage]:
    """An XML file of the format "CVAT for images 1.1". Source: https://docs.cvat.ai/docs/other/xml_format"""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise FileError(f"{path}: cannot be read as XML ({error})") from error
    if root.find("track") is not None:
        raise FileError(f'{path}: has the format "CVAT for video"; export it as "CVAT for images 1.1"')
    for number, image in enumerate(root.iter("image")):
        where = f"{path}: image {number}"
        name = _parse(str, image.get("name"), f"{where}: name")
        height, width = (_parse(int, image.get(key), f"{where}: {key}") for key in ("height", "width"))
        shapes = [
            _cvat_shape(shape, line_width, f"{where} ({name}): {shape.tag}")
            for shape in image
            if shape.tag != "tag"  # a label of the whole image
        ]
        yield LabeledImage.from_shapes(path, [name], (height, width), shapes)


def _cvat_shape(shape: ElementTree.Element, line_width: float | None, where: str) -> Instance | str:
    label = _parse(str, shape.get("label"), f"{where}: label")
    if shape.tag in ("polygon", "polyline"):
        points = _parse(_cvat_points, shape.get("points"), f"{where}: points")
        return polygon(label, [points]) if shape.tag == "polygon" else line(label, points, line_width)
    if shape.tag != "mask":
        return shape.tag
    left, top, width, height = (
        _parse(int, shape.get(key), f"{where}: {key}") for key in ("left", "top", "width", "height")
    )
    counts = _parse(_ints, shape.get("rle"), f"{where}: rle")
    return Instance(label, partial(_draw_cvat_mask, counts, left, top, (height, width)))


def _cvat_points(text: str) -> list[Point]:
    points = np.array([point.split(",") for point in text.split(";")], float)
    if points.shape[1:] != (2,) or not np.isfinite(points).all():
        raise ValueError("expected x,y;x,y;...")
    return [(float(x), float(y)) for x, y in points]


def _draw_cvat_mask(counts: list[int], left: int, top: int, box: Size, size: Size) -> np.ndarray:
    """The run lengths go along the rows of a box, background first."""
    if box[0] > size[0] or box[1] > size[1]:
        raise FileError(f"mask of {box[0]} x {box[1]} pixels, but the image has {size[0]} x {size[1]}")
    return paste(expand_runs(counts, box), left, top, size)


# --- Label Studio -----------------------------------------------------------------------------


class StudioResult(BaseModel):
    type: str = "unknown"
    value: dict[str, Any] = {}
    original_width: Length | None = None
    original_height: Length | None = None
    image_rotation: float = 0


class StudioAnnotation(BaseModel):
    result: list[StudioResult]
    was_cancelled: bool = False


class StudioTask(BaseModel):
    data: dict[str, Any]
    annotations: list[StudioAnnotation]


class StudioPolygon(BaseModel):
    points: list[Point]


class StudioBrush(BaseModel):
    rle: list[Annotated[int, Field(ge=0, le=255)]]


def read_studio(path: Path) -> Iterator[LabeledImage]:
    """A JSON export of Label Studio. Source: https://labelstud.io/guide/export#Label-Studio-JSON-format"""
    for number, task in enumerate(_validate(list[StudioTask], load_json(path), path)):
        names = _studio_names(task)
        if not names:
            raise FileError(f"{path}: {number}.data: holds no path of an image, got {str(task.data)[:60]}")
        annotations = [annotation for annotation in task.annotations if not annotation.was_cancelled]
        results = annotations[0].result if annotations else []
        sizes = [(result.original_height, result.original_width) for result in results]
        size = next(((h, w) for h, w in sizes if h is not None and w is not None), None)
        shapes = [
            shape
            for index, result in enumerate(results)
            for shape in _studio_shapes(result, f"{path}: {number}.annotations.result.{index}.value")
        ]
        image = LabeledImage.from_shapes(path, names, size, shapes)
        fault = ""
        if len(annotations) > 1:
            fault = f"has {len(annotations)} annotations; keep one of them in Label Studio"
        elif any(result.image_rotation for result in results):
            fault = "was rotated in Label Studio; label it as the file is"
        yield replace(image, fault=fault)


def _studio_names(task: StudioTask) -> list[str]:
    """The path of the image of a task, and the same without the random prefix of an uploaded file."""
    names = []
    for value in task.data.values():
        parts = urlsplit(value) if isinstance(value, str) else urlsplit("")
        name = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]  # /data/local-files/?d=imgs/a.jpg
        if Path(name).suffix.lower() in IMAGE_SUFFIXES:
            names += [name, re.sub(r"^[0-9a-f]{8}-", "", Path(name).name)]
    return names


def _studio_shapes(result: StudioResult, where: str) -> Iterator[Instance | str]:
    """The region of a result, once for each of its labels."""
    value, labels = result.value, result.value.get(result.type)
    if not isinstance(labels, list) or not ("points" in value or "rle" in value):
        yield result.type
        return
    if "rle" in value:
        draw = partial(decode_brush, _validate(StudioBrush, value, where).rle)
    else:
        corners = np.array(_validate(StudioPolygon, value, where).points, float) / 100  # from percent
        if len(corners) < 3:
            yield "polygon of fewer than 3 points"
            return
        draw = partial(_fill_fractions, corners)
    for label in labels:
        yield Instance(str(label), draw)


# --- Masks ------------------------------------------------------------------------------------

VOC_FOLDERS = ("SegmentationClass", "SegmentationClassPNG")
BLACK = (0, 0, 0)


def read_voc(path: Path, names: dict[Color, str]) -> Iterator[LabeledImage]:
    """A color mask of PASCAL VOC, which has one color per class; black is background.

    Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, section 2.1. If there is a
    mask of the same name in SegmentationObject, its colors count the regions.
    """
    pixels = to_rgb(decode(path))
    objects_path = path.parents[1] / "SegmentationObject" / path.name
    objects = to_rgb(decode(objects_path)) if objects_path.is_file() else np.zeros_like(pixels)
    if objects.shape != pixels.shape:
        raise FileError(f"{objects_path}: has another size than {path}")
    pairs = np.unique(np.concatenate([pixels, objects], axis=2).reshape(-1, 6), axis=0).tolist()
    counts: dict[Color, int] = defaultdict(int)
    for red, green, blue, *object_color in pairs:
        counts[red, green, blue] += tuple(object_color) not in (BLACK, VOID)
    shapes = [
        Instance(names.get(color, "{},{},{}".format(*color)), partial(_draw_color, path, color), max(n, 1))
        for color, n in counts.items()
        if color not in (BLACK, VOID) and names.get(color) != "background"
    ]
    yield LabeledImage.from_shapes(path, [f"JPEGImages/{path.stem}.*"], pixels.shape[:2], shapes)


def _draw_color(path: Path, color: Color, size: Size) -> np.ndarray:
    return (to_rgb(decode(path)) == color).all(axis=2)


def voc_names(folder: Path) -> dict[Color, str]:
    """The names of the colors, from labelmap.txt of CVAT (`name:r,g,b::`) or class_names.txt of labelme.

    In the latter, the line of class 0 comes first, and class i has the i-th color of the VOC palette.
    """
    names: dict[Color, str] = {}
    if (path := folder / "labelmap.txt").is_file():
        for number, text in enumerate(load_text(path).splitlines(), 1):
            if text.strip() and not text.startswith("#"):
                name, _, rest = text.partition(":")
                values = _parse(_color, rest.partition(":")[0], f"{path}: line {number}")
                names[values] = name
    elif (path := folder / "class_names.txt").is_file():
        lines = [name for name in load_text(path).splitlines() if name != "__ignore__"]
        names = {voc_color(index): name for index, name in enumerate(lines)}
    return names


def _color(text: str) -> Color:
    red, green, blue = _ints(text)
    return red, green, blue


def voc_color(index: int) -> Color:
    """The i-th color of the VOC palette: the bits of the index go in turn to red, green and blue."""
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def read_named_mask(path: Path) -> Iterator[LabeledImage]:
    """A binary mask whose name is that of its image with a suffix, such as x_mask.png or x_mask_2.png."""
    width, height = decode(path).image.size
    instance = Instance("mask", partial(_draw_mask, path))
    yield LabeledImage.from_shapes(
        path, [f"{path.parent.name}/{image_stem(path)}.*"], (height, width), [instance]
    )


def _draw_mask(path: Path, size: Size) -> np.ndarray:
    return read_mask(path)


def image_stem(path: Path) -> str:
    """The stem of the image that a mask belongs to by its name; that of the mask if it has no suffix."""
    for stem in (path.stem, re.sub(r"[ _.-]*\d+$", "", path.stem)):  # the mask of one of several cables
        shortened = MASK_SUFFIX.sub("", stem, count=1)
        if shortened != stem:
            return shortened
    return path.stem


# --- Formats ----------------------------------------------------------------------------------

FORMATS = ("coco", "labelme", "yolo", "cvat", "labelstudio", "voc", "suffix")


def read_labels(label_format: str, paths: list[Path], line_width: float | None) -> Iterator[LabeledImage]:
    """The labeled images of all files of one format; raises FileError.

    `line_width` in pixels makes regions of polylines; None leaves them out.
    """
    folders = {path.parent for path in paths}
    class_names = {folder: yolo_names(folder) for folder in folders if label_format == "yolo"}
    color_names = {folder: voc_names(folder.parent) for folder in folders if label_format == "voc"}
    for path in paths:
        if label_format == "coco":
            yield from read_coco(path)
        elif label_format == "labelme":
            yield from read_labelme(path, line_width)
        elif label_format == "yolo":
            yield from read_yolo(path, class_names[path.parent])
        elif label_format == "cvat":
            yield from read_cvat(path, line_width)
        elif label_format == "labelstudio":
            yield from read_studio(path)
        elif label_format == "voc":
            yield from read_voc(path, color_names[path.parent])
        else:
            yield from read_named_mask(path)
