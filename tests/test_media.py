"""Images, videos and cameras in and out of prediction."""

import io
import math
import threading
import time
from fractions import Fraction
from pathlib import Path
from queue import Queue

import av
import cv2
import numpy as np
import pytest
from conftest import draw_cable, rng, write_dataset, write_video
from PIL import Image

from base.errors import UserError
from base.flag_types import MAX_PIXELS
from imaging import files, masks, media


def input_file(path):
    return media.InputFile(path, path.name, path.stem)


def video_file(path):
    return media.Video(path, str(path), path.stem)


def gray_frames(n, size=(48, 64)):
    """Frames of which each is brighter than the one before."""
    return [np.full((*size, 3), 20 + 10 * number, np.uint8) for number in range(n)]


def numbers_of(frames):
    """Which frames of `gray_frames` these are."""
    return [round((float(frame.mean()) - 20) / 10) for frame in frames]


def test_images_come_with_their_masks_and_faults_are_listed(tmp_path):
    folder = write_dataset(tmp_path / "a", 4)
    (folder / "imgs" / "1.png").write_bytes(b"not an image")
    Image.new("L", (9, 8)).save(folder / "masks" / "2.png")
    paths, _ = media.find_inputs(folder / "imgs")
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
    image = input_file(tmp_path / f"{decomposed}.jpg")
    assert media.find_masks(folder / "masks", [image]).keys() == {decomposed}
    assert media.find_prompts(tmp_path / "p.csv", [image], MAX_PIXELS).keys() == {decomposed}


def test_all_missing_and_doubled_masks_are_listed(tmp_path):
    folder = write_dataset(tmp_path / "a", 2)
    images = [input_file(tmp_path / f"{number}.png") for number in range(14)]
    with pytest.raises(UserError, match=r"no mask for 12 of 14 images.*\n  2\.png\n(?s:.*)\.\.\. and 2 more"):
        media.find_masks(folder / "masks", images)
    (folder / "masks/1.jpg").touch()
    with pytest.raises(UserError, match=r"two masks for 1 of 2 images.*\n  1\.png"):
        media.find_masks(folder / "masks", images[:2])


def test_images_without_masks(tmp_path):
    folder = write_dataset(tmp_path / "a", 2)
    faults = []
    images = list(media.read_images(media.find_inputs(folder / "imgs")[0], {}, files.MAX_PIXELS, faults))
    assert [image.mask for image in images] == [None, None] and faults == []


def test_a_single_file_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "a.tif").touch()
    assert media.find_inputs(tmp_path / "a.tif") == ([input_file(tmp_path / "a.tif")], [])
    Image.new("L", (9, 8)).save(tmp_path / "photo.data", format="PNG")
    assert media.find_inputs(tmp_path / "photo.data") == ([input_file(tmp_path / "photo.data")], [])
    write_video(tmp_path / "clip.avi", [np.zeros((48, 64, 3), np.uint8)])
    clip = (tmp_path / "clip.avi").rename(tmp_path / "clip.data")
    assert media.find_inputs(clip) == ([], [media.Video(clip, str(clip), "clip")])


def test_folders_are_read_as_their_imgs_or_their_subfolders(tmp_path):
    for name in ("b/0.png", "a/x/0.JPG", "a/x/notes.txt", "a/x/deeper/1.png", ".hidden/2.png", "c/clip.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    write_dataset(tmp_path / "d", 1)
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "out/masks").mkdir(parents=True)  # an earlier prediction
    (tmp_path / "out/masks/0.png").touch()
    (tmp_path / "out/predictions.json").touch()
    images, videos = media.find_inputs(tmp_path)
    assert [(image.name, image.stem) for image in images] == [
        ("a/x/0.JPG", "a_x_0"), ("b/0.png", "b_0"), ("d/0.png", "d_0"),
    ]  # fmt: skip
    assert [(video.source, video.stem) for video in videos] == [(tmp_path / "c/clip.mkv", "c_clip")]
    images, videos = media.find_inputs(tmp_path / "d")
    assert images == [media.InputFile(tmp_path / "d/imgs/0.png", "0.png", "0")] and videos == []


