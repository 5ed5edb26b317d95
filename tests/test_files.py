"""Reading and checking files, and pairing them."""

import cv2
import numpy as np
import pytest
from conftest import draw_cable, rng, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imaging import files
from imaging.files import FileError


def test_images_are_read_as_upright_rgb(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :3, 0] = 200  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    upright = files.read_image(tmp_path / "a.png")
    assert upright.shape == (6, 4, 3)
    assert (upright[:3] == [200, 0, 0]).all() and (upright[3:] == 0).all()


def test_16_bit_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(FileError, match=r"a\.png: expected 8-bit"):
        files.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("top", [255, 1, 3, 128])
def test_png_mask_is_above_half_of_its_maximum(tmp_path, top):
    mask = draw_cable(rng(), (40, 50), 5)
    Image.fromarray(mask.astype(np.uint8) * top).save(tmp_path / "m.png")
    assert (files.read_mask(tmp_path / "m.png") == mask).all()


def test_jpeg_mask_is_above_127_and_noise_stays_out(tmp_path):
    noise = rng().integers(0, 9, (40, 50)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "m.jpg", quality=60)
    assert not files.read_mask(tmp_path / "m.jpg").any()
    mask = draw_cable(rng(), (40, 50), 7)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "n.jpg", quality=90)
    assert (files.read_mask(tmp_path / "n.jpg") != mask).mean() < 0.01


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_mask_of_any_8_bit_mode(tmp_path, mode):
    mask = draw_cable(rng(), (40, 50), 5)
    red = np.zeros((40, 50, 3), np.uint8)
    red[mask] = (255, 0, 0) if mode in ("P", "RGB", "RGBA") else 255
    Image.fromarray(red).convert(mode).save(tmp_path / "m.png")
    assert (files.read_mask(tmp_path / "m.png") == mask).all()


def test_all_background_is_a_legal_mask(tmp_path):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "m.png")
    assert not files.read_mask(tmp_path / "m.png").any()


def test_smooth_edges_are_legal_in_a_mask(tmp_path):
    smooth = cv2.resize(
        draw_cable(rng(), (400, 500), 50).astype(np.uint8) * 255, (50, 40), interpolation=cv2.INTER_AREA
    )
    Image.fromarray(smooth).save(tmp_path / "m.png")
    assert (files.read_mask(tmp_path / "m.png") == (smooth > 127.5)).all()


PHOTO = rng().integers(0, 255, (40, 50)).astype(np.uint8)
LABEL_MAP = np.repeat(np.arange(4), 10)[:, None].repeat(50, axis=1).astype(np.uint8)
PROBABILITIES = np.linspace(0, 255, 50)[None].repeat(40, axis=0).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PHOTO, "not a binary mask"),
        (LABEL_MAP, "not a binary mask"),
        (PROBABILITIES, "not a binary mask"),
        (np.full((40, 50), 65535, np.uint16), "expected 8-bit"),
    ],
)
def test_a_file_that_is_not_a_binary_mask_is_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "m.png")
    with pytest.raises(FileError, match=rf"m\.png: {message}"):
        files.read_mask(tmp_path / "m.png")


def test_an_image_that_claims_too_many_pixels_is_refused(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    files.check_size(tmp_path / "a.png", max_pixels=600)
    with pytest.raises(FileError, match=r"a\.png: has 20 x 30 pixels, more than --max_pixels 599"):
        files.check_size(tmp_path / "a.png", max_pixels=599)


# --- pairs ---


def test_pairs_match_by_stem_whatever_the_extension(tmp_path):
    folder = write_dataset(tmp_path / "a", 3)
    (folder / "imgs" / "notes.txt").write_text("not an image")
    Image.open(folder / "imgs" / "1.png").save(folder / "imgs" / "1.JPEG", format="JPEG")
    (folder / "imgs" / "1.png").unlink()
    pairs, faults = files.find_pairs(folder)
    assert [pair.image_path.name for pair in pairs] == ["0.png", "1.JPEG", "2.png"]
    assert [pair.mask_path.name for pair in pairs] == ["0.png", "1.png", "2.png"]
    assert faults == []


def test_a_missing_and_an_empty_folder_are_faults(tmp_path):
    (tmp_path / "imgs").mkdir()
    assert files.find_pairs(tmp_path) == ([], [f"{tmp_path / 'imgs'}: no .png, .jpg or .jpeg file in it"])
    (tmp_path / "imgs" / "0.png").touch()
    pairs, (fault,) = files.find_pairs(tmp_path)
    assert pairs == [] and fault.startswith(f"{tmp_path / 'masks'}: no such folder")


stems = st.text("abAB. é", min_size=1, max_size=3).filter(lambda stem: stem.strip(". "))
names = st.sets(st.tuples(stems, st.sampled_from([".png", ".jpg", ".JPEG", ".txt", ""])), max_size=6)


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
        paths = [path for path in (folder / kind).iterdir() if path.suffix.lower() in files.IMAGE_SUFFIXES]
        found_stems[kind] = {path.stem for path in paths}
        n_doubles += len(paths) - len(found_stems[kind])
    pairs, faults = files.find_pairs(folder)
    assert {pair.image_path.stem for pair in pairs} == found_stems["imgs"] & found_stems["masks"]
    assert all(pair.image_path.stem == pair.mask_path.stem for pair in pairs)
    assert len(faults) == len(found_stems["imgs"] ^ found_stems["masks"]) + n_doubles


# --- checks ---


def test_a_check_records_intact_files_and_names_the_others(tmp_path):
    folder = write_dataset(tmp_path / "a", 4)
    pairs, _ = files.find_pairs(folder)
    pairs[1].image_path.write_bytes(pairs[1].image_path.read_bytes()[:200])
    Image.new("L", (9, 8)).save(pairs[2].mask_path)
    background = tmp_path / "b.png"
    background.write_bytes(pairs[3].image_path.read_bytes())
    infos, faults = files.check_files([*pairs, background, pairs[0]])
    assert infos.keys() == set(files.files_of([pairs[0], pairs[3]], [background]))
    assert {info.size for info in infos.values()} == {(48, 64)}
    assert infos[background] == infos[pairs[3].image_path]  # equal pixels
    assert infos[pairs[0].image_path] != infos[pairs[3].image_path]
    assert len(faults) == 2
    assert faults[0].startswith(f"{pairs[1].image_path}: cannot be decoded")
    assert faults[1] == f"{pairs[2].image_path}: is 48 x 64 (h x w) but its mask is 8 x 9"


def test_the_check_refuses_large_images(tmp_path):
    pairs, _ = files.find_pairs(write_dataset(tmp_path / "a", 1))
    infos, faults = files.check_files(pairs, max_pixels=1000)
    assert infos == {} and len(faults) == 1 and "has 48 x 64 pixels" in faults[0]


def test_a_list_shows_ten_items_and_counts_the_rest():
    assert files.format_list([str(number) for number in range(12)]).split("\n  ") == [
        *(str(number) for number in range(10)),
        "... and 2 more",
    ]
    assert files.format_list(["one"]) == "one"
