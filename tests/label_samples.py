"""Exports of labeling tools, written as each tool writes them, with masks that are known.

Each function writes images and labels to a new folder. The images are those of `TRUTH`.
"""

import base64
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 60, 80
CABLES = {  # left, top, right, bottom of each cable
    "desk 1.jpg": [(5, 10, 70, 14), (30, 20, 34, 50)],
    "desk-2.png": [(0, 40, 80, 47)],
}


def cable_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


TRUTH = {name: np.any([cable_mask(box) for box in boxes], axis=0) for name, boxes in CABLES.items()}


def corners(box: tuple[int, int, int, int]) -> list[list[float]]:
    """The corners of a cable, and one more in the middle of a side."""
    left, top, right, bottom = map(float, box)
    return [[left, top], [(left + right) / 2, top], [right, top], [right, bottom], [left, bottom]]


def flat(box: tuple[int, int, int, int]) -> list[float]:
    return [value for point in corners(box) for value in point]


def write_images(folder: Path, names: dict[str, str] | None = None) -> None:
    """Write the images, under other names if `names` says so."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, mask in TRUTH.items():
        image = rng.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        image[mask] = (200, 60, 40)
        Image.fromarray(image).save(folder / (names or {}).get(name, name))


def row_runs(mask: np.ndarray) -> list[int]:
    """Run lengths along the rows, background first."""
    padded = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    changes = np.flatnonzero(padded[1:] != padded[:-1])
    return np.diff(changes, prepend=0).tolist()


# --- COCO: https://cocodataset.org/#format-data ---


def write_coco(folder: Path, segment=lambda box: [flat(box)]) -> Path:
    """As CVAT and Roboflow export it: annotations/instances_default.json, and images/ beside it."""
    write_images(folder / "images/default")
    images = [
        {"id": number, "width": WIDTH, "height": HEIGHT, "file_name": name, "license": 0, "date_captured": 0}
        for number, name in enumerate(CABLES, 1)
    ]
    annotations = []
    for number, boxes in enumerate(CABLES.values(), 1):
        for left, top, right, bottom in boxes:
            area = (right - left) * (bottom - top)
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 7, "area": area}
            entry |= {"bbox": [left, top, right - left, bottom - top], "iscrowd": 0}
            annotations.append(entry | {"segmentation": segment((left, top, right, bottom))})
    categories = [{"id": 7, "name": "cable", "supercategory": ""}]
    document = {"licenses": [], "info": {}, "categories": categories, "images": images}
    (folder / "annotations").mkdir()
    path = folder / "annotations/instances_default.json"
    path.write_text(json.dumps(document | {"annotations": annotations}))
    return path


def write_coco_rle(folder: Path) -> Path:
    """Run lengths along columns, as lists; COCO has them for crowds."""
    return write_coco(folder, lambda box: {"size": [HEIGHT, WIDTH], "counts": row_runs(cable_mask(box).T)})


def write_coco_compressed(folder: Path) -> Path:
    """Compressed run lengths, as pycocotools writes them."""

    def segment(box):
        rle = coco_mask.encode(np.asfortranarray(cable_mask(box).astype(np.uint8)))
        return {"size": rle["size"], "counts": rle["counts"].decode()}

    return write_coco(folder, segment)


# --- labelme: https://github.com/wkentaro/labelme, labelme/label_file.py ---


def labelme_shape(box: tuple[int, int, int, int], **keys) -> dict:
    shape = {"label": "cable", "points": corners(box), "group_id": None, "description": ""}
    return shape | {"shape_type": "polygon", "flags": {}, "mask": None} | keys


def write_labelme(folder: Path, make_shape=labelme_shape) -> Path:
    """A JSON file beside each image; here labelme ran on Windows, in another folder than the images."""
    write_images(folder / "photos")
    (folder / "json").mkdir()
    for name, boxes in CABLES.items():
        document = {"version": "5.5.0", "flags": {}, "shapes": [make_shape(box) for box in boxes]}
        document |= {"imagePath": f"..\\photos\\{name}", "imageData": None}
        document |= {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / "json" / Path(name).with_suffix(".json")).write_text(json.dumps(document))
    return folder


def write_labelme_masks(folder: Path) -> Path:
    """Regions that the AI tools of labelme draw: a PNG of their box, whose last pixel is `points[1]`."""

    def make_shape(box):
        left, top, right, bottom = box
        region = cv2.imencode(".png", np.ones((bottom - top, right - left), np.uint8))[1].tobytes()
        points = [[left, top], [right - 1, bottom - 1]]
        return labelme_shape(box, points=points, shape_type="mask", mask=base64.b64encode(region).decode())

    return write_labelme(folder, make_shape)


# --- YOLO: https://docs.ultralytics.com/datasets/segment/ ---


def write_yolo(folder: Path) -> Path:
    """As Roboflow exports it: data.yaml, train/images and train/labels."""
    write_images(folder / "train/images")
    (folder / "train/labels").mkdir()
    for name, boxes in CABLES.items():
        fractions = [np.array(corners(box)) / (WIDTH, HEIGHT) for box in boxes]
        lines = [" ".join(["0", *(f"{value:.8g}" for value in points.ravel())]) for points in fractions]
        (folder / "train/labels" / Path(name).with_suffix(".txt")).write_text("\n".join(lines))
    (folder / "data.yaml").write_text("train: ../train/images\nnc: 1\nnames: ['cable']\n")
    return folder


# --- CVAT: https://docs.cvat.ai/docs/other/xml_format ---


def cvat_polygon(box: tuple[int, int, int, int]) -> str:
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in corners(box))
    return f'<polygon label="cable" source="manual" occluded="0" points="{points}" z_order="0"></polygon>'


def write_cvat(folder: Path, element=cvat_polygon) -> Path:
    """The format "CVAT for images 1.1": annotations.xml and images/."""
    write_images(folder / "images")
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>',
        "<annotations>",
        "<version>1.1</version>",
        "<meta></meta>",
    ]
    for number, (name, boxes) in enumerate(CABLES.items()):
        parts.append(f'<image id="{number}" name="{name}" width="{WIDTH}" height="{HEIGHT}">')
        parts += [element(box) for box in boxes] + ["</image>"]
    path = folder / "annotations.xml"
    path.write_text("\n".join([*parts, "</annotations>"]))
    return path


def cvat_mask(box: tuple[int, int, int, int]) -> str:
    """The run lengths of the box around a region, here a pixel larger at each side that is in the image."""
    left, top, right, bottom = box
    left, top = max(left - 1, 0), max(top - 1, 0)
    region = cable_mask(box)[top : bottom + 1, left : right + 1]
    rle = ", ".join(map(str, row_runs(region)))
    place = f'left="{left}" top="{top}" width="{region.shape[1]}" height="{region.shape[0]}"'
    return f'<mask label="cable" source="manual" occluded="0" rle="{rle}" {place} z_order="0"></mask>'


def write_cvat_masks(folder: Path) -> Path:
    return write_cvat(folder, cvat_mask)


# --- Label Studio: https://labelstud.io/guide/export#Label-Studio-JSON-format ---


def studio_polygon(box: tuple[int, int, int, int]) -> dict:
    points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in corners(box)]
    return {"type": "polygonlabels", "value": {"points": points, "closed": True, "polygonlabels": ["cable"]}}


def studio_brush(box: tuple[int, int, int, int]) -> dict:
    alpha = cable_mask(box)[..., None] * np.full(4, 255, np.uint8)
    value = {"format": "rle", "rle": list(encode_brush(alpha.ravel())), "brushlabels": ["cable"]}
    return {"type": "brushlabels", "value": value}


def encode_brush(values: np.ndarray) -> bytes:
    """Encode bytes as Label Studio does with rle-pack: https://github.com/thi-ng/umbrella"""
    sizes = (3, 4, 8, 16)
    bits = [f"{len(values):032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in sizes)]

    def add_block(repeated: bool, block: np.ndarray) -> None:
        index = next(i for i, size in enumerate(sizes) if len(block) <= 1 << size)
        bits.append(f"{repeated:b}{index:02b}{len(block) - 1:0{sizes[index]}b}")
        bits.extend(f"{value:08b}" for value in block[: 1 if repeated else None])

    literals: list[int] = []
    for run in np.split(values, np.flatnonzero(np.diff(values)) + 1):
        if len(run) < 3:
            literals.extend(run)
            continue
        if literals:
            add_block(False, np.array(literals))
            literals.clear()
        for start in range(0, len(run), 1 << sizes[-1]):
            add_block(True, run[start : start + (1 << sizes[-1])])
    if literals:
        add_block(False, np.array(literals))
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def write_studio(folder: Path, make_result=studio_polygon) -> Path:
    """The format JSON; uploaded images get a random prefix, and spaces in their names become %20."""
    write_images(folder / "media", {name: f"1a2b3c4d-{name}" for name in ("desk 1.jpg",)})
    tasks = []
    for number, (name, boxes) in enumerate(CABLES.items(), 1):
        result = [
            {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "from_name": "label"}
            | {"to_name": "image", "id": f"r{index}", "origin": "manual", **make_result(box)}
            for index, box in enumerate(boxes)
        ]
        prefix = "1a2b3c4d" if number == 1 else "5e6f7a8b"  # the second image has its own name on this disk
        upload = f"{prefix}-{name}"
        image = "/data/upload/3/" + upload.replace(" ", "%20")
        task = {
            "id": number,
            "data": {"image": image},
            "file_upload": upload,
            "predictions": [],
            "project": 3,
        }
        annotation = {"id": number, "completed_by": 1, "result": result, "was_cancelled": False}
        tasks.append(task | {"annotations": [annotation]})
    path = folder / "project-3.json"
    path.write_text(json.dumps(tasks))
    return path


def write_studio_brush(folder: Path) -> Path:
    return write_studio(folder, studio_brush)


# --- PASCAL VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html ---


def write_voc(folder: Path) -> Path:
    """As CVAT exports "Segmentation mask 1.1": labelmap.txt, palette masks of classes and of objects."""
    write_images(folder / "JPEGImages")
    palette = [0, 0, 0, 250, 50, 83, 51, 221, 255] + [0] * 759
    for kind in ("SegmentationClass", "SegmentationObject"):
        (folder / kind).mkdir()
        for name, boxes in CABLES.items():
            indices = np.zeros((HEIGHT, WIDTH), np.uint8)
            for number, box in enumerate(boxes):
                indices[cable_mask(box)] = 1 + number * (kind == "SegmentationObject")
            image = Image.fromarray(indices).convert("P")
            image.putpalette(palette)
            image.save(folder / kind / Path(name).with_suffix(".png"))
    labelmap = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncable:250,50,83::\n"
    (folder / "labelmap.txt").write_text(labelmap)
    return folder


# --- Masks that are named like their image ---


def write_named_masks(folder: Path) -> Path:
    """One mask per cable, beside the images: `x_mask_1.png`, `x_mask_2.png`."""
    write_images(folder)
    for name, boxes in CABLES.items():
        for number, box in enumerate(boxes, 1):
            path = folder / f"{Path(name).stem}_mask_{number}.png"
            Image.fromarray(cable_mask(box).astype(np.uint8) * 255).save(path)
    return folder


# Each writer by the name of its folder, with the format that it writes.
WRITERS = {
    "coco": (write_coco, "coco"),
    "coco_rle": (write_coco_rle, "coco"),
    "coco_compressed": (write_coco_compressed, "coco"),
    "labelme": (write_labelme, "labelme"),
    "labelme_masks": (write_labelme_masks, "labelme"),
    "yolo": (write_yolo, "yolo"),
    "cvat": (write_cvat, "cvat"),
    "cvat_masks": (write_cvat_masks, "cvat"),
    "label_studio": (write_studio, "labelstudio"),
    "label_studio_brush": (write_studio_brush, "labelstudio"),
    "voc": (write_voc, "voc"),
    "masks": (write_named_masks, "suffix"),
}
