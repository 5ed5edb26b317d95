"""Files of other tools: prompts from CSV or COCO files, masks from labels, and masks as polygons."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import Delaunay
from skimage.measure import find_contours

from imaging.files import FileError, format_list
from imaging.pairing import normalized
from imaging.prompts import Prompt
from sam.point_labels import (
    BACKGROUND_POINT,
    BOX_CORNER_1,
    BOX_CORNER_2,
    FOREGROUND_POINT,
    NOT_A_POINT,
)

# The argument of cv2.approxPolyDP, in pixels. It leaves out corners so far from a line, and then some more at
# 0.71 of this distance. The sum is below 0.35, the distance from the edge of a mask to the centers of its
# pixels, so that no pixel is lost or gained.
TOLERANCE = 0.2

# --- Prompts ----------------------------------------------------------------------------------

EXPECTED = (
    "expected a CSV file with the header image,x,y[,label] or image,x1,y1,x2,y2, "
    "or a COCO file with boxes or keypoints"
)


class _Point(NamedTuple):
    x: float
    y: float
    label: int


class _Box(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float


_Located = tuple[str, str, _Point | _Box]  # where it is in the file, the name of its image, and itself


SizeOf = Callable[[str], tuple[int, int] | None]
BOX_COLUMNS = {"w", "h", "width", "height", "x2", "y2"}  # of other tools, beside x and y


def read_prompts(path: Path, size_of: SizeOf) -> dict[str, list[Prompt]]:
    """Read the prompts of each image, by its `normalized` stem: one for all its points, one for each box.

    A CSV file has a header and one row per point (`image,x,y`, and optionally `label`: 1 for cable, 0 for
    background) or per box (`image,x1,y1,x2,y2`: two opposite corners). It may be separated by semicolons or
    tabs, and then have decimal commas. In a COCO file, an annotation gives its visible keypoints, or its box
    if it has no keypoints. All coordinates are pixels of the image.

    size_of: gives the size (h, w) of an image by the same stem; with None, its prompts are not checked.

    Raises FileError, which says what is wrong with the file and what is expected, also if a point or a whole
    box lies outside of its image.
    """
    located = _read_items(path)
    _require_inside(path, located, size_of)
    points: dict[str, list[_Point]] = {}
    prompts: dict[str, list[Prompt]] = {}
    for _, image_name, item in located:
        stem = normalized(Path(image_name).stem)
        if isinstance(item, _Point):
            points.setdefault(stem, []).append(item)
        else:
            corners = np.sort(np.array(item, np.float32).reshape(2, 2), axis=0)  # the top left one first
            labels = np.array([BOX_CORNER_1, BOX_CORNER_2], np.int64)
            prompts.setdefault(stem, []).append(Prompt(corners, labels))
    for stem, items in points.items():
        # SAM ends points without a box with a point of the label NOT_A_POINT.
        array = np.array([*items, _Point(0, 0, NOT_A_POINT)], np.float32)
        prompts.setdefault(stem, []).append(Prompt(array[:, :2], array[:, 2].astype(np.int64)))
    return prompts


def _require_inside(path: Path, located: Iterable[_Located], size_of: SizeOf) -> None:
    """Raise FileError, which lists them, if points or whole boxes lie outside of their images."""
    outside = []
    for place, image_name, item in located:
        size = size_of(normalized(Path(image_name).stem))
        if size is None:
            continue
        (height, width), is_point = size, isinstance(item, _Point)
        numbers: tuple[float, ...] = item[:2] if is_point else item
        xs, ys = numbers[::2], numbers[1::2]
        if max(xs) < 0 or min(xs) > width or max(ys) < 0 or min(ys) > height:
            kind, values = "point" if is_point else "box", ", ".join(f"{number:g}" for number in numbers)
            outside.append(
                f"{place}: {kind} ({values}) in {image_name}, which is {width} px wide and {height} px high"
            )
    if outside:
        raise FileError(
            f"--prompt {path}: {len(outside)} point(s) or box(es) outside of their image; expected pixels, x "
            "to the right and y down from the top left corner. Correct or remove these:\n  "
            f"{format_list(outside)}"
        )


def _read_items(path: Path) -> list[_Located]:
    """Read the points and boxes of a file; raises FileError."""
    read = _read_coco if path.suffix.lower() == ".json" else _read_csv
    try:
        return list(read(path))
    except OSError as error:
        raise FileError(f"--prompt {path}: cannot be read ({error})") from error
    except KeyError as error:
        raise FileError(f"--prompt {path}: {error} is missing; {EXPECTED}") from error
    except (ValueError, TypeError, RecursionError, csv.Error) as error:  # a wrong value, or no CSV or JSON
        raise FileError(f"--prompt {path}: {error}; {EXPECTED}") from error


def _read_csv(path: Path) -> Iterator[_Located]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=header.count)
        rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
        if rows.fieldnames is None or "image" not in rows.fieldnames:
            raise ValueError(f"its header is {rows.fieldnames}")
        is_box = "x1" in rows.fieldnames
        columns = set(rows.fieldnames)
        if not is_box and "label" not in columns and columns & BOX_COLUMNS:
            raise ValueError(f"its header {','.join(rows.fieldnames)} may mean boxes; points need a label")
        for row in rows:
            place, name = f"line {rows.line_num}", _require_text(row["image"])
            texts = [row[column] or "" for column in (("x1", "y1", "x2", "y2") if is_box else ("x", "y"))]
            numbers = _finite(text if delimiter == "," else text.replace(",", ".") for text in texts)
            if is_box:
                yield place, name, _Box(*numbers)
            else:
                x, y = numbers
                yield place, name, _Point(x, y, _parse_label(row.get("label") or FOREGROUND_POINT))


def _read_coco(path: Path) -> Iterator[_Located]:
    document = json.loads(path.read_bytes())
    names = {image["id"]: _require_text(image["file_name"]) for image in document["images"]}
    for number, annotation in enumerate(document["annotations"], 1):
        if annotation["image_id"] not in names:
            raise ValueError(f"an annotation has image_id {annotation['image_id']}, but no image has this id")
        place, name = f"annotation {number}", names[annotation["image_id"]]
        keypoints = np.reshape(annotation.get("keypoints", []), (-1, 3))
        for x, y, visibility in keypoints:
            if visibility:
                x, y = _finite((x, y))
                yield place, name, _Point(x, y, FOREGROUND_POINT)
        if len(keypoints) == 0:
            left, top, width, height = _finite(annotation["bbox"])
            yield place, name, _Box(left, top, left + width - 1, top + height - 1)


def _finite(values: Iterable[Any]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{numbers} are not coordinates in pixels")
    return numbers


def _require_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not the name of a file")
    return value


def _parse_label(value: str | int) -> int:
    if int(value) not in (BACKGROUND_POINT, FOREGROUND_POINT):
        raise ValueError(
            f"label {value} is neither {FOREGROUND_POINT} (cable) nor {BACKGROUND_POINT} (background)"
        )
    return int(value)


# --- Masks of labels --------------------------------------------------------------------------

MAX_OUTSIDE = 10  # longest sides of the image that a coordinate of a label may lie outside


def fill_polygons(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Fill polygons, each float (n, 2) with n >= 3, as COCO does; the mask is their union."""
    _require_near(np.concatenate(rings), size)
    encoded = coco_mask.frPyObjects([ring.ravel().tolist() for ring in rings], *size)
    return decode_rle(coco_mask.merge(encoded)["counts"].decode(), size)


