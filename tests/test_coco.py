"""Prompts from CSV and COCO; masks of labels; polygons that are the masks they were made of."""

import json
import time

import cv2
import numpy as np
import pytest
from label_samples import encode_brush
from pycocotools import mask as coco_mask
from skimage.draw import polygon2mask

from base.errors import UserError
from imaging.coco import (
    coco_document,
    decode_brush,
    decode_rle,
    draw_line,
    paste,
    polygons,
    read_prompts,
    run_lengths,
)
from sam.point_labels import BACKGROUND_POINT, BOX_CORNER_1, BOX_CORNER_2, FOREGROUND_POINT, NOT_A_POINT

NO_SIZES = {}.get


def fill(part, size):
    """What COCO's tools fill: even-odd, by pixels' centers."""
    (ring,) = part["segmentation"]
    x, y = np.array(ring).reshape(-1, 2).T
    return polygon2mask(size, np.column_stack([y - 0.5, x - 0.5]))


def fill_fast(ring, size):
    """The same in linear time: every edge toggles all pixels on its right."""
    start = np.array(ring).reshape(-1, 2) - 0.5
    end = np.roll(start, -1, axis=0)
    first = np.ceil(np.minimum(start[:, 1], end[:, 1])).astype(int)
    n_rows = np.ceil(np.maximum(start[:, 1], end[:, 1])).astype(int) - first
    edge = np.repeat(np.arange(len(start)), n_rows)
    row = first[edge] + np.arange(len(edge)) - (np.cumsum(n_rows) - n_rows)[edge]
    share = (row - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    column = np.ceil(start[edge, 0] + share * (end[edge, 0] - start[edge, 0])).astype(int)
    toggles = np.zeros((size[0], size[1] + 1), np.int64)
    np.add.at(toggles, (row, column), 1)
    return np.cumsum(toggles, axis=1)[:, :-1] % 2 == 1


def test_a_loop_of_cable_keeps_its_hole():
    mask = np.zeros((120, 160), np.uint8)
    cv2.ellipse(mask, (70, 60), (40, 30), 20, 0, 360, 1, 4)
    cv2.line(mask, (0, 60), (159, 100), 1, 3)  # crosses the loop: several holes
    mask = mask.astype(bool)
    (part,) = polygons(mask)
    filled = fill(part, mask.shape)
    assert np.count_nonzero(filled & mask) / np.count_nonzero(filled | mask) > 0.97
    assert part["area"] == mask.sum() and part["bbox"][0] == 0


def test_many_loops_of_a_large_mask_are_exact_and_fast():
    """The time must not grow with the square of the corners: it was minutes for this mask."""
    random, mask = np.random.default_rng(0), np.zeros((1500, 2000), np.uint8)
    for _ in range(16):
        angles = np.linspace(0, 2 * np.pi, 400) * random.uniform(1, 6, (2, 1)) + random.uniform(0, 6, (2, 1))
        curve = np.array([[1000], [750]]) * (1 + 0.9 * np.sin(angles))
        cv2.polylines(mask, [curve.T.astype(np.int32)], False, 1, 9)
    start = time.process_time()
    parts = polygons(mask.astype(bool))
    assert time.process_time() - start < 20
    assert sum(len(part["segmentation"][0]) for part in parts) > 50_000
    filled = np.zeros(mask.shape, bool)
    for part in parts:
        filled ^= fill_fast(part["segmentation"][0], mask.shape)
    np.testing.assert_array_equal(filled, mask.astype(bool))


@pytest.mark.parametrize("seed", range(20))
def test_polygons_of_noise_are_exact(seed):
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 60, 2)) < random.random()
    filled = np.zeros(mask.shape, bool)
    for part in polygons(mask):
        filled ^= fill_fast(part["segmentation"][0], mask.shape)
    np.testing.assert_array_equal(filled, mask)


