"""Inputs as other tools write them: each is read right, or refused with what to do."""

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import draw_cable, rng, write_dataset
from PIL import Image

import dataset_index
from base.errors import UserError
from config import load_config
from console import dataset_table
from dataset_index import index_datasets
from imaging.files import MAX_PIXELS, FileError
from imaging.masks import read_mask

SIZE = (120, 160)
CABLE = draw_cable(rng(), SIZE, 7)
U8 = CABLE.astype(np.uint8) * 255

VOC_COLORS = [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128,) * 3]
VOC_COLORS.append((64, 0, 0))


def strips(n):
    """The cable cut into `n` parts side by side, as labels 1 to n."""
    return CABLE * (np.arange(SIZE[1]) * n // SIZE[1] + 1)[None].astype(np.uint8)


def colored(background, color, mask=CABLE):
    image = np.full((*mask.shape, 3), background, np.uint8)
    image[mask] = color
    return image


def palette_image(indices, colors):
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette([channel for color in colors for channel in color])
    return image


def read(tmp_path, image, name="m.png", mask_values=None, **save):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / name, **save)
    return read_mask(tmp_path / name, mask_values)


# --- alpha ---

ALPHA = {
    "white": np.dstack([np.full((*SIZE, 3), 255, np.uint8), U8]),
    "black": np.dstack([np.zeros((*SIZE, 3), np.uint8), U8]),
    "a photo that is cut out": np.dstack([rng().integers(0, 255, (*SIZE, 3)).astype(np.uint8), U8]),
    "white with a soft edge": np.dstack(
        [np.full((*SIZE, 3), 255, np.uint8), cv2.GaussianBlur(U8, (0, 0), 0.6)]
    ),
    "gray with alpha (LA)": np.dstack([np.full(SIZE, 255, np.uint8), U8]),
    "one color per cable": np.dstack([colored(0, (255, 0, 0)), U8]),
    "constant alpha": np.dstack([U8, U8, U8, np.full(SIZE, 255, np.uint8)]),
    "constant alpha of 0": np.dstack([U8, U8, U8, np.zeros(SIZE, np.uint8)]),
}


@pytest.mark.parametrize("kind", ALPHA)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_the_mask_unless_it_is_constant(tmp_path, kind, suffix):
    assert (read(tmp_path, ALPHA[kind], f"m{suffix}") == CABLE).all()


def test_a_palette_with_transparency_is_read_by_its_transparency(tmp_path):
    image = palette_image(CABLE, [(255, 255, 255), (255, 255, 255)])
    assert (read(tmp_path, image, transparency=0) == CABLE).all()


def test_an_empty_transparent_canvas_is_an_empty_mask(tmp_path):
    canvas = np.full((*SIZE, 4), 255, np.uint8)
    canvas[..., 3] = 0
    assert not read(tmp_path, canvas).any()


def test_a_turned_mask_with_transparent_corners_is_refused(tmp_path):
    image = Image.merge("RGBA", [Image.fromarray(U8)] * 3 + [Image.new("L", SIZE[::-1], 255)]).rotate(20)
    with pytest.raises(FileError, match="its alpha channel could be the mask, and its colors as well"):
        read(tmp_path, image)


# --- gray ---


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_masks_are_read(tmp_path, suffix):
    for top in (1, 255, 65535):
        assert (read(tmp_path, CABLE.astype(np.uint16) * top, f"m{suffix}") == CABLE).all()


def test_16_bit_color_masks_are_read_or_refused(tmp_path):
    for top in (1, 65535):
        cv2.imwrite(str(tmp_path / f"{top}.png"), np.dstack([CABLE] * 3).astype(np.uint16) * top)
    assert (read_mask(tmp_path / "65535.png") == CABLE).all()
    with pytest.raises(FileError, match=r"1\.png: a 16-bit color mask of small values"):
        read_mask(tmp_path / "1.png")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".bmp", ".jpg"])
def test_every_format_gives_the_same_mask(tmp_path, suffix):
    assert (read(tmp_path, U8, f"m{suffix}") == CABLE).all()


