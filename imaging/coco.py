"""Other tools' files: prompts from CSV or COCO, masks to COCO's polygons."""

import csv
import json
from pathlib import Path

import numpy as np
from skimage.measure import approximate_polygon, find_contours, label, regionprops

from base.errors import UserError
from inference import Prompt
from sam.point_labels import BOX_CORNER_1, BOX_CORNER_2, NOT_A_POINT

TOLERANCE = 0.25  # pixels that a polygon may be off its mask's edge


# --- Prompts ----------------------------------------------------------------------------------


def read_prompts(path: Path) -> dict[str, list[Prompt]]:
    """The prompts of each picture, by its stem: all its points are one prompt, every box is one.

    A CSV has a header and rows of points (`image,x,y`, with `label` 0 for background if need be) or of
    boxes (`image,x1,y1,x2,y2`); a COCO file has the boxes of its annotations and their keypoints. All in
    pixels of the picture. Raises ValueError or OSError naming the file and what is wrong.
    """
    read = _read_coco if path.suffix.lower() == ".json" else _read_csv
    points, prompts = {}, {}
    try:
        for image, numbers in read(path):
            if len(numbers) == 4:
                corners = np.array(numbers, np.float32).reshape(2, 2)
                labels = np.array([BOX_CORNER_1, BOX_CORNER_2])
                prompts.setdefault(Path(image).stem, []).append(Prompt(corners, labels))
            else:
                points.setdefault(Path(image).stem, []).append(numbers)
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"--prompt {path}: {error}; expected a CSV with the header image,x,y[,label] or "
            "image,x1,y1,x2,y2, or a COCO file with boxes or keypoints"
        ) from error
    for stem, rows in points.items():
        array = np.array([*rows, (0, 0, NOT_A_POINT)], np.float32)  # SAM ends points without a box so
        prompts.setdefault(stem, []).append(Prompt(array[:, :2], array[:, 2].astype(np.int64)))
    return prompts


def _read_csv(path: Path):
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or "image" not in rows.fieldnames:
            raise ValueError(f"its header is {rows.fieldnames}")
        is_box = "x1" in rows.fieldnames
        for row in rows:
            if is_box:
                yield row["image"], _finite(row[name] for name in ("x1", "y1", "x2", "y2"))
            else:
                yield row["image"], (*_finite((row["x"], row["y"])), _label(row.get("label") or 1))


def _read_coco(path: Path):
    document = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for annotation in document["annotations"]:
        name = names[annotation["image_id"]]
        keypoints = np.reshape(annotation.get("keypoints", []), (-1, 3))
        for x, y, visible in keypoints:
            if visible:
                yield name, (*_finite((x, y)), 1)
        if len(keypoints) == 0:
            x, y, width, height = _finite(annotation["bbox"])
            yield name, (x, y, x + width - 1, y + height - 1)


def _finite(values) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{numbers} are not numbers of pixels")
    return numbers


def _label(value: str | int) -> int:
    if int(value) not in (0, 1):
        raise ValueError(f"label {value} is neither 1, cable, nor 0, background")
    return int(value)


# --- Polygons ---------------------------------------------------------------------------------


def polygons(mask: np.ndarray) -> list[dict]:
    """COCO's `segmentation`, `bbox` and `area` of every connected part of a bool mask (H, W).

    COCO's polygons have no holes, but a cable that crosses itself does: each hole is joined to the edge
    around it by a cut without width. Coordinates are COCO's: (0, 0) is the corner of the first pixel.
    """
    found = []
    for region in regionprops(label(mask, connectivity=2)):
        top, left, bottom, right = region.bbox
        contours = find_contours(np.pad(region.image, 1).astype(float), 0.5, fully_connected="high")
        rings = [approximate_polygon(contour, TOLERANCE)[:-1, ::-1] - 0.5 for contour in contours]
        outer, *holes = sorted(rings, key=lambda ring: np.ptp(ring, axis=0).prod(), reverse=True)
        for hole in holes:
            outer = _join(outer, hole)
        found.append(
            {
                "segmentation": [np.round(outer + np.array([left, top]), 2).ravel().tolist()],
                "bbox": [left, top, right - left, bottom - top],
                "area": int(region.area),
            }
        )
    return found


def _join(ring: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """One ring (n, 2) of two, there and back along the shortest way from a corner of one to the other's."""
    distances = np.linalg.norm(ring[:, None] - hole[None], axis=2)
    here, there = np.unravel_index(distances.argmin(), distances.shape)
    around = np.concatenate([hole[there:], hole[: there + 1]])
    return np.concatenate([ring[: here + 1], around, ring[here:]])


def coco_document(pictures: list[tuple[str, tuple[int, int], list[dict]]]) -> dict:
    """A COCO file of pictures, each with its file's name, its (h, w), and its `polygons`."""
    images, annotations = [], []
    for number, (name, (height, width), parts) in enumerate(pictures, 1):
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for part in parts:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append(ids | part)
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cable"}]}