def test_thin_lines_keep_their_width_and_place():
    mask = np.zeros((40, 60), bool)
    mask[10:12, 5:50] = True
    mask[30, 20:60] = True  # of one pixel, up to the frame
    parts = polygons(mask)
    assert [part["bbox"] for part in parts] == [[5, 10, 45, 2], [20, 30, 40, 1]]
    for part in parts:
        x, y = np.array(part["segmentation"][0]).reshape(-1, 2).T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        assert area == pytest.approx(part["area"], abs=1)
        left, top, width, height = part["bbox"]
        assert (x.min(), y.min(), np.ptp(x), np.ptp(y)) == (left, top, width, height)


def test_run_lengths_describe_the_same_regions_as_polygons():
    mask = np.zeros((40, 60), bool)
    mask[5:30, 5:8] = mask[10:12, 3:50] = True
    mask[35, 20:24] = True
    parts, runs = polygons(mask), run_lengths(mask)
    assert [(part["bbox"], part["area"]) for part in parts] == [(run["bbox"], run["area"]) for run in runs]
    decoded = [decode_rle(run["segmentation"]["counts"], mask.shape) for run in runs]
    np.testing.assert_array_equal(np.any(decoded, axis=0), mask)
    assert [int(region.sum()) for region in decoded] == [run["area"] for run in runs] == [163, 4]
    json.dumps(coco_document([("a.png", mask.shape, runs)]))


def test_regions_below_the_smallest_area_are_left_out():
    mask = np.zeros((20, 20), bool)
    mask[2, 2:6] = mask[8, 2:7] = mask[14, 2:8] = True
    for describe in (polygons, run_lengths):
        assert [region["area"] for region in describe(mask)] == [4, 5, 6]
        assert [region["area"] for region in describe(mask, min_area=5)] == [5, 6]
        assert describe(mask, min_area=7) == []


def test_pixels_that_touch_at_a_corner_are_one_region():
    assert len(polygons(np.eye(6, dtype=bool))) == 1
    assert polygons(np.zeros((5, 5), bool)) == []


def test_the_document_ties_regions_to_their_images():
    mask = np.zeros((9, 9), bool)
    mask[1:3] = mask[5:7] = True
    document = coco_document([("a.png", (9, 9), []), ("b.jpg", mask.shape, polygons(mask))])
    assert [image["file_name"] for image in document["images"]] == ["a.png", "b.jpg"]
    assert [part["image_id"] for part in document["annotations"]] == [2, 2]
    assert len({part["id"] for part in document["annotations"]}) == 2
    json.dumps(document)


def test_points_of_a_csv_are_one_prompt_per_image(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("image,x,y,label\na.png,3,4,1\nb.png,1,1,\na.png,5.5,6,0\n")
    prompts = read_prompts(path, NO_SIZES)
    (prompt,) = prompts["a"]
    assert prompt.points[:2].tolist() == [[3, 4], [5.5, 6]]
    assert prompt.labels.tolist() == [FOREGROUND_POINT, BACKGROUND_POINT, NOT_A_POINT]
    assert prompts["b"][0].labels.tolist() == [FOREGROUND_POINT, NOT_A_POINT]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffimage,x,y,label\na.png,3.5,4,0\n",  # with a byte order mark, as Excel writes it
        "\ufeffimage;x;y;label\r\na.png;3,5;4;0\r\n",
        "image; x; y; label\na.png; 3.5; 4; 0\n",
        "image\tx\ty\tlabel\na.png\t3,5\t4\t0\n",
    ],
)
def test_csv_files_as_spreadsheets_write_them(tmp_path, text):
    path = tmp_path / "points.csv"
    path.write_bytes(text.encode())
    (prompt,) = read_prompts(path, NO_SIZES)["a"]
    assert prompt.points[0].tolist() == [3.5, 4] and prompt.labels[0] == BACKGROUND_POINT


