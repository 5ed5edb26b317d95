"""Files of other tools: prompts from CSV or COCO files, and masks as COCO polygons."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import Delaunay
from skimage.measure import find_contours

from imaging.files import FileError
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
# pixels, so that no pixel is lost or won.
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


def read_prompts(path: Path) -> dict[str, list[Prompt]]:
    """Read the prompts of each image, by the stem of the image: one for all its points, one for each box.

    A CSV file has a header and one row per point (`image,x,y`, and optionally `label`: 1 for cable, 0 for
    background) or per box (`image,x1,y1,x2,y2`). It may be separated by semicolons or tabs, and then have
    decimal commas. In a COCO file, an annotation gives its visible
    keypoints, or its box if it has no keypoints. All coordinates are pixels of the image.

    Raises FileError, which says what is wrong with the file and what is expected.
    """
    points: dict[str, list[_Point]] = {}
    prompts: dict[str, list[Prompt]] = {}
    for image_name, item in _read_items(path):
        stem = Path(image_name).stem
        if isinstance(item, _Point):
            points.setdefault(stem, []).append(item)
        else:
            corners = np.array(item, np.float32).reshape(2, 2)
            labels = np.array([BOX_CORNER_1, BOX_CORNER_2], np.int64)
            prompts.setdefault(stem, []).append(Prompt(corners, labels))
    for stem, items in points.items():
        # SAM ends points without a box with a point of the label NOT_A_POINT.
        array = np.array([*items, _Point(0, 0, NOT_A_POINT)], np.float32)
        prompts.setdefault(stem, []).append(Prompt(array[:, :2], array[:, 2].astype(np.int64)))
    return prompts


def _read_items(path: Path) -> list[tuple[str, _Point | _Box]]:
    """Read the points and boxes of a file, with the name of their image; raises FileError."""
    read = _read_coco if path.suffix.lower() == ".json" else _read_csv
    try:
        return list(read(path))
    except OSError as error:
        raise FileError(f"--prompt {path}: cannot be read ({error})") from error
    except KeyError as error:
        raise FileError(f"--prompt {path}: {error} is missing; {EXPECTED}") from error
    except (
        ValueError,
        TypeError,
        RecursionError,
        csv.Error,
    ) as error:  # a value of a wrong kind, or no CSV or JSON at all
        raise FileError(f"--prompt {path}: {error}; {EXPECTED}") from error


def _read_csv(path: Path) -> Iterator[tuple[str, _Point | _Box]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=header.count)
        rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
        if rows.fieldnames is None or "image" not in rows.fieldnames:
            raise ValueError(f"its header is {rows.fieldnames}")
        is_box = "x1" in rows.fieldnames
        for row in rows:
            name = _require_text(row["image"])
            texts = [row[column] or "" for column in (("x1", "y1", "x2", "y2") if is_box else ("x", "y"))]
            numbers = _finite(text if delimiter == "," else text.replace(",", ".") for text in texts)
            if is_box:
                yield name, _Box(*numbers)
            else:
                x, y = numbers
                yield name, _Point(x, y, _parse_label(row.get("label") or FOREGROUND_POINT))


def _read_coco(path: Path) -> Iterator[tuple[str, _Point | _Box]]:
    document = json.loads(path.read_bytes())
    names = {image["id"]: _require_text(image["file_name"]) for image in document["images"]}
    for annotation in document["annotations"]:
        if annotation["image_id"] not in names:
            raise ValueError(f"an annotation has image_id {annotation['image_id']}, but no image has this id")
        name = names[annotation["image_id"]]
        keypoints = np.reshape(annotation.get("keypoints", []), (-1, 3))
        for x, y, visibility in keypoints:
            if visibility:
                x, y = _finite((x, y))
                yield name, _Point(x, y, FOREGROUND_POINT)
        if len(keypoints) == 0:
            left, top, width, height = _finite(annotation["bbox"])
            yield name, _Box(left, top, left + width - 1, top + height - 1)


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


# --- Polygons ---------------------------------------------------------------------------------


class Region(TypedDict):
    """One connected region of a mask, in the form of a COCO annotation.

    segmentation: one polygon, as the flat list x1, y1, x2, y2, ...
    bbox: left, top, width, height in pixels.
    area: number of pixels.
    """

    segmentation: list[list[float]]
    bbox: list[int]
    area: int


def polygons(mask: np.ndarray) -> list[Region]:
    """Describe every connected region (with diagonal neighbors) of a bool mask (H, W) by one polygon.

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
    """Join rings of corners (n, 2) to one, by a slit to each but the first: there and back on one line."""
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
    """Build a COCO document from the file name, the size (h, w) and the `polygons` of each image."""
    image_entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, (height, width), regions) in enumerate(images, 1):
        image_entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for region in regions:
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            annotations.append({**ids, **region})
    categories = [{"id": 1, "name": "cable"}]
    return {"images": image_entries, "annotations": annotations, "categories": categories}