@pytest.mark.parametrize("filter_name", ["NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("factor", [0.3, 0.5, 0.75, 1.5, 3])
@pytest.mark.parametrize("width", [4, 7, 20])
def test_resized_masks_are_read(tmp_path, filter_name, factor, width):
    large = Image.fromarray(draw_cable(rng(3), (240, 320), width).astype(np.uint8) * 255)
    size = (round(320 * factor), round(240 * factor))
    values = np.asarray(large.resize(size, Image.Resampling[filter_name]))
    assert (read(tmp_path, values) == (values > int(values.max()) / 2)).all()


@pytest.mark.parametrize("seed", range(8))
def test_antialiased_lines_of_one_pixel_are_read(tmp_path, seed):
    lines = np.zeros(SIZE, np.uint8)
    for _ in range(4):
        points = np.cumsum(rng(seed).integers(-30, 30, (9, 2)), axis=0) + np.array([80, 60])
        cv2.polylines(lines, [points.astype(np.int32)], False, 255, 1, cv2.LINE_AA)
    mask = read(tmp_path, lines)
    assert (mask == (lines > 127)).all() and mask.any()


def test_cables_thinner_than_a_pixel_are_not_lost_silently(tmp_path):
    lines = np.zeros(SIZE, np.uint8)
    lines[10:50, 10:12] = 255
    for column in range(20, 150, 10):
        lines[10:110, column] = rng(column).integers(90, 126, 100)
    with pytest.raises(FileError, match=r"m\.png: (most of its foreground|not a binary mask)"):
        read(tmp_path, lines)


PROBABILITIES = cv2.GaussianBlur(U8, (0, 0), 6)


@pytest.mark.parametrize(
    "values",
    [
        PROBABILITIES,
        PROBABILITIES.astype(np.uint16) * 257,
        np.rint(200 / (1 + np.exp(2 - PROBABILITIES / 40.0)) + 20).astype(np.uint8),
        cv2.GaussianBlur(rng().integers(0, 255, SIZE).astype(np.uint8), (0, 0), 3),  # as smooth as a photo
        cv2.GaussianBlur(rng().integers(0, 255, (*SIZE, 3)).astype(np.uint8), (0, 0), 3),
    ],
)
@pytest.mark.parametrize("name", ["m.png", "m.bmp", "m.webp"])
def test_probabilities_and_photos_are_refused(tmp_path, values, name):
    if values.dtype == np.uint16 and name != "m.png":
        name = "m.tif"
    with pytest.raises(FileError, match=r"not a binary mask"):
        read(tmp_path, values, name)


def test_a_photo_as_jpeg_mask_is_refused(tmp_path):
    photo = cv2.GaussianBlur(rng().integers(0, 255, (*SIZE, 3)).astype(np.uint8), (0, 0), 2)
    photo = cv2.normalize(photo, None, 0, 255, cv2.NORM_MINMAX)
    photo[CABLE] = (230, 40, 40)
    with pytest.raises(FileError, match="not a binary mask"):
        read(tmp_path, photo, "m.jpg", quality=90)


# --- JPEG ---


@pytest.mark.parametrize("quality", [40, 75, 95])
@pytest.mark.parametrize("color", [255, (255, 0, 0)])
def test_jpeg_masks_are_read(tmp_path, quality, color):
    mask = read(tmp_path, colored(0, color), "m.jpg", quality=quality, subsampling=0)
    assert (mask != CABLE).mean() < 0.002


def test_a_jpeg_mask_of_small_values_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        FileError, match=r"m\.jpg: a lossy mask .* largest value is \d; .*save the mask as PNG"
    ):
        read(tmp_path, CABLE.astype(np.uint8), "m.jpg", quality=95)


def test_an_empty_jpeg_mask_is_legal(tmp_path):
    for quality in (5, 75):
        assert not read(tmp_path, np.zeros(SIZE, np.uint8), "m.jpg", quality=quality).any()


def test_a_dim_cable_in_a_jpeg_mask_is_not_lost_silently(tmp_path):
    values = np.where(strips(2) == 2, 100, U8).astype(np.uint8)
    with pytest.raises(FileError, match="not a binary mask"):
        read(tmp_path, values, "m.jpg", quality=95)


# --- color and palettes ---


@pytest.mark.parametrize("n", [1, 3, 8])
def test_one_color_per_cable_keeps_every_cable(tmp_path, n):
    """As CVAT and PASCAL VOC write it; the eighth color is the dark (64, 0, 0)."""
    labels = strips(n)
    colors = [(0, 0, 0), *VOC_COLORS[-n:]]
    rgb = np.array(colors, np.uint8)[labels]
    assert (read(tmp_path, rgb, "rgb.png") == CABLE).all()
    assert (read(tmp_path, palette_image(labels, colors), "palette.png") == CABLE).all()


@pytest.mark.parametrize("background", [(255, 255, 255), (30, 60, 90), (128, 128, 128)])
def test_the_background_is_the_most_frequent_color_of_the_border(tmp_path, background):
    assert (read(tmp_path, colored(background, (255, 0, 0))) == CABLE).all()
    assert (read(tmp_path, colored(background, (255, 0, 0)), "m.jpg", subsampling=0) == CABLE).mean() > 0.99


def test_a_color_mask_that_was_resized_keeps_its_edges(tmp_path):
    large = draw_cable(rng(3), (240, 320), 9)
    half = cv2.resize(large.astype(np.uint8) * 255, (160, 120), interpolation=cv2.INTER_AREA)
    for color in ((255, 0, 0), (64, 0, 0), (10, 200, 90)):
        image = cv2.resize(colored(0, color, large), (160, 120), interpolation=cv2.INTER_AREA)
        assert (read(tmp_path, image) != (half > 127)).mean() < 0.005, color


@pytest.mark.parametrize(
    ("indices", "colors"),
    [
        (CABLE, [(0, 0, 0), (255, 255, 255)]),
        (~CABLE, [(255, 255, 255), (0, 0, 0)]),  # sorted in the other order, as some programs do
        (~CABLE, [(255, 0, 0), (0, 0, 0)]),
        (CABLE, [(200, 200, 200), (0, 0, 0)]),
        (CABLE, [(9, 80, 200), (255, 0, 0)]),
        (CABLE * 2 + 3, [(0, 0, 0)] * 3 + [(40, 40, 90), (0, 0, 0), (255, 0, 0)]),  # no index 0
        (strips(3), [(0, 0, 0), (255, 0, 0), (255, 0, 0), (255, 0, 0)]),
        (strips(3), [(0, 0, 0)] * 4),
    ],
)
def test_palettes_are_read_whatever_their_order(tmp_path, indices, colors):
    gray_inverted = colors == [(200, 200, 200), (0, 0, 0)]
    mask = read(tmp_path, palette_image(indices, colors))
    assert (mask == (~CABLE if gray_inverted else CABLE)).all()


def test_a_dithered_photo_with_a_palette_is_refused(tmp_path):
    photo = cv2.GaussianBlur(rng().integers(0, 255, (*SIZE, 3)).astype(np.uint8), (0, 0), 2)
    with pytest.raises(FileError, match="not a"):
        read(tmp_path, Image.fromarray(photo).quantize(256))


def test_the_undecided_pixels_of_voc_are_refused(tmp_path):
    indices = CABLE.astype(np.uint8)
    indices[cv2.dilate(indices, np.ones((9, 9))).astype(bool) & ~CABLE] = 255
    colors = [(0, 0, 0), (128, 0, 0), *[(1, 1, 1)] * 253, (224, 224, 192)]
    with pytest.raises(FileError, match=r"labels, with the values 0, 1, 255 .*mask_values: \[1\]"):
        read(tmp_path, palette_image(indices, colors))
    assert (read(tmp_path, palette_image(indices, colors), mask_values=(1,)) == CABLE).all()


# --- labels ---


@pytest.mark.parametrize(
    "values", [(1, 2), (3, 4), (1, 255), (254, 255), (85, 170), (127, 255), (1, 2, 3, 4, 5)]
)
@pytest.mark.parametrize("mode", ["L", "gray RGB", "16 bits", "gray palette"])
def test_a_label_map_lists_its_values_and_mask_values_chooses(tmp_path, values, mode):
    labels = np.array([0, *values])[strips(len(values))]
    image = {
        "L": lambda: labels.astype(np.uint8),
        "gray RGB": lambda: np.dstack([labels.astype(np.uint8)] * 3),
        "16 bits": lambda: labels.astype(np.uint16),
        "gray palette": lambda: palette_image(labels, [(i, i, i) for i in range(256)]),
    }[mode]()
    listed = ", ".join(map(str, [0, *values]))
    with pytest.raises(FileError, match=rf"labels, with the values {listed}; .*mask_values"):
        read(tmp_path, image)
    assert (read(tmp_path, image, mask_values=values[:1]) == (labels == values[0])).all()
    assert (read(tmp_path, image, mask_values="nonzero") == CABLE).all()


def test_a_small_part_of_another_class_is_found(tmp_path):
    labels = CABLE.astype(np.uint8)
    y, x = np.argwhere(CABLE)[700]
    labels[y - 4 : y + 5, x - 4 : x + 5] = 2  # a connector
    with pytest.raises(FileError, match="labels, with the values 0, 1, 2"):
        read(tmp_path, labels)


def test_mask_values_choose_colors_and_indices(tmp_path):
    labels, colors = strips(3), [(0, 0, 0), *VOC_COLORS[:3]]
    rgb = np.array(colors, np.uint8)[labels]
    assert (read(tmp_path, rgb, mask_values=(VOC_COLORS[1],)) == (labels == 2)).all()
    assert (
        read(tmp_path, palette_image(labels, colors), mask_values=(1, 3)) == np.isin(labels, [1, 3])
    ).all()
    one_bit = Image.fromarray(labels > 0).convert("1")  # Pillow reads its 1 as 255
    for value in (1, 255):
        assert (read(tmp_path, one_bit, mask_values=(value,)) == (labels > 0)).all()
    with pytest.raises(FileError, match=r"has colors, but mask_values lists gray values"):
        read(tmp_path, rgb, mask_values=(1,))
    with pytest.raises(FileError, match="lossy compression changes values"):
        read(tmp_path, rgb, "m.jpg", mask_values=(1,))


# --- whole sets ---


def index(folder, max_pixels=MAX_PIXELS, **keys):
    """Check `folder/set` as the YAML file asks."""
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"dataset": {"train": [{"data_dir": str(folder / "set"), **keys}]}}))
    return index_datasets(load_config(path).dataset.train, max_pixels=max_pixels)[0]


