"""Labels of every tool become the exact masks, and what cannot be imported is named."""

import json
import os
import sys
from pathlib import Path

import cv2
import label_samples
import numpy as np
import pytest
from conftest import run_process
from label_samples import CABLES, HEIGHT, TRUTH, WIDTH, WRITERS, cable_mask
from PIL import Image

import import_labels
from imaging.coco import coco_document, polygons
from imaging.masks import read_mask
from imaging.pairing import find_pairs

FIRST, SECOND = CABLES  # the names of the images


def run(source, output, *flags):
    """Run the command; returns its exit code."""
    return import_labels.main(["--input", str(source), "--output", str(output), *map(str, flags)])


def change_json(path, change):
    """Change the document of a JSON file in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# --- what each tool writes ---


@pytest.mark.parametrize("name", WRITERS)
def test_labels_of_every_tool_become_the_exact_masks(name, tmp_path, capsys):
    write, label_format = WRITERS[name]
    write(tmp_path / "export")
    assert run(tmp_path / "export", tmp_path / "data") == 0
    text = capsys.readouterr().out
    assert f"labels        {label_format}, " in text
    assert "images        2 with label, 0 without label" in text
    assert f"regions       3 of {'mask' if label_format == 'suffix' else 'cable'}\n" in text
    pairs, faults = find_pairs(tmp_path / "data")
    assert faults == [] and len(pairs) == 2
    originals = {path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()}
    for pair, truth in zip(pairs, TRUTH.values(), strict=True):
        np.testing.assert_array_equal(read_mask(pair.mask_path), truth)
        assert set(np.unique(cv2.imread(str(pair.mask_path), cv2.IMREAD_UNCHANGED))) == {0, 255}
        assert pair.image_path.read_bytes() in originals


@pytest.mark.parametrize("name", ["coco", "cvat", "label_studio"])
def test_a_single_file_may_be_the_input(name, tmp_path):
    path = WRITERS[name][0](tmp_path / "export")
    assert run(path, tmp_path / "data", "--images", tmp_path / "export") == 0
    assert len(find_pairs(tmp_path / "data")[0]) == 2


def test_polygons_of_predict_come_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for _ in range(5):  # lines that enclose holes
        cv2.line(mask, rng.integers(0, WIDTH, 2).tolist(), rng.integers(0, HEIGHT, 2).tolist(), 1, 3)
    label_samples.write_images(tmp_path / "photos")
    document = coco_document([(FIRST, mask.shape, polygons(mask.astype(bool)))])
    (tmp_path / "polygons.json").write_text(json.dumps(document))
    assert run(tmp_path / "polygons.json", tmp_path / "data", "--images", tmp_path / "photos") == 0
    np.testing.assert_array_equal(read_mask(tmp_path / "data/masks/desk 1.png"), mask.astype(bool))


def test_class_names_of_labelme_masks_are_read(tmp_path, capsys):
    label_samples.write_voc(tmp_path / "export")
    (tmp_path / "export/labelmap.txt").unlink()
    (tmp_path / "export/class_names.txt").write_text("_background_\nwire\n")  # as labelme2voc.py writes it
    for path in (tmp_path / "export/SegmentationClass").iterdir():
        image = Image.open(path)
        image.putpalette([0, 0, 0, 128, 0, 0, *[0] * 762])
        image.save(path)
    assert run(tmp_path / "export", tmp_path / "data") == 0
    assert "regions       3 of wire\n" in capsys.readouterr().out


def test_void_of_voc_is_background(tmp_path):
    label_samples.write_voc(tmp_path / "export")
    path = tmp_path / "export/SegmentationClass/desk-2.png"
    color = np.asarray(Image.open(path).convert("RGB")).copy()
    color[:5] = (224, 224, 192)
    Image.fromarray(color).save(path)
    assert run(tmp_path / "export", tmp_path / "data") == 0
    np.testing.assert_array_equal(read_mask(tmp_path / "data/masks/desk-2.png"), TRUTH[SECOND])


@pytest.mark.parametrize("tool", ["cvat", "labelme"])
def test_polylines_need_a_width(tool, tmp_path, capsys):
    def cvat_line(box):
        y = (box[1] + box[3]) / 2
        return f'<polyline label="cable" points="{box[0]},{y};{box[2]},{y}" z_order="0"></polyline>'

    def labelme_line(box):
        y = (box[1] + box[3]) / 2
        points = [[box[0], y], [box[2], y]]
        return label_samples.labelme_shape(box, points=points, shape_type="linestrip")

    if tool == "cvat":
        label_samples.write_cvat(tmp_path / "export", cvat_line)
    else:
        label_samples.write_labelme(tmp_path / "export", labelme_line)
    assert run(tmp_path / "export", tmp_path / "data") == 2
    message = "expected polygons, masks or brush strokes, found 3 of line without a width (see --line_width)"
    assert message in capsys.readouterr().err
    assert run(tmp_path / "export", tmp_path / "data", "--line_width", 7) == 0
    mask = read_mask(tmp_path / "data/masks/desk-2.png")
    np.testing.assert_array_equal(mask[:, 10:70], TRUTH[SECOND][:, 10:70])


# --- classes and images without a label ---


def two_classes(folder):
    """A COCO file where the second cable of the first image is a table."""
    path = label_samples.write_coco(folder)

    def change(document):
        document["categories"].append({"id": 8, "name": "table"})
        document["annotations"][1]["category_id"] = 8

    change_json(path, change)


def test_of_several_classes_the_user_names_those_of_cables(tmp_path, capsys):
    two_classes(tmp_path / "export")
    assert run(tmp_path / "export", tmp_path / "data") == 2
    assert "name those of cables with --classes: cable (2), table (1)" in capsys.readouterr().err
    assert run(tmp_path / "export", tmp_path / "data", "--classes", "wire") == 2
    assert "--classes wire: no such class; the labels have cable (2), table (1)" in capsys.readouterr().err
    assert run(tmp_path / "export", tmp_path / "data", "--classes", "cable") == 0
    assert "1 of table (not selected)" in capsys.readouterr().out
    mask = read_mask(tmp_path / "data/masks/desk 1.png")
    np.testing.assert_array_equal(mask, cable_mask(CABLES[FIRST][0]))
    assert run(tmp_path / "export", tmp_path / "both", "--classes", "cable", "table") == 0
    np.testing.assert_array_equal(read_mask(tmp_path / "both/masks/desk 1.png"), TRUTH[FIRST])


def test_images_without_a_label_are_left_out_unless_they_are_wanted(tmp_path, capsys):
    two_classes(tmp_path / "export")
    assert run(tmp_path / "export", tmp_path / "data", "--classes", "table") == 0
    assert "1 with label, 1 without label" in (text := capsys.readouterr().out)
    assert "left out; --keep_empty imports them" in text
    assert [path.name for path in (tmp_path / "data/imgs").iterdir()] == [FIRST]
    assert run(tmp_path / "export", tmp_path / "all", "--classes", "table", "--keep_empty") == 0
    assert not read_mask(tmp_path / "all/masks/desk-2.png").any()


def test_an_empty_file_of_yolo_is_an_image_without_a_label(tmp_path):
    label_samples.write_yolo(tmp_path / "export")
    (tmp_path / "export/train/labels/desk-2.txt").write_text("")
    assert run(tmp_path / "export", tmp_path / "data", "--keep_empty") == 0
    assert not read_mask(tmp_path / "data/masks/desk-2.png").any()
    assert read_mask(tmp_path / "data/masks/desk 1.png").any()


# --- files ---


def test_hard_links_take_no_space(tmp_path):
    label_samples.write_voc(tmp_path / "export")
    assert run(tmp_path / "export", tmp_path / "data", "--hard_links") == 0
    assert (tmp_path / "data/imgs" / FIRST).samefile(tmp_path / "export/JPEGImages" / FIRST)


def test_images_of_one_name_in_two_folders_keep_both(tmp_path):
    for split in ("train", "valid"):
        path = label_samples.write_coco(tmp_path / "export" / split)
        path.rename(tmp_path / "export" / split / "images/default/_annotations.coco.json")  # as Roboflow does
    assert run(tmp_path / "export", tmp_path / "data") == 0
    stems = sorted(path.stem for path in (tmp_path / "data/masks").iterdir())
    assert stems == sorted(
        f"{s}_images_default_{n}" for s in ("train", "valid") for n in ("desk 1", "desk-2")
    )


def test_a_relative_input_finds_the_same_images_as_an_absolute_one(tmp_path, monkeypatch):
    for place in ("x/sub", "y/sub"):
        label_samples.write_labelme(tmp_path / "exports" / place)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for number, source in enumerate(("../exports", tmp_path / "exports")):
        assert run(source, f"out{number}") == 0
    names = [sorted(path.name for path in Path(f"out{number}/imgs").iterdir()) for number in range(2)]
    assert names[0] == names[1] and any(name.startswith("x_sub_") for name in names[0])


def test_the_contact_sheet_outlines_the_masks_and_names_the_images(tmp_path):
    label_samples.write_cvat(tmp_path / "export")
    assert run(tmp_path / "export", tmp_path / "data") == 0
    sheet = np.asarray(Image.open(tmp_path / "data/contact_sheet.jpg")).astype(int)
    is_green = (sheet[..., 1] > 150) & (sheet[..., 0] < 120)
    assert is_green[:, :400].any() and is_green[:, 400:800].any() and not is_green[:, 800:].any()
    names = sheet[-import_labels.NAME_HEIGHT :, :800].min(axis=2) > 150  # white letters
    first, second = names[:, :400], names[:, 400:]
    assert first.sum() > 20 and second.sum() > 20 and (first != second).any()


def test_an_existing_output_is_never_changed(tmp_path, capsys):
    label_samples.write_voc(tmp_path / "export")
    (tmp_path / "data").mkdir()
    assert run(tmp_path / "export", tmp_path / "data") == 2
    assert "already exists" in capsys.readouterr().err and not list((tmp_path / "data").iterdir())


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    label_samples.write_voc(tmp_path / "export")
    monkeypatch.setattr(import_labels, "write_sheet", interrupt)
    assert run(tmp_path / "export", tmp_path / "data") == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_command_starts_without_torch(tmp_path):
    label_samples.write_yolo(tmp_path / "export")
    code = (
        f"import sys, import_labels; code = import_labels.main(['--input', {str(tmp_path / 'export')!r}, "
        f"'--output', {str(tmp_path / 'data')!r}]); print(code, 'torch' in sys.modules)"
    )
    folder = Path(import_labels.__file__).parent
    result = run_process(sys.executable, "-c", code, PYTHONPATH=folder)
    assert result.stdout.endswith("0 False\n"), result.stderr


# --- what is refused ---


def test_labels_of_two_formats_need_a_choice(tmp_path, capsys):
    label_samples.write_labelme(tmp_path / "export")
    label_samples.write_voc(tmp_path / "export/voc")
    assert run(tmp_path / "export", tmp_path / "data") == 2
    text = capsys.readouterr().err
    assert "choose one with --format" in text and "2 files of labelme" in text and "2 files of voc" in text
    assert (
        run(tmp_path / "export", tmp_path / "data", "--format", "voc", "--images", tmp_path / "export/voc")
        == 0
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"shapes": []}', "a.json: JSON with the keys shapes"),
        ("a.json", '[{"id": 1, "image": "x.jpg", "label": []}]', "export JSON, not JSON-MIN"),
        ("a.json", "{", "a.json: cannot be read as JSON"),
        ("a.xml", "<annotation><object/></annotation>", "boxes of PASCAL VOC are no masks"),
        ("a.zip", "PK", "a.zip: packed; unpack it first"),
        ("a.txt", "0 0,1 0,1 0,5 0,1 0,1 0,5\n", "a.txt: no polygons of YOLO, but '0 0,1 0,1"),
        ("a.csv", "some notes", "1 other files"),
    ],
)
def test_what_is_no_label_file_is_shown(tmp_path, capsys, name, content, message):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / name).write_text(content)
    assert run(tmp_path / "export", tmp_path / "data") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def set_value(*keys, value):
    """A change of a document: the value under `keys`."""

    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("tool", "file", "change", "message"),
    [
        ("coco", "annotations/instances_default.json", set_value("images", 0, "width", value="wide"),
         "instances_default.json: 1 error(s)\n  images.0.width: Input should be a valid integer"),
        ("coco", "annotations/instances_default.json", set_value("annotations", 1, "image_id", value=77),
         "annotations.1.image_id: no image has the id 77"),
        ("coco", "annotations/instances_default.json",
         lambda document: document["images"][1].update(id=document["images"][0]["id"]),
         "instances_default.json: images: desk 1.jpg and desk-2.png have the same id "),
        ("coco", "annotations/instances_default.json",
         lambda document: document["categories"].append({**document["categories"][0], "name": "table"}),
         " and table have the same id "),
        ("coco", "annotations/instances_default.json", set_value("annotations", 2, "category_id", value=9),
         "annotations.2.category_id: no category has the id 9"),
        ("coco", "annotations/instances_default.json",
         set_value("annotations", 0, "segmentation", value=[[1, 2, None, 4, 5, 6]]),
         "annotations.0.segmentation.polygons.0.2: Input should be a valid number, got None"),
        ("labelme", "json/desk 1.json", set_value("shapes", 0, "points", value=[[1, 2], [3]]),
         "desk 1.json: 1 error(s)\n  shapes.0.points.1.1: Field required"),
        ("label_studio", "project-3.json",
         set_value(0, "annotations", 0, "result", 0, "value", "points", value=7),
         "project-3.json: 0.annotations.result.0.value: 1 error(s)\n  points: Input should be a valid list"),
        ("label_studio", "project-3.json", set_value(1, "data", value={"text": "no image"}),
         "project-3.json: 1.data: holds no path of an image"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_file_and_key(tmp_path, capsys, tool, file, change, message):
    WRITERS[tool][0](tmp_path / "export")
    change_json(tmp_path / "export" / file, change)
    assert run(tmp_path / "export", tmp_path / "data") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "file", "old", "new", "message"),
    [
        ("yolo", "train/labels/desk-2.txt", "0 ", "0 x ", "desk-2.txt: line 1: expected a class number"),
        ("yolo", "train/labels/desk-2.txt", "0 ", "0 1.2.3 ", "desk-2.txt: line 1: could not convert"),
        ("cvat", "annotations.xml", 'width="80"', 'width="x"', "image 0: width: invalid literal"),
        ("cvat", "annotations.xml", 'points="5.00,', 'points="', "image 0 (desk 1.jpg): polygon: points: "),
        ("cvat", "annotations.xml", "</annotations>", "", "annotations.xml: cannot be read as XML"),
        ("cvat_masks", "annotations.xml", ' left="4"', "", "image 0 (desk 1.jpg): mask: left: is missing"),
        ("voc", "labelmap.txt", "250,50", "red", "labelmap.txt: line 3: "),
    ],
)
def test_a_wrong_text_is_named_with_its_file_and_place(tmp_path, capsys, tool, file, old, new, message):
    WRITERS[tool][0](tmp_path / "export")
    text = (tmp_path / "export" / file).read_text()
    assert old in text
    (tmp_path / "export" / file).write_text(text.replace(old, new))
    assert run(tmp_path / "export", tmp_path / "data", "--format", WRITERS[tool][1]) == 2
    assert message in capsys.readouterr().err


# A part of a text of YOLO may be a polygon as well.
@pytest.mark.parametrize("name", sorted(WRITERS.keys() - {"yolo"}))
def test_files_that_are_cut_off_end_with_a_message(name, tmp_path, capsys):
    WRITERS[name][0](tmp_path / "export")
    for path in (tmp_path / "export").rglob("*"):
        if path.is_file() and path.name not in (*CABLES, "labelmap.txt", "data.yaml"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    code = run(tmp_path / "export", tmp_path / "data")
    captured = capsys.readouterr()
    assert code == 2 and captured.err.splitlines()[-1]
    assert "error: " in captured.err and not (tmp_path / "data").exists()


# --- images that are left out ---


def spoil(folder, fault):
    """Write COCO labels whose first image has a fault."""
    path = label_samples.write_coco(folder)
    image_path = folder / "images/default" / FIRST
    if fault == "missing":
        image_path.unlink()
    elif fault == "damaged":
        image_path.write_bytes(image_path.read_bytes()[:200])
    elif fault == "size":
        Image.new("RGB", (WIDTH, HEIGHT + 1)).save(image_path)
    elif fault == "turned":
        image, exif = Image.open(image_path).copy(), Image.Exif()
        exif[0x0112] = 3
        image.save(image_path, exif=exif)
    elif fault == "two files":
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / FIRST).write_bytes(image_path.read_bytes())
        image_path.unlink()
    elif fault == "far":
        change_json(path, set_value("annotations", 0, "segmentation", value=[[0, 0, 1e9, 0, 5, 5]]))
    elif fault == "rle":
        rle = {"size": [HEIGHT, WIDTH], "counts": [5, 6]}
        change_json(path, set_value("annotations", 0, "segmentation", value=rle))
    elif fault == "compressed":
        rle = {"size": [HEIGHT, WIDTH], "counts": "5`1"}
        change_json(path, set_value("annotations", 0, "segmentation", value=rle))
    else:
        for number in range(2):
            change_json(path, set_value("annotations", number, "segmentation", value=[]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "desk 1.jpg: no such image in"),
        ("damaged", "desk 1.jpg: cannot be decoded"),
        ("size", "has 61 x 80 pixels, but its labels are for (60, 80)"),
        ("turned", "EXIF orientation 3"),
        ("two files", "give the right folder with --images"),
        ("far", "coordinate 1e+09 lies far outside of the image of 60 x 80"),
        ("rle", "RLE of 11 pixels, expected 80 x 60"),
        ("compressed", "RLE of "),
        ("boxes", "has only shapes that are no regions: box or keypoints"),
    ],
)
def test_an_image_with_a_fault_is_left_out_and_named(tmp_path, capsys, fault, message):
    spoil(tmp_path / "export", fault)
    assert run(tmp_path / "export", tmp_path / "data") == 1
    text = capsys.readouterr().out
    assert message in text and "left out      1 image(s)" in text
    assert [path.name for path in (tmp_path / "data/imgs").iterdir()] == [SECOND]
    assert [path.name for path in (tmp_path / "data/masks").iterdir()] == ["desk-2.png"]


def test_labels_that_all_lie_outside_of_their_images_are_named(tmp_path, capsys):
    path = label_samples.write_coco(tmp_path / "export")
    outside = [[200, 0, 210, 0, 205, 5]]
    change_json(path, lambda document: [one.update(segmentation=outside) for one in document["annotations"]])
    assert run(tmp_path / "export", tmp_path / "data") == 2
    assert "3 shape(s) left out: region that covers no pixel" in capsys.readouterr().err


def test_a_polygon_of_yolo_in_pixels_is_named(tmp_path, capsys):
    WRITERS["yolo"][0](tmp_path / "export")
    (tmp_path / "export/train/labels/desk-2.txt").write_text("0 4 4 30 4 4 30\n")
    assert run(tmp_path / "export", tmp_path / "data") == 1
    message = "desk-2.png: coordinate 30 in its labels; expected fractions of the image (not pixels)"
    assert message in capsys.readouterr().out


def test_a_tiny_region_is_counted_and_the_others_are_imported(tmp_path, capsys):
    path = label_samples.write_coco(tmp_path / "export")
    change_json(path, set_value("annotations", 0, "segmentation", value=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]))
    assert run(tmp_path / "export", tmp_path / "data") == 0
    assert "left out      1 shape(s): region that covers no pixel" in capsys.readouterr().out
    mask = read_mask(tmp_path / "data/masks/desk 1.png")
    np.testing.assert_array_equal(mask, cable_mask(CABLES[FIRST][1]))


def test_annotations_of_several_people_are_not_mixed(tmp_path, capsys):
    path = label_samples.write_studio(tmp_path / "export")
    change_json(path, lambda tasks: tasks[0]["annotations"].append(tasks[0]["annotations"][0]))
    change_json(path, lambda tasks: tasks[1]["annotations"].append({"result": [], "was_cancelled": True}))
    assert run(tmp_path / "export", tmp_path / "data") == 1
    assert "has 2 annotations; keep one of them" in capsys.readouterr().out
    assert os.listdir(tmp_path / "data/imgs") == [SECOND]


def test_shapes_that_are_no_regions_are_counted(tmp_path, capsys):
    def with_box(box):
        return label_samples.cvat_polygon(box) + '<box label="cable" xtl="1" ytl="1" xbr="5" ybr="5"></box>'

    label_samples.write_cvat(tmp_path / "export", with_box)
    assert run(tmp_path / "export", tmp_path / "data") == 0
    assert "left out      3 shape(s): box" in capsys.readouterr().out
    np.testing.assert_array_equal(read_mask(tmp_path / "data/masks/desk 1.png"), TRUTH[FIRST])
