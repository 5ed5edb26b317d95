"""Matching images with masks by name, and reading them."""

import unicodedata

import numpy as np
import pytest
from conftest import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imaging import checking, files, pairing
from imaging.files import FileError
from imaging.pairing import Pair


def test_pairs_match_by_stem_whatever_the_extension(tmp_path):
    folder = write_dataset(tmp_path / "a", 3)
    (folder / "imgs" / "notes.txt").write_text("not an image")
    Image.open(folder / "imgs" / "1.png").save(folder / "imgs" / "1.JPEG", format="JPEG")
    (folder / "imgs" / "1.png").unlink()
    pairs, faults = pairing.find_pairs(folder)
    assert [pair.image_path.name for pair in pairs] == ["0.png", "1.JPEG", "2.png"]
    assert [pair.mask_path.name for pair in pairs] == ["0.png", "1.png", "2.png"]
    assert faults == []


def test_a_missing_and_an_empty_folder_are_faults(tmp_path):
    (tmp_path / "imgs").mkdir()
    assert pairing.find_pairs(tmp_path) == ([], [f"{tmp_path / 'imgs'}: {files.NO_IMAGE_FILE}"])
    (tmp_path / "imgs" / "0.png").touch()
    pairs, (fault,) = pairing.find_pairs(tmp_path)
    assert pairs == [] and fault.startswith(f"{tmp_path / 'masks'}: no such folder")


stems = st.text("abAB. é", min_size=1, max_size=3).filter(lambda stem: stem.strip(". "))
names = st.sets(st.tuples(stems, st.sampled_from([".png", ".jpg", ".JPEG", ".TIF", ".txt", ""])), max_size=6)


@settings(deadline=None, max_examples=100)
@given(images=names, masks=names)
def test_every_file_is_in_one_pair_or_in_one_message(tmp_path_factory, images, masks):
    folder = tmp_path_factory.mktemp("pairs")
    found_stems, n_doubles = {}, 0
    for kind, chosen in (("imgs", images), ("masks", masks)):
        (folder / kind).mkdir()
        (folder / kind / "z.png").touch()  # never empty
        for stem, suffix in chosen:
            (folder / kind / (stem + suffix)).touch()
        paths = [
            path
            for path in (folder / kind).iterdir()
            if path.suffix.lower() in files.IMAGE_SUFFIXES and not path.name.startswith(".")
        ]
        found_stems[kind] = {path.stem for path in paths}
        n_doubles += len(paths) - len(found_stems[kind])
    pairs, faults = pairing.find_pairs(folder)
    assert {pair.image_path.stem for pair in pairs} == found_stems["imgs"] & found_stems["masks"]
    assert all(pair.image_path.stem == pair.mask_path.stem for pair in pairs)
    assert len(faults) == len(found_stems["imgs"] ^ found_stems["masks"]) + n_doubles


# --- names as other programs write them ---


def touch_pairs(folder, images, masks):
    for kind, names in (("imgs", images), ("masks", masks)):
        (folder / kind).mkdir()
        for name in names:
            (folder / kind / name).touch()
    pairs, faults = pairing.find_pairs(folder)
    return [(pair.image_path.name, pair.mask_path.name) for pair in pairs], faults


@pytest.mark.parametrize(
    "mask",
    ["x_mask.png", "x-mask.png", "x.jpg.png", "x_label.tif", "x.JPG_mask.png", "x_seg.png", "x mask.png"],
)
def test_a_mask_with_a_known_suffix_belongs_to_its_image(tmp_path, mask):
    pairs, faults = touch_pairs(tmp_path, ["x.jpg", "y.jpg"], [mask, "y.png"])
    assert pairs == [("x.jpg", mask), ("y.jpg", "y.png")] and faults == []


def test_equal_stems_win_over_suffixes(tmp_path):
    pairs, faults = touch_pairs(tmp_path, ["x.jpg", "x_mask.jpg"], ["x.png", "x_mask.png"])
    assert pairs == [("x.jpg", "x.png"), ("x_mask.jpg", "x_mask.png")] and faults == []


def test_two_masks_that_may_belong_to_one_image_belong_to_none(tmp_path):
    pairs, faults = touch_pairs(tmp_path, ["x.jpg"], ["x_label.png", "x_mask.png"])
    assert pairs == [] and len(faults) == 3


