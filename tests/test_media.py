"""Images and videos in and out of prediction."""

import numpy as np
import pytest
from conftest import draw_cable, rng, write_dataset, write_video
from PIL import Image

from base.errors import UserError
from imaging import files, masks, media


def test_images_come_with_their_masks_and_faults_are_listed(tmp_path):
    folder = write_dataset(tmp_path / "a", 4)
    (folder / "imgs" / "1.png").write_bytes(b"not an image")
    Image.new("L", (9, 8)).save(folder / "masks" / "2.png")
    paths = media.find_images(folder / "imgs")
    mask_paths = media.find_masks(folder / "masks", paths)
    faults = []
    images = list(media.read_images(paths, mask_paths, faults))
    assert [(image.name, image.stem) for image in images] == [("0.png", "0"), ("3.png", "3")]
    for image in images:
        assert (image.image == files.read_image(folder / "imgs" / image.name)).all()
        assert (image.mask == masks.read_mask(folder / "masks" / image.name)).all()
    assert len(faults) == 2
    assert "1.png: cannot be decoded" in faults[0]
    assert "2.png: is 48 x 64 (h x w) but its mask is 8 x 9" in faults[1]


def test_images_without_masks(tmp_path):
    folder = write_dataset(tmp_path / "a", 2)
    faults = []
    images = list(media.read_images(media.find_images(folder / "imgs"), {}, faults))
    assert [image.mask for image in images] == [None, None] and faults == []


def test_a_single_file_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "a.tif").touch()
    assert media.find_images(tmp_path / "a.tif") == [tmp_path / "a.tif"]


def test_prompts_are_required_for_every_image(tmp_path):
    (tmp_path / "p.csv").write_text("image,x,y\na.png,1,2\nother.png,3,4\n")
    assert media.find_prompts(tmp_path / "p.csv", [tmp_path / "a.jpg"]).keys() == {"a", "other"}
    with pytest.raises(UserError, match=r"--prompt .*p\.csv: no prompt for b\.jpg"):
        media.find_prompts(tmp_path / "p.csv", [tmp_path / "a.jpg", tmp_path / "b.jpg"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_files_keep_their_values(tmp_path, dtype):
    values = rng().integers(0, np.iinfo(dtype).max, (5, 6)).astype(dtype)
    media.write_image(tmp_path / "a.png", values)
    with Image.open(tmp_path / "a.png") as file:
        assert (np.asarray(file) == values).all()


def test_frames_are_numbered_and_rgb(tmp_path):
    frames = [np.full((48, 64, 3), (200, 30, 10 * number), np.uint8) for number in range(4)]
    write_video(tmp_path / "clip.avi", frames, rate=12)
    assert media.is_video(tmp_path / "clip.avi") and not media.is_video(tmp_path / "clip.png")
    assert media.frame_count(tmp_path / "clip.avi") == 4 and media.frame_rate(tmp_path / "clip.avi") == 12
    faults = []
    images = list(media.read_frames(tmp_path / "clip.avi", faults))
    assert [image.stem for image in images] == [f"clip_{number:06d}" for number in range(4)]
    for image, frame in zip(images, frames, strict=True):
        assert np.abs(image.image.astype(int) - frame).max() < 12  # MJPG is lossy
    assert faults == []


def test_a_file_that_is_not_a_video_has_defaults_and_a_fault(tmp_path):
    (tmp_path / "none.mp4").write_bytes(b"not a video")
    assert media.frame_count(tmp_path / "none.mp4") == 0
    assert media.frame_rate(tmp_path / "none.mp4") == 25
    faults = []
    assert list(media.read_frames(tmp_path / "none.mp4", faults)) == []
    assert faults == [f"{tmp_path / 'none.mp4'}: of 0 frames only 0 can be decoded"]


def test_a_video_is_joined_from_image_files(tmp_path):
    paths = []
    for number in range(3):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[draw_cable(rng(number), (48, 64), 7)] = 250
        paths.append(tmp_path / f"{number}.png")
        media.write_image(paths[-1], frame)
    media.write_video(tmp_path / "out.mp4", paths, 10)
    assert media.frame_count(tmp_path / "out.mp4") == 3 and media.frame_rate(tmp_path / "out.mp4") == 10
    for image, path in zip(media.read_frames(tmp_path / "out.mp4", []), paths, strict=True):
        cable = files.read_image(path)[..., 0] > 0
        assert image.image[cable].mean() > image.image[~cable].mean() + 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "out.mp4"]


def test_a_video_that_cannot_be_written_is_named(tmp_path):
    media.write_image(tmp_path / "0.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"out\.mp4 could not be written"):
        media.write_video(tmp_path / "nowhere" / "out.mp4", [tmp_path / "0.png"], 10)