def test_a_comma_in_a_number_of_a_csv_with_commas_is_refused(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text('image,x,y\na.png,"1,234",4\n')
    with pytest.raises(UserError, match=r"points\.csv: could not convert"):
        read_prompts(path, NO_SIZES)


def test_a_coco_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "boxes.json"
    document = {
        "images": [{"id": 1, "file_name": "ü.png"}],
        "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document).encode())
    assert read_prompts(path, NO_SIZES)["ü"][0].points.tolist() == [[1, 2], [3, 5]]


def test_every_box_is_a_prompt(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("image,x1,y1,x2,y2\na.png,1,2,30,40\na.png,7,6,5,8\n")
    first, second = read_prompts(path, NO_SIZES)["a"]
    assert first.points.tolist() == [[1, 2], [30, 40]]
    assert first.labels.tolist() == [BOX_CORNER_1, BOX_CORNER_2]
    assert second.points.tolist() == [[5, 6], [7, 8]]  # its corners are put in order


def test_coco_boxes_and_keypoints(tmp_path):
    annotations = [
        {"image_id": 7, "bbox": [1, 2, 10, 20]},
        {"image_id": 8, "bbox": [0, 0, 5, 5], "keypoints": [3, 4, 2, 0, 0, 0]},  # the second is not labeled
    ]
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "sub/b.jpg"}]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    prompts = read_prompts(path, NO_SIZES)
    assert prompts["a"][0].points.tolist() == [[1, 2], [10, 21]]
    assert prompts["b"][0].points.tolist() == [[3, 4], [0, 0]]
    assert prompts["b"][0].labels.tolist() == [FOREGROUND_POINT, NOT_A_POINT]


def test_points_with_labels_may_have_other_columns(tmp_path):
    (tmp_path / "p.csv").write_text("image,x,y,label,width,height\na.png,1,2,1,64,48\n")
    assert read_prompts(tmp_path / "p.csv", NO_SIZES)["a"][0].points[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "picture,x,y\na.png,1,2\n"),
        ("p.csv", "image,x,y\na.png,1,here\n"),
        ("p.csv", "image,x,y\na.png,1\n"),
        ("p.csv", "image,x,y\na.png,1,nan\n"),
        ("p.csv", "image,x,y,label\na.png,1,2,7\n"),
        ("p.csv", "image,x1,y1\na.png,1,2\n"),
        ("p.csv", "image,x,y,w,h\na.png,1,2,3,4\n"),
        ("p.csv", "image,x,y,x2,y2\na.png,1,2,3,4\n"),
        ("p.csv", "image;width;height;x;y\na.png;3;4;1;2\n"),
        ("p.csv", ""),
        ("p.csv", "x,y,image\n1,2\n"),
        ("p.json", "{"),
        ("p.json", "[" * 200_000),
        ("p.json", "[]"),
        ("p.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}'),
        ("p.json", '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}'),
        ("p.json", '{"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1}]}'),
        ("p.json", '{"images": {}, "annotations": "none"}'),
    ],
)
def test_files_without_prompts_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .*expected a CSV"):
        read_prompts(tmp_path / name, NO_SIZES)


@pytest.mark.parametrize(
    ("header", "inside", "outside"),
    [
        ("image,x,y", ["0,0", "64,48"], ["64.5,20", "20,-1", "20,49"]),
        (
            "image,x1,y1,x2,y2",
            ["-9,-9,0,0", "60,40,99,99", "-5,-5,99,99"],
            ["65,0,80,9", "0,49,9,60", "-9,0,-1,9"],
        ),
    ],
)
def test_prompts_outside_of_their_image_are_listed(tmp_path, header, inside, outside):
    path, size = tmp_path / "p.csv", {"a": (48, 64)}
    path.write_text("\n".join([header, *(f"a.png,{row}" for row in inside), f"b.png,{outside[0]}"]))
    assert read_prompts(path, size.get).keys() == {"a", "b"}  # the size of b is not known
    path.write_text("\n".join([header, f"a.png,{inside[0]}", *(f"a.png,{row}" for row in outside)]))
    with pytest.raises(
        UserError, match=rf"--prompt .*p\.csv: {len(outside)} point\(s\) or box\(es\)"
    ) as raised:
        read_prompts(path, size.get)
    _, *listed = str(raised.value).splitlines()
    kind = "point" if header == "image,x,y" else "box"
    assert listed == [
        f"  line {line}: {kind} ({row.replace(',', ', ')}) in a.png, which is 64 px wide and 48 px high"
        for line, row in enumerate(outside, 3)
    ]