def test_photos_that_are_not_read_are_found_in_the_folders_that_are_read(tmp_path):
    for name in (
        "a/0.jpg", "a/0.CR2", "a/1.HEIC", "a/notes.txt", "a/0.json", "a/0.npy", "a/Thumbs.db",
        "a/deeper/2.heic", "b/3.avif", "c/4.mov", "c/4.heic", "out/masks/5.heic", "out/predictions.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in media.find_unread(tmp_path)]
    assert found == ["a/1.HEIC", "b/3.avif", "c/4.heic"]  # a camera wrote 0.jpg beside 0.CR2
    assert media.find_unread(tmp_path / "a/0.jpg") == media.find_unread(0) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b_0.png", "a_b/0.png"], "a/b_0.png and a_b/0.png"),
        (["clip.mp4", "clip.MOV"], "clip.MOV and clip.mp4"),
        (["clip.mp4", "clip_000001.png"], "clip.mp4 and clip_000001.png"),
        (["clip.mp4", "clip.png", "clip_1.png", "dip_000001.png", "dip_000002.png"], None),
    ],
)
def test_files_with_results_of_one_name_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if message is None:
        images, videos = media.find_inputs(tmp_path)
        assert len(images) == 4 and len(videos) == 1
    else:
        with pytest.raises(UserError, match=f"{message} would give one mask"):
            media.find_inputs(tmp_path)


def test_masks_of_images_in_subfolders_are_in_the_same_subfolders(tmp_path):
    for number, name in enumerate("ab"):
        write_dataset(tmp_path / name, 1 + number)
    images, _ = media.find_inputs(tmp_path)
    assert media.find_masks(tmp_path, images) == {
        "a_0": tmp_path / "a/masks/0.png",
        "b_0": tmp_path / "b/masks/0.png",
        "b_1": tmp_path / "b/masks/1.png",
    }
    (tmp_path / "b/masks/1.png").unlink()
    with pytest.raises(UserError, match=r"no mask for 1 of 3 images.*\n  b/1\.png"):
        media.find_masks(tmp_path, images)
    (tmp_path / "p.csv").write_text("image,x,y\n0.png,1,2\n1.png,3,4\n")
    with pytest.raises(UserError, match=r"a/0\.png and b/0\.png have the same file name"):
        media.find_prompts(tmp_path / "p.csv", images, MAX_PIXELS)


def test_cameras_and_streams_have_names_without_passwords():
    assert media.find_inputs(2) == ([], [media.Video(2, "camera 2", "camera_2")])
    assert media.find_inputs(Path("/dev/video2")) == media.find_inputs(2)
    url = "rtsp://me:secret@10.0.0.7:554/live/left side.sdp?x=1"
    expected = media.Video(url, "rtsp://10.0.0.7:554/live/left side.sdp?x=1", "left_side")
    assert media.find_inputs(url) == ([], [expected])
    assert media.find_inputs("rtsp://10.0.0.7")[1][0].stem == "stream"