def test_composed_and_decomposed_names_are_equal(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Kabel_grün") for form in ("NFC", "NFD"))
    pairs, faults = touch_pairs(tmp_path, [f"{composed}.jpg"], [f"{decomposed}.png"])
    assert pairs == [(f"{composed}.jpg", f"{decomposed}.png")] and faults == []


def test_the_files_that_macos_adds_are_ignored(tmp_path):
    pairs, faults = touch_pairs(tmp_path, ["x.jpg", "._x.jpg"], ["x.png", "._x.png", ".DS_Store"])
    assert pairs == [("x.jpg", "x.png")] and faults == []


def test_unmatched_files_are_shown_from_both_sides_in_turn(tmp_path):
    images, masks = [f"photo{n}.jpg" for n in range(12)], [f"truth{n}.png" for n in range(12)]
    pairs, faults = touch_pairs(tmp_path, images, masks)
    assert pairs == [] and len(faults) == 24
    message = files.format_list(faults)
    assert message.count("has no mask in masks/") == 5 and message.count("has no image in imgs/") == 5
    assert "photo0.jpg: has no mask in masks/ (without a partner there: truth0.png)" in message
    assert "truth0.png: has no image in imgs/ (without a partner there: photo0.jpg)" in message


def test_a_file_of_the_same_stem_that_is_not_read_is_named(tmp_path):
    pairs, faults = touch_pairs(tmp_path, ["a.heic", "b.jpg", "c.jpg"], ["a.png", "b.gif", "c.png"])
    assert pairs == [("c.jpg", "c.png")]
    no_mask, no_image = faults
    assert no_mask.endswith("b.jpg: has no mask in masks/ (b.gif there has a suffix that is not read)")
    assert no_image.endswith("a.png: has no image in imgs/ (a.heic there has a suffix that is not read)")


# --- EXIF ---


def write_turned(path, size, orientation):
    """An image file of (h, w) as stored, with an EXIF orientation; 1 writes none."""
    exif = Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
    path.parent.mkdir(exist_ok=True)
    Image.new("L", size[::-1]).save(path, exif=exif)


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        (((40, 60), 1), ((40, 60), 1), True),
        (((40, 60), 6), ((40, 60), 6), True),
        (((40, 60), 3), ((40, 60), 3), True),
        (((40, 60), 6), ((60, 40), 1), True),  # the mask was drawn on the upright photo
        (((60, 40), 1), ((40, 60), 8), True),
        (((40, 60), 6), ((40, 60), 1), False),
        (((40, 60), 3), ((40, 60), 1), False),  # by 180 degrees
        (((40, 60), 1), ((40, 60), 3), False),
        (((40, 60), 2), ((40, 60), 1), False),  # mirrored
        (((40, 60), 4), ((40, 60), 1), False),
        (((50, 50), 6), ((50, 50), 1), False),  # a square photo
        (((40, 60), 6), ((40, 60), 8), False),
    ],
)
def test_a_turned_photo_fits_its_mask_or_is_refused(tmp_path, image, mask, fits):
    pair = Pair(tmp_path / "imgs/x.jpg", tmp_path / "masks/x.png")
    write_turned(pair.image_path, *image)
    write_turned(pair.mask_path, *mask)
    infos, faults = checking.check_files([pair])
    if fits:
        assert faults == [] and pairing.read_pair(pair)[0].shape[:2] == pairing.read_pair(pair)[1].shape
    else:
        assert infos == {} and "EXIF orientation" in faults[0] and "x.jpg" in faults[0]
        with pytest.raises(FileError, match="EXIF orientation"):
            pairing.read_pair(pair)


def test_masks_of_one_file_with_other_values_are_checked_apart(tmp_path):
    write_turned(tmp_path / "imgs/x.png", (40, 60), 1)
    (tmp_path / "masks").mkdir()
    labels = np.repeat(np.array([[0, 1, 2, 0]], np.uint8), 15, axis=1).repeat(40, axis=0)
    Image.fromarray(labels).save(tmp_path / "masks/x.png")
    pairs = [Pair(tmp_path / "imgs/x.png", tmp_path / "masks/x.png", values) for values in ((1,), "nonzero")]
    infos, faults = checking.check_files(pairs)
    assert faults == []
    assert [infos[pair][pair.mask_path].foreground for pair in pairs] == [0.25, 0.5]