def test_a_coco_box_outside_of_its_image_is_named(tmp_path):
    path = tmp_path / "p.json"
    annotations = [{"image_id": 7, "bbox": [x, 2, 10, 20]} for x in (-9, -10)]  # one column is inside, none
    images = [{"id": 7, "file_name": "a.jpg"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    with pytest.raises(
        UserError, match=r"p\.json: 1 point.*\n  annotation 2: box \(-10, 2, -1, 21\) in a\.jpg"
    ):
        read_prompts(path, {"a": (48, 64)}.get)


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--prompt .*p\.csv: cannot be read"):
        read_prompts(tmp_path / "p.csv", NO_SIZES)


# --- masks from labels ---


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_are_those_of_pycocotools(seed):
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 90, 2)) < random.random()
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    np.testing.assert_array_equal(decode_rle(rle["counts"].decode(), mask.shape), mask)


@pytest.mark.parametrize("text", ["", "5`1", "`````", "zz", "P", "5 1"])
def test_damaged_run_lengths_are_refused(text):
    with pytest.raises(UserError, match="RLE"):
        decode_rle(text, (10, 10))


@pytest.mark.parametrize("soft", [False, True], ids=["runs", "single values"])
def test_a_brush_of_label_studio_is_decoded(soft):
    random = np.random.default_rng(0)
    alpha = random.integers(0, 256, (40, 50)) if soft else 255 * (random.random((40, 50)) < 0.02)
    alpha[10:30] = 255
    values = np.repeat(alpha[..., None], 4, axis=2).astype(np.uint8)
    data = list(encode_brush(values.ravel()))
    np.testing.assert_array_equal(decode_brush(data, (40, 50)), alpha > 127)
    with pytest.raises(UserError, match="brush whose RLE is cut off"):
        decode_brush(data[:-5], (40, 50))
    with pytest.raises(UserError, match="expected 4 x 40 x 51"):
        decode_brush(data, (40, 51))


def test_the_encoder_of_the_brush_begins_as_the_files_of_label_studio():
    # The first bytes of a published export of 3332 x 2527 pixels, which begins with background:
    # https://huggingface.co/datasets/alkzar90/cell_benchmark, label_JSON.json
    published = [2, 1, 233, 240, 57, 27, 255, 255, 255, 0, 255, 255, 224, 31, 255, 252, 3]
    assert list(encode_brush(np.zeros(4 * 2527 * 3332, np.uint8)))[: len(published)] == published


def test_a_region_may_lie_partly_outside_of_the_image():
    whole = np.zeros((9, 9), bool)
    whole[2:6, 3:8] = True
    for left, top in ((0, 0), (-4, -3), (6, 5), (-20, 0), (0, 30)):
        expected = np.zeros((7, 8), bool)
        for y, x in np.argwhere(whole) + np.array([top, left]):
            if 0 <= y < 7 and 0 <= x < 8:
                expected[y, x] = True
        np.testing.assert_array_equal(paste(whole, left, top, (7, 8)), expected)


def test_a_polyline_has_its_width_and_place():
    mask = draw_line(np.array([[5.0, 10.0], [25.0, 10.0], [25.0, 40.0]]), 4, (20, 30))  # leaves the image
    assert np.flatnonzero(mask[:, 15]).tolist() == [8, 9, 10, 11]
    assert np.flatnonzero(mask[18]).tolist() == [23, 24, 25, 26]
    assert np.flatnonzero(mask[9]).tolist() == list(range(3, 27))  # with round ends
    slanted = draw_line(np.array([[10.0, 10.0], [90.3, 66.1]]), 6.5, (80, 100))
    assert slanted.sum() == pytest.approx(np.hypot(80.3, 56.1) * 6.5 + np.pi * 3.25**2, rel=0.01)