def rewrite_masks(folder, change):
    for path in sorted((folder / "set/masks").iterdir()):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


@pytest.fixture
def dataset_folder(tmp_path) -> Path:
    write_dataset(tmp_path / "set", 4)
    return tmp_path


def test_inverted_masks_are_refused_and_the_key_insists(dataset_folder):
    rewrite_masks(dataset_folder, lambda mask: 255 - mask)
    with pytest.raises(
        UserError, match=r"foreground covers 8\d% .*inverted.*swapped.*allow_large_foreground"
    ):
        index(dataset_folder)
    assert index(dataset_folder, allow_large_foreground=True).foreground > 0.8


def test_one_inverted_mask_among_many_is_refused(dataset_folder):
    Image.new("L", (64, 48), 255).save(dataset_folder / "set/masks/2.png")
    with pytest.raises(UserError, match=r"foreground covers nearly all of 1 mask\(s\), e\.g\. 2\.png"):
        index(dataset_folder)


def test_a_mask_that_may_be_inverted_is_named_in_the_summary(dataset_folder):
    assert not index(dataset_folder).notes()
    path = dataset_folder / "set/masks/1.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    note = f"foreground covers more than half of 1 mask(s), e.g. {path}: are they inverted?"
    assert index(dataset_folder).notes() == [note]
    assert not index(dataset_folder, allow_large_foreground=True).notes()