def test_prompts_are_required_for_every_image(tmp_path):
    (tmp_path / "p.csv").write_text("image,x,y\na.png,1,2\nother.png,3,4\n")
    assert media.find_prompts(tmp_path / "p.csv", [input_file(tmp_path / "a.jpg")], MAX_PIXELS).keys() == {
        "a"
    }
    with pytest.raises(UserError, match=r"--prompt .*p\.csv: no prompt for 1 of 2 images.*\n  b\.jpg"):
        media.find_prompts(
            tmp_path / "p.csv", [input_file(tmp_path / f"{name}.jpg") for name in "ab"], MAX_PIXELS
        )


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_prompts_are_for_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / f"a{suffix}", exif=exif)
    image = input_file(tmp_path / f"a{suffix}")
    assert files.read_image(image.path).shape == (64, 48, 3)
    (tmp_path / "p.csv").write_text("image,x,y\na.png,40,60\n")
    assert media.find_prompts(tmp_path / "p.csv", [image], MAX_PIXELS).keys() == {"a"}
    (tmp_path / "p.csv").write_text("image,x,y\na.png,60,40\n")
    with pytest.raises(UserError, match=r"line 2: point \(60, 40\) in a\.png, which is 48 px wide and 64 px"):
        media.find_prompts(tmp_path / "p.csv", [image], MAX_PIXELS)


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
    images = list(media.read_frames(video_file(tmp_path / "clip.avi")))
    assert [image.stem for image in images] == [f"clip_{number:06d}" for number in range(4)]
    for image, frame in zip(images, frames, strict=True):
        assert np.abs(image.image.astype(int) - frame).max() < 12  # MJPG is lossy


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *((suffix, "mpeg4") for suffix in (".avi", ".mp4", ".m4v", ".mov", ".3gp", ".mkv")),
        *((suffix, "mpeg2video") for suffix in (".ts", ".m2ts", ".mpg", ".mpeg", ".vob", ".mxf")),
        *((".webm", "libvpx"), (".wmv", "wmv2"), (".asf", "wmv2"), (".flv", "flv"), (".mjpg", "mjpeg")),
        *((".h264", "libx264"), (".y4m", "rawvideo"), (".gif", "gif")),
    ],
)
def test_videos_of_all_formats_are_read(tmp_path, suffix, codec):
    path = tmp_path / f"clip{suffix.upper()}"
    formats = {".m2ts": "mpegts", ".mpeg": "mpeg", ".y4m": "yuv4mpegpipe", ".mjpg": "mjpeg"}
    with av.open(str(path), "w", format=formats.get(suffix)) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 352, 288
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for frame in gray_frames(6, (288, 352)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert suffix in media.VIDEO_SUFFIXES
    _, (video,) = media.find_inputs(path)
    images = [image.image for image in media.read_frames(video)]
    assert numbers_of(images) == list(range(6))
    assert 0 < media.frame_rate(path) <= media.MAX_FRAME_RATE and not media.is_live(video)


def test_a_file_that_is_not_a_video_has_defaults_and_is_refused(tmp_path):
    (tmp_path / "none.mp4").write_bytes(b"not a video")
    assert media.frame_count(tmp_path / "none.mp4") == 0
    assert media.frame_rate(tmp_path / "none.mp4") == 25
    assert list(media.read_frames(video_file(tmp_path / "none.mp4"))) == []
    with pytest.raises(UserError, match=r"none\.mp4: no frame of this video can be decoded"):
        media.require_video(video_file(tmp_path / "none.mp4"))


def test_a_trimmed_clip_has_the_frames_that_it_shows(tmp_path):
    """Its header still counts the frames that an editor has cut off; its duration does not."""
    with media.VideoWriter(tmp_path / "clip.mp4", 25) as video:
        for frame in gray_frames(20):
            video.write(frame)
        video.finish()
    with av.open(str(tmp_path / "clip.mp4")) as clip, av.open(str(tmp_path / "trimmed.mp4"), "w") as trimmed:
        stream = trimmed.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux(video=0):
            if packet.dts is not None:
                shift = int(Fraction(15, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                trimmed.mux(packet)
    assert cv2.VideoCapture(str(tmp_path / "trimmed.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 20
    images = [image.image for image in media.read_frames(video_file(tmp_path / "trimmed.mp4"))]
    assert numbers_of(images) == [15, 16, 17, 18, 19]
    assert media.frame_count(tmp_path / "trimmed.mp4") == 5


@pytest.mark.parametrize("stated", [0.0, -1.0, math.nan, math.inf, 90000.0])
def test_impossible_numbers_of_a_camera_are_replaced(monkeypatch, stated):
    class Camera:
        def get(self, key):
            return stated

    monkeypatch.setattr(media, "open_video", lambda source: Camera())
    assert media.frame_rate(0) == 25
    assert media.frame_count(0) == 0
    assert media.frame_count("rtsp://x") == (90000 if stated == 90000 else 0)


def test_a_camera_gives_its_newest_frame(monkeypatch):
    frames, asked = Queue(), Queue()

    class Camera:
        def __init__(self, source):
            assert source == 3

        def read(self):
            asked.put("the frame before is kept")
            frame = frames.get(timeout=60)
            return frame is not None, frame

    def send(frame):
        frames.put(frame)
        asked.get(timeout=60)

    monkeypatch.setattr(media, "open_video", Camera)
    _, (camera,) = media.find_inputs(3)
    sent = gray_frames(5)
    frames.put(sent[0])
    images = media.read_newest_frames(camera, lambda: False)
    shown = [next(images)]
    asked.get(timeout=60)
    asked.get(timeout=60)
    for frame in sent[1:4]:  # they come while the first one is in use
        send(frame)
    shown.append(next(images))
    send(sent[4])
    frames.put(None)
    shown += images
    assert [image.stem for image in shown] == [f"camera_3_{n:06d}" for n in range(3)]
    assert numbers_of([image.image for image in shown]) == [0, 3, 4]
    frames.put(None)
    assert list(media.read_newest_frames(camera, lambda: True)) == []


def test_a_stream_that_stalls_has_ended(monkeypatch):
    frames, is_over, went_on = gray_frames(1), threading.Event(), []

    class Stream:
        def __init__(self, source):
            pass

        def read(self):
            if frames:
                return True, frames.pop()
            monkeypatch.setattr(media, "STALL", 0.1)
            went_on.append(is_over.wait(60))
            return False, None

    monkeypatch.setattr(media, "open_video", Stream)
    (video,) = media.find_inputs("rtsp://x/y")[1]
    images = list(media.read_newest_frames(video, lambda: False))
    has_gone_on = bool(went_on)
    is_over.set()
    assert [image.stem for image in images] == ["y_000000"] and not has_gone_on


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
    for image, frame in zip(media.read_frames(video_file(tmp_path / "out.mp4")), frames, strict=True):
        assert image.image.shape[:2] == written_size
        seen = image.image[: size[0], : size[1]].astype(int)
        assert np.abs(seen - frame).mean() < 12  # the codec is lossy
        assert image.image[: size[0], size[1] - 1 :].mean() > 180
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_browsers_can_play_the_videos(tmp_path):
    """They play H.264 with 4:2:0 colors in MP4."""
    with media.VideoWriter(tmp_path / "out.mp4", 10) as video:
        for frame in gray_frames(3):
            video.write(frame)
        video.finish()
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert "mp4" in container.format.name
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_without_a_rate_frames_have_the_times_at_which_they_were_written(tmp_path, monkeypatch):
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with media.VideoWriter(tmp_path / "out.mp4", None) as video:
        for frame, pause in zip(gray_frames(3), (0, 0.1, 0.3), strict=True):
            now += pause
            video.write(frame)
        monkeypatch.undo()
        video.finish()
    with av.open(str(tmp_path / "out.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([0, 0.1, 0.4])


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


def test_a_video_that_does_not_open_again_is_named(tmp_path, monkeypatch):
    def truncate(path, mode="r"):
        if mode == "r":
            Path(path).write_bytes(Path(path).read_bytes()[:100])
        return open_media(path, mode)

    open_media = av.open
    monkeypatch.setattr(av, "open", truncate)
    with media.VideoWriter(tmp_path / "out.mp4", 10) as video:
        video.write(np.zeros((48, 64, 3), np.uint8))
        with pytest.raises(UserError, match=r"out\.mp4 could not be written"):
            video.finish()


def test_an_image_longer_than_jpeg_allows_is_shrunk():
    image = np.full((20, 70_000, 3), 90, np.uint8)
    with Image.open(io.BytesIO(media.encode_image(image, ".jpg"))) as written:
        assert written.size == (65_500, 19)
    with Image.open(io.BytesIO(media.encode_image(image, ".png"))) as written:
        assert written.size == (70_000, 20)