def _require_near(points: np.ndarray, size: tuple[int, int]) -> None:
    """Raise FileError if points (n, 2) lie so far outside of the image that they must be wrong."""
    largest = float(np.abs(points).max())
    if largest > MAX_OUTSIDE * max(size):
        raise FileError(f"coordinate {largest:g} lies far outside of the image of {size[0]} x {size[1]}")


def draw_line(points: np.ndarray, width: float, size: tuple[int, int]) -> np.ndarray:
    """Draw a polyline, float (n, 2), with a width in pixels and round ends."""
    _require_near(points, size)
    mask = np.zeros(size, bool)
    for start, end in pairwise(points):
        left, top = np.maximum(np.floor(np.minimum(start, end) - width / 2), 0).astype(int)
        right, bottom = np.maximum(np.ceil(np.maximum(start, end) + width / 2), 0).astype(int)
        window = mask[top:bottom, left:right]
        y, x = np.ogrid[: window.shape[0], : window.shape[1]]  # of the centers of pixels, from `start`
        y, x = y + top + 0.5 - start[1], x + left + 0.5 - start[0]
        dx, dy = end - start
        nearest = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)  # between start and end
        window |= np.hypot(x - nearest * dx, y - nearest * dy) <= width / 2
    return mask


def paste(region: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """Put a bool mask (h, w) into the mask of the whole image; what lies outside is cut off."""
    mask = np.zeros(size, bool)
    bottom, right = min(top + len(region), size[0]), min(left + region.shape[1], size[1])
    if bottom > max(top, 0) and right > max(left, 0):
        inside = region[max(-top, 0) : bottom - top, max(-left, 0) : right - left]
        mask[max(top, 0) : bottom, max(left, 0) : right] = inside
    return mask


def expand_runs(counts: Iterable[int], size: tuple[int, int]) -> np.ndarray:
    """The mask, bool (h, w), of run lengths along its rows: background first, then foreground, in turn."""
    runs = list(counts)
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise FileError(f"RLE of {sum(runs)} pixels, expected {size[0]} x {size[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size)


def decode_rle(counts: list[int] | str, size: tuple[int, int]) -> np.ndarray:
    """The mask, bool (h, w), of an RLE of COCO: run lengths along the columns, or a compressed text of them.

    pycocotools decodes them too, but writes beyond its memory if they are damaged.
    """
    runs = _decompress_runs(counts) if isinstance(counts, str) else counts
    return expand_runs(runs, (size[1], size[0])).T


def _decompress_runs(text: str) -> list[int]:
    """The run lengths of a compressed RLE of COCO.

    A run length is written as the difference to the one before the last, in characters of 5 bits and one bit
    that says whether more follow. Source: rleFrString in cocoapi/common/maskApi.c.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise FileError(f"compressed RLE with the character {character!r}")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise FileError("compressed RLE that is cut off")
    return counts


def decode_brush(data: list[int], size: tuple[int, int]) -> np.ndarray:
    """The mask of a brush stroke of Label Studio: where the alpha channel of an RGBA image is above half.

    The bytes are a stream of bits: 32 for the number of values, 5 for the length of a value, 4 x 4 for the
    lengths of counts (lengths are in bits, less one). Then follow blocks: 1 bit for "repeated", 2 for which
    length the count has, the count less one, and one value or as many as counted.
    Source: https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack, the encoder of Label Studio.
    """
    bits = f"{int.from_bytes(bytes(data), 'big'):0{8 * len(data)}b}"
    position = 0

    def read(length: int) -> int:
        nonlocal position
        position += length
        return int(bits[position - length : position], 2)

    try:
        n_values, word = read(32), read(5) + 1
        if n_values != 4 * size[0] * size[1] or word != 8:
            raise FileError(f"brush of {n_values} values of {word} bits, expected 4 x {size[0]} x {size[1]}")
        lengths = [read(4) + 1 for _ in range(4)]
        values = np.zeros(n_values, np.uint8)
        start = 0
        while start < n_values:
            repeated, which = read(1), read(2)
            end = start + 1 + read(lengths[which])
            values[start:end] = read(word) if repeated else [read(word) for _ in range(start, end)]
            start = end
    except ValueError as error:  # the bits end too early
        raise FileError("brush whose RLE is cut off") from error
    return values.reshape(*size, 4)[..., 3] > 127


# --- Polygons and run lengths of a mask -------------------------------------------------------


class RunLengths(TypedDict):
    """The compressed RLE of COCO of a mask (h, w); `size` is [h, w]."""

    size: list[int]
    counts: str


class Region(TypedDict):
    """One connected region of a mask, in the form of a COCO annotation.

    segmentation: one polygon, as the flat list x1, y1, x2, y2, ..., or run lengths.
    bbox: left, top, width, height in pixels.
    area: number of pixels.
    """

    segmentation: list[list[float]] | RunLengths
    bbox: list[int]
    area: int


def run_lengths(mask: np.ndarray, min_area: int = 1) -> list[Region]:
    """Describe every connected region (with diagonal neighbors) of a bool mask (H, W) by run lengths.

    Regions of fewer than `min_area` pixels are left out.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    regions: list[Region] = []
    for region in range(1, count):
        *bbox, area = (int(value) for value in stats[region])
        if area >= min_area:
            rle = coco_mask.encode(np.asfortranarray(labels == region, np.uint8))
            run: RunLengths = {"size": list(mask.shape), "counts": rle["counts"].decode()}
            regions.append({"segmentation": run, "bbox": bbox, "area": area})
    return regions


def polygons(mask: np.ndarray, min_area: int = 1) -> list[Region]:
    """Describe every connected region (with diagonal neighbors) of a bool mask (H, W) by one polygon.

    Regions of fewer than `min_area` pixels are left out.

    A COCO polygon has no holes, but a cable that crosses itself encloses some: each hole is joined to the
    outline by a slit of zero width. The origin is the outer corner of the first pixel, as in COCO. The
    polygons, filled by the even-odd rule, are exactly the mask.
    """
    padded = np.pad(mask, 1)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(padded.astype(np.uint8), connectivity=8)
    rings: list[list[np.ndarray]] = [[] for _ in range(count)]
    for contour in find_contours(padded.astype(float), 0.5, fully_connected="high"):
        # Every point of a contour lies between a pixel of the region and one of the background, label 0.
        neighbors = np.floor(contour[0]).astype(int), np.ceil(contour[0]).astype(int)
        region = max(labels[tuple(neighbor)] for neighbor in neighbors)
        points = np.ascontiguousarray(contour[:-1, ::-1], np.float32)
        rings[region].append(cv2.approxPolyDP(points, TOLERANCE, closed=True)[:, 0])
    regions: list[Region] = []
    for region in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[region])
        if area < min_area:
            continue
        segmentation = np.round(_join(rings[region]).astype(float) - 0.5, 2)  # without the padding
        regions.append(
            {
                "segmentation": [segmentation.ravel().tolist()],
                "bbox": [left - 1, top - 1, width, height],
                "area": area,
            }
        )
    return regions


def _join(rings: list[np.ndarray]) -> np.ndarray:
    """Join rings of corners (n, 2) to one, by a slit to each but the first: traversed in both directions."""
    if len(rings) == 1:
        return rings[0]
    corners = np.concatenate(rings)
    starts = np.cumsum([0, *(len(ring) for ring in rings)])
    successor = np.arange(1, len(corners) + 1)  # the corner after each corner
    successor[starts[1:] - 1] = starts[:-1]
    corner_of, following = list(range(len(corners))), successor.tolist()
    for a, b in _shortest_slits(corners, np.repeat(np.arange(len(rings)), np.diff(starts))):
        # From a to the other ring, around it until b, and back to a. Both corners are then passed twice.
        second_a, second_b = len(corner_of), len(corner_of) + 1
        corner_of += [a, b]
        following += [following[a], following[b]]
        following[a], following[b] = second_b, second_a
    order = [0]
    while (node := following[order[-1]]) != 0:
        order.append(node)
    return corners[np.array(corner_of)[order]]


def _shortest_slits(corners: np.ndarray, ring_of: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of corners that join all rings with the smallest total length.

    They are a minimum spanning tree of the rings. A Delaunay triangulation contains all its edges, so no
    other pairs of corners need to be compared.

    Args:
        corners: (n, 2), of all rings.
        ring_of: (n,), the number of the ring of each corner.
    """
    edges = Delaunay(corners).simplices[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    edges = edges[ring_of[edges[:, 0]] != ring_of[edges[:, 1]]]
    edges = edges[np.linalg.norm(corners[edges[:, 0]] - corners[edges[:, 1]], axis=1).argsort()]
    pairs, shortest = np.unique(np.sort(ring_of[edges], axis=1), axis=0, return_index=True)
    count = ring_of[-1] + 1
    tree = minimum_spanning_tree(coo_array((shortest + 1, pairs.T), shape=(count, count)))
    assert tree.nnz == count - 1, "a triangulation connects all its corners"
    return [(int(a), int(b)) for a, b in edges[tree.data.astype(int) - 1]]


def coco_document(images: Iterable[tuple[str, tuple[int, int], list[Region]]]) -> dict[str, list[Any]]:
    """Build a COCO document from the file name, the size (h, w) and the regions of each image."""
    image_entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, (height, width), regions) in enumerate(images, 1):
        image_entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for region in regions:
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            annotations.append({**ids, **region})
    categories = [{"id": 1, "name": "cable"}]
    return {"images": image_entries, "annotations": annotations, "categories": categories}