def swap(folder):
    (folder / "imgs").rename(folder / "x")
    (folder / "masks").rename(folder / "imgs")
    (folder / "x").rename(folder / "masks")


@pytest.mark.parametrize("name", ["{}.png", "{}_mask.png"])
def test_swapped_folders_are_refused_in_one_sentence(dataset_folder, name):
    folder = dataset_folder / "set"
    for path in sorted((folder / "masks").iterdir()):
        path.rename(path.with_name(name.format(path.stem)))
    swap(folder)
    with pytest.raises(UserError) as error:
        index(dataset_folder)
    (line,) = str(error.value).splitlines()[1:]
    assert f"{folder}: imgs/ and masks/ seem to be swapped" in line


def test_swapped_folders_do_not_hide_the_faults_of_other_datasets(dataset_folder):
    swap(dataset_folder / "set")
    good, bad = (write_dataset(dataset_folder / name, 2) for name in ("good", "bad"))
    (bad / "masks/1.png").unlink()
    path = dataset_folder / "c.yaml"
    names = [str(folder) for folder in (bad, good, dataset_folder / "set")]
    path.write_text(yaml.safe_dump({"dataset": {"train": [{"data_dir": name} for name in names]}}))
    with pytest.raises(UserError) as error:
        index_datasets(load_config(path).dataset.train)
    title, first, second = str(error.value).splitlines()
    assert title == "2 problem(s) in the data:"
    assert f"{dataset_folder / 'set'}: imgs/ and masks/ seem to be swapped" in first
    assert f"{bad / 'imgs/1.png'}: has no mask" in second


