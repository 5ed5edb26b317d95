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
    images = list(media.read_images(paths, mask_paths, files.MAX_PIXELS, faults))
    assert [(image.name, image.stem) for image in images] == [("0.png", "0"), ("2.png", "2"), ("3.png", "3")]
    for image in images:
        assert (image.image == files.read_image(folder / "imgs" / image.name)).all()
    assert images[1].mask is None  # it has another size
    for image in images[::2]:
        assert (image.mask == masks.read_mask(folder / "masks" / image.name)).all()
    assert len(faults) == 2
    assert faults[0].startswith("not predicted: ") and "1.png: cannot be decoded" in faults[0]
    assert faults[1].startswith("predicted, but not compared: ")
    assert "2.png: is 48 x 64 (h x w) but its mask is 8 x 9" in faults[1]


def test_names_are_compared_as_they_look(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = write_dataset(tmp_path / "a", 1)
    (folder / "masks/0.png").rename(folder / f"masks/{composed}.png")
    (tmp_path / "p.csv").write_text(f"image,x,y\n{composed}.jpg,1,2\n", encoding="utf-8")
    image_path = tmp_path / f"{decomposed}.jpg"
    assert media.find_masks(folder / "masks", [image_path]).keys() == {decomposed}
    assert media.find_prompts(tmp_path / "p.csv", [image_path]).keys() == {decomposed}


def test_all_missing_and_doubled_masks_are_listed(tmp_path):
    folder = write_dataset(tmp_path / "a", 2)
    images = [tmp_path / f"{number}.png" for number in range(14)]
    with pytest.raises(UserError, match=r"no mask for 12 of 14 images.*\n  2\.png\n(?s:.*)\.\.\. and 2 more"):
        media.find_masks(folder / "masks", images)
    (folder / "masks/1.jpg").touch()
    with pytest.raises(UserError, match=r"two masks for 1 of 2 images.*\n  1\.png"):
        media.find_masks(folder / "masks", images[:2])


def test_images_without_masks(tmp_path):
    folder = write_dataset(tmp_path / "a", 2)
    faults = []
    images = list(media.read_images(media.find_images(folder / "imgs"), {}, files.MAX_PIXELS, faults))
    assert [image.mask for image in images] == [None, None] and faults == []


def test_a_single_file_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "a.tif").touch()
    assert media.find_images(tmp_path / "a.tif") == [tmp_path / "a.tif"]


def test_prompts_are_required_for_every_image(tmp_path):
    (tmp_path / "p.csv").write_text("image,x,y\na.png,1,2\nother.png,3,4\n")
    assert media.find_prompts(tmp_path / "p.csv", [tmp_path / "a.jpg"]).keys() == {"a"}
    with pytest.raises(UserError, match=r"--prompt .*p\.csv: no prompt for 1 of 2 images.*\n  b\.jpg"):
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
    images = list(media.read_frames(tmp_path / "clip.avi"))
    assert [image.stem for image in images] == [f"clip_{number:06d}" for number in range(4)]
    for image, frame in zip(images, frames, strict=True):
        assert np.abs(image.image.astype(int) - frame).max() < 12  # MJPG is lossy


def test_a_file_that_is_not_a_video_has_defaults_and_is_refused(tmp_path):
    (tmp_path / "none.mp4").write_bytes(b"not a video")
    assert media.frame_count(tmp_path / "none.mp4") == 0
    assert media.frame_rate(tmp_path / "none.mp4") == 25
    assert list(media.read_frames(tmp_path / "none.mp4")) == []
    with pytest.raises(UserError, match=r"none\.mp4: no frame of this video can be decoded"):
        media.require_video(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("size", "rate", "written_size"),
    [
        ((48, 64), 10, (48, 64)),
        ((47, 63), 196.263, (48, 64)),  # padded, not cropped
        ((1, 17), 30000 / 1001, (2, 18)),
        ((48, 64), 0.5, (48, 64)),
        ((48, 64), 1000, (48, 64)),
    ],
)
def test_videos_of_any_size_and_rate_open_again(tmp_path, size, rate, written_size):
    frames = []
    for number in range(3):
        frames.append(np.zeros((*size, 3), np.uint8))
        frames[-1][draw_cable(rng(number), size, 7)] = 250
        frames[-1][:, -1] = 250  # the last column is not lost
    with media.VideoWriter(tmp_path / "out.mp4", rate) as video:
        for frame in frames:
            video.write(frame)
        video.finish()
    assert media.frame_count(tmp_path / "out.mp4") == 3
    assert media.frame_rate(tmp_path / "out.mp4") == pytest.approx(rate, rel=1e-3)
    for image, frame in zip(media.read_frames(tmp_path / "out.mp4"), frames, strict=True):
        assert image.image.shape[:2] == written_size
        seen = image.image[: size[0], : size[1]].astype(int)
        assert np.abs(seen - frame).mean() < 12  # the codec is lossy
        assert image.image[: size[0], size[1] - 1 :].mean() > 180
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_a_video_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(UserError, match=r"out\.mp4 could not be written"),
        media.VideoWriter(tmp_path / "nowhere" / "out.mp4", 10),
    ):
        pass


def test_a_video_with_fewer_frames_than_written_is_refused(tmp_path):
    with media.VideoWriter(tmp_path / "out.mp4", 10) as video:
        video.write(np.zeros((48, 64, 3), np.uint8))
        video.n_frames += 1  # a frame that the codec lost
        with pytest.raises(UserError, match=r"of 2 frames it holds 1"):
            video.finish()
    assert list(tmp_path.iterdir()) == []
