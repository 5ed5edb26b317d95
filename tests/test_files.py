"""Image files: which are found in a folder, and how they are read."""

import struct

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

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


def test_16_bit_color_is_refused_and_16_bits_for_a_pixel_are_not(tmp_path):
    cv2.imwrite(str(tmp_path / "camera.png"), np.full((4, 6, 3), 4095, np.uint16))  # 12 bits
    with pytest.raises(FileError, match=r"camera\.png: expected 8-bit .* got 16 bits"):
        files.read_image(tmp_path / "camera.png")
    rows = np.full((4, 6), 0xF800, "<u2").tobytes()  # red in a BMP file of 5, 6 and 5 bits per pixel
    numbers = b"BM", 66 + len(rows), 0, 66, 40, 6, 4, 1, 16, 3, len(rows), 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F
    header = struct.pack("<2sIIIIiiHHIIiiIIIII", *numbers)
    (tmp_path / "a.bmp").write_bytes(header + rows)
    assert (files.read_image(tmp_path / "a.bmp") == [255, 0, 0]).all()


def test_an_image_that_claims_too_many_pixels_is_refused(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    files.check_size(tmp_path / "a.png", max_pixels=600)
    with pytest.raises(FileError, match=r"a\.png: has 20 x 30 pixels, more than --max_pixels 599"):
        files.check_size(tmp_path / "a.png", max_pixels=599)


def test_a_list_shows_ten_items_and_counts_the_rest():
    assert files.format_list([str(number) for number in range(12)]).split("\n  ") == [
        *(str(number) for number in range(10)),
        "... and 2 more",
    ]
    assert files.format_list(["one"]) == "one"


# --- formats ---


@pytest.mark.parametrize("suffix", files.IMAGE_SUFFIXES)
def test_every_suffix_that_is_listed_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    Image.new("RGB", (6, 4), (200, 0, 0)).save(path)
    assert files.image_files(tmp_path) == [path]
    image = files.read_image(path)
    assert image.shape == (4, 6, 3) and abs(image.astype(int) - [200, 0, 0]).max() <= 3


def test_files_that_are_not_read_are_listed_but_dot_files_are_not(tmp_path):
    for name in ("a.png", "b.PNG", "c.gif", "notes.txt", "._a.png", ".DS_Store"):
        (tmp_path / name).touch()
    assert [path.name for path in files.image_files(tmp_path)] == ["a.png", "b.PNG"]
    assert [path.name for path in files.unread_files(tmp_path)] == ["c.gif", "notes.txt"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"GIF89a", "GIF"),
        (b"DDS \x7c\0\0\0", "DDS"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x89PNG\r\n\x1a\n and nothing more", "damaged"),
        (b"just text", "no known image"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("read", [files.read_image, files.check_size])
def test_other_content_under_the_name_of_an_image_is_named_at_once(tmp_path, content, named, read):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"photo\.png: cannot be decoded.*{named}"):
        read(path)


@pytest.mark.parametrize("kind", [NotImplementedError, RuntimeError, TypeError, struct.error, KeyError])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, kind):
    def fail(image, *args):
        raise kind("odd file")

    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(FileError, match=r"a\.png: cannot be decoded \(.*odd file"):
        files.read_image(tmp_path / "a.png")


def test_running_out_of_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def fail(image):
        raise MemoryError

    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        files.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
def test_files_of_several_pages_or_frames_are_refused(tmp_path, suffix):
    first, second = Image.new("RGB", (6, 4)), Image.new("RGB", (6, 4), "red")
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    with pytest.raises(FileError, match="holds 2 images"):
        files.read_image(tmp_path / f"a{suffix}")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0"])
def test_a_damaged_exif_block_is_ignored(tmp_path, exif):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert files.read_image(tmp_path / "a.jpg").shape == (4, 6, 3)


def test_other_exif_tags_do_not_matter(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "software"
    exif[0xC4A5] = TiffImagePlugin.IFDRational(1, 0)  # written back, it would raise
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert files.read_image(tmp_path / "a.jpg").shape == (6, 4, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright_in_every_format(tmp_path, orientation, suffix):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # bright at the top left
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = inverse.get(orientation, files.TRANSPOSES.get(orientation))
    stored = Image.fromarray(upright)
    stored = stored.transpose(turn) if turn is not None else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a{suffix}", exif=exif)
    assert ((files.read_image(tmp_path / f"a{suffix}") > 127) == (upright > 127)).all()
    assert files.decode(tmp_path / f"a{suffix}").orientation == orientation


# --- shrinking JPEG files ---


def smooth_image(size):
    """Colors that grow smoothly to the right and to the bottom, without symmetry."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    y, x = y / size[0], x / size[1]
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(12 * x * y + 1)]
    return np.rint(127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("size", "longest", "shrunk"),
    [((480, 640), 180, (120, 160)), ((379, 807), 210, (95, 202)), ((379, 807), 180, (85, 180))],
)
def test_a_large_jpeg_is_decoded_small_and_shows_the_whole_image(
    tmp_path, orientation, size, longest, shrunk
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth_image(size)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    file = files.decode(tmp_path / "a.jpg", longest)
    full = files.decode(tmp_path / "a.jpg")
    assert file.orientation == orientation and file.size == full.size == full.image.size[::-1]
    expected_size = shrunk if orientation < 5 else shrunk[::-1]
    image = files.to_rgb(file).astype(int)
    assert image.shape == (*expected_size, 3)
    expected = np.asarray(full.image.resize(expected_size[::-1], Image.Resampling.BOX)).astype(int)
    difference = np.abs(image - expected).mean()
    assert difference < 1
    for axis in (0, 1):  # moved by one pixel, it fits worse
        moved = np.roll(image, 1, axis)
        assert np.abs(moved - expected)[2:-2, 2:-2].mean() > 1.5 * difference


@pytest.mark.parametrize(
    ("sides", "longest", "expected"),
    [
        ((400, 300), 400, 400),  # not larger
        ((679, 500), 400, 679),  # a half would be less than 340
        ((680, 500), 400, 340),
        ((801, 500), 400, 400),  # a half of it is larger than asked for
        ((3000, 20), 400, 375),
    ],
)
def test_a_jpeg_is_shrunk_only_if_enough_is_left(tmp_path, sides, longest, expected):
    Image.new("L", sides, 90).save(tmp_path / "a.jpg")
    assert files.read_image(tmp_path / "a.jpg", longest).shape[1] == expected


@pytest.mark.parametrize(
    ("suffix", "size"), [(".png", (480, 640)), (".webp", (480, 640)), (".jpg", (240, 320))]
)
def test_other_images_and_smaller_ones_stay_as_they_are(tmp_path, suffix, size):
    Image.fromarray(smooth_image(size)).save(tmp_path / f"a{suffix}")
    with_longest = files.read_image(tmp_path / f"a{suffix}", 200)
    assert (with_longest == files.read_image(tmp_path / f"a{suffix}")).all()


def test_a_gray_or_cmyk_jpeg_and_one_of_a_phone_are_shrunk(tmp_path):
    for mode in ("L", "CMYK"):
        Image.new(mode, (640, 480), 90 if mode == "L" else (0, 90, 0, 0)).save(tmp_path / f"{mode}.jpg")
        assert files.read_image(tmp_path / f"{mode}.jpg", 200).shape == (150, 200, 3)
    image = Image.fromarray(smooth_image((480, 640)))
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[image.resize((64, 48))])
    assert files.read_image(tmp_path / "phone.jpg", 200).shape == (150, 200, 3)