@pytest.mark.parametrize("mask_values", [[1], "nonzero"])
def test_swapped_folders_with_masks_of_classes_are_recognized(dataset_folder, mask_values):
    classes = np.repeat(np.arange(4, dtype=np.uint8), 16)
    rewrite_masks(dataset_folder, lambda mask: (mask > 0) * classes)
    assert index(dataset_folder, mask_values=mask_values).foreground > 0
    swap(dataset_folder / "set")
    with pytest.raises(UserError, match="seem to be swapped"):
        index(dataset_folder, mask_values=mask_values)


def test_photos_in_both_folders_are_not_taken_for_swapped_ones(dataset_folder):
    for path in (dataset_folder / "set/imgs").iterdir():
        (dataset_folder / "set/masks" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="foreground covers") as error:
        index(dataset_folder, mask_values="nonzero")
    assert "seem to be swapped" not in str(error.value)


def test_large_photos_are_reduced_before_their_colors_are_counted(tmp_path, monkeypatch):
    """100 megapixels took 1.2 GB; this also holds for PNG files, which Pillow cannot read reduced."""
    folder = write_dataset(tmp_path / "set", 1, size=(1500, 2100))
    swap(folder)
    counted, unique = [], np.unique

    def recorded(values, **options):
        counted.append(values.shape)
        return unique(values, **options)

    monkeypatch.setattr(np, "unique", recorded)
    with pytest.raises(UserError, match="seem to be swapped"):
        index(tmp_path)
    assert counted[-1] == (500, 700)


def test_a_huge_file_is_not_decoded_to_see_whether_folders_are_swapped(dataset_folder, monkeypatch):
    swap(dataset_folder / "set")
    read = []
    monkeypatch.setattr(dataset_index, "read_image", lambda path, longest: read.append(path))
    with pytest.raises(UserError, match="more than --max_pixels 1000"):
        index(dataset_folder, max_pixels=1000)
    assert not read


def test_a_photo_among_the_masks_is_not_taken_for_swapped_folders(dataset_folder):
    folder = dataset_folder / "set"
    (path, *_) = sorted((folder / "masks").iterdir())
    path.write_bytes((folder / "imgs" / path.name).read_bytes())
    with pytest.raises(UserError, match="not a binary mask") as error:
        index(dataset_folder)
    assert "swapped" not in str(error.value)


def test_a_set_of_empty_masks_is_refused_and_the_key_insists(dataset_folder):
    rewrite_masks(dataset_folder, np.zeros_like)
    with pytest.raises(UserError, match="all 4 masks are empty"):
        index(dataset_folder)
    assert index(dataset_folder, allow_empty_masks=True).foreground == 0


def test_labels_in_different_files_are_refused(dataset_folder):
    levels = iter([1, 2, 1, 1])
    rewrite_masks(dataset_folder, lambda mask: mask // 255 * next(levels))
    with pytest.raises(UserError, match=r"different values \(1 in 3, 2 in 1 file\(s\)\).*mask_values"):
        index(dataset_folder)
    chosen = index(dataset_folder, mask_values=[1])
    assert [chosen.infos[pair.mask_path].foreground > 0 for pair in chosen.pairs] == [True, False, True, True]


def test_masks_of_0_and_1_and_of_0_and_255_mix(dataset_folder):
    levels = iter([1, 255, 1, 255])
    rewrite_masks(dataset_folder, lambda mask: mask // 255 * next(levels))
    assert 0.05 < index(dataset_folder).foreground < 0.3


def test_the_summary_shows_foreground_unread_files_and_several_colors(dataset_folder):
    for name in ("x.gif", "notes.txt", "._0.png"):
        (dataset_folder / "set/imgs" / name).touch()
    colors = iter(VOC_COLORS)
    rewrite_masks(dataset_folder, lambda mask: colored(0, next(colors), mask > 0))
    checked = index(dataset_folder)
    table = dataset_table([checked], None)
    assert f"{checked.foreground:.2%}" in table
    assert "not read: 2 file(s)" in table and "notes.txt" in table and "x.gif" in table
    assert "masks have 4 colors besides the background" in table and "(0, 128, 0)" in table


def test_a_config_with_every_mask_key_can_be_saved_and_read_again(dataset_folder):
    (dataset_folder / "c.yaml").write_text(
        f"dataset: {{train: [{{data_dir: {dataset_folder / 'set'}, mask_values: [1, [9, 8, 7]], "
        "allow_large_foreground: true, allow_empty_masks: true}]}"
    )
    config = load_config(dataset_folder / "c.yaml")
    assert config.dataset.train[0].mask_values == (1, (9, 8, 7))
    (dataset_folder / "again.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config(dataset_folder / "again.yaml") == config
