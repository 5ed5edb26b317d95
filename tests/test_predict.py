"""predict.py: the real command on drawn cables."""

import csv
import json
import os
import signal
import time
import warnings

import av
import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset, write_video
from PIL import Image
from segment_anything import SamPredictor

import checkpoint
import inference
import predict
from imaging import media
from imaging.centerlines import cables_document, centerlines, instance_mask
from imaging.coco import decode_rle
from imaging.files import read_image
from imaging.masks import read_mask
from imaging.metrics import GroundTruth, score
from imaging.output_folder import OutputFolder
from sam import variants
from sidecar import Sidecar, sidecar_path, write_sidecar


@pytest.fixture
def trained(tiny_weights, tiny_sam):
    """Weights that find some cable pixels and miss others."""
    with torch.no_grad():
        for parameter in tiny_sam.mask_decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(3)) * 0.05)
    checkpoint.save_weights(tiny_sam.state_dict(), tiny_weights)
    return tiny_weights


def run(weights, source, output, *argv):
    flags = ("--checkpoint", weights, "--input", source, "--output", output)
    return predict.main([str(part) for part in (*flags, "--device", "cpu", "--amp", "off", *argv)])


def written_files(output):
    """What the list of an output folder names."""
    return list(json.loads((output / "predictions.json").read_text())["files"])


def snapshot(folder):
    """The content of every file in a folder and its folders."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gives_sam_predictors_masks_and_their_measures(trained, tiny_sam, data, tmp_path, capsys):
    write_dataset(tmp_path / "wide", 2, size=(40, 100), seed=2)  # sizes differ within a batch
    for kind in ("imgs", "masks"):
        for file in (tmp_path / "wide" / kind).iterdir():
            file.rename(data / "test" / kind / f"wide {file.name}")
    photos, masks = data / "test/imgs", data / "test/masks"
    assert run(trained, photos, tmp_path / "out", "--masks", masks, "--batch_size", 2) == 0
    predictor = SamPredictor(tiny_sam)
    ious = []
    for path in sorted(photos.iterdir()):
        predictor.set_image(read_image(path))
        official = predictor.predict(multimask_output=False)[0][0]
        with Image.open(tmp_path / f"out/masks/{path.stem}.png") as file:
            ours = np.asarray(file)
        assert set(np.unique(ours)) == {0, 255}  # neither empty nor full, or this test shows nothing
        assert np.mean((ours == 255) != official) < 0.002
        assert read_image(tmp_path / f"out/overlays/{path.stem}.jpg").shape == (*ours.shape, 3)
        ious.append(score(ours == 255, GroundTruth.from_mask(read_mask(masks / path.name))).iou)
    threshold, speed, *table, of_the_set = capsys.readouterr().out.splitlines()
    assert threshold == "threshold 0 (the default, without tiny.json)"
    assert speed.startswith("5 images, ") and "images/s" in speed
    assert of_the_set.startswith("total_iou 0.1") and "recall_thin" in of_the_set
    assert len(ious) == 5 and len(table) == 7
    assert table[-1].split()[:2] == ["mean", f"{np.mean(ious):.4f}"]
    assert table[0].split()[1:] == ["iou", "dice", "precision", "recall", "boundary_iou", "cldice"]
    assert float(table[1].split()[-6]) == pytest.approx(min(ious), abs=1e-4)  # the worst comes first
    with (tmp_path / "out/measures.csv").open(newline="") as file:
        written = [(row["picture"], float(row["iou"])) for row in csv.DictReader(file)]
    assert [iou for _, iou in written] == pytest.approx(sorted(ious))
    assert {stem for stem, _ in written} == {path.stem for path in photos.iterdir()}
    assert read_image(tmp_path / "out/worst.jpg").shape[1] == 1280


def test_unreadable_images_are_listed_and_the_rest_predicted(trained, data, tmp_path, capsys):
    (data / "test/imgs/0.png").write_bytes(b"not an image")
    assert run(trained, data / "test/imgs", tmp_path / "out") == 1
    assert "0.png: cannot be decoded" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["1.png", "2.png"]


def test_a_single_image(trained, data, tmp_path):
    assert run(trained, data / "test/imgs/1.png", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["1.png"]


def test_run_lengths_without_small_regions(trained, data, tmp_path):
    flags = ("--rle", "--polygons", "--min_area", 20, "--threshold", 0.01)
    assert run(trained, data / "test/imgs", tmp_path / "out", *flags) == 0
    runs, parts = (json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("rle", "polygons"))
    assert [entry["area"] for entry in runs["annotations"]] == [p["area"] for p in parts["annotations"]]
    assert runs["annotations"] and all(entry["area"] >= 20 for entry in runs["annotations"])
    for entry in runs["annotations"]:
        region = decode_rle(entry["segmentation"]["counts"], tuple(entry["segmentation"]["size"]))
        mask = read_mask(tmp_path / f"out/masks/{entry['image_id'] - 1}.png")
        assert region.sum() == entry["area"] and mask[region].all()


def test_probabilities_polygons_and_another_threshold(trained, data, tmp_path):
    flags = ("--probabilities", "--polygons", "--threshold", 0.01)
    assert run(trained, data / "test/imgs", tmp_path / "out", *flags) == 0
    document = json.loads((tmp_path / "out/polygons.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["0.png", "1.png", "2.png"]
    for number, stem in enumerate("012", 1):
        mask = read_mask(tmp_path / f"out/masks/{stem}.png")
        with Image.open(tmp_path / f"out/probabilities/{stem}.png") as file:
            probabilities = np.asarray(file) / 65535
        least = 1 / (1 + np.exp(-0.01))
        clear = np.abs(probabilities - least) > 1e-5  # what is not rounded to it
        np.testing.assert_array_equal((probabilities > least)[clear], mask[clear])
        assert clear.mean() > 0.99
        parts = [part["area"] for part in document["annotations"] if part["image_id"] == number]
        assert sum(parts) == mask.sum() > 0
    with_zero = tmp_path / "zero"
    assert run(trained, data / "test/imgs", with_zero) == 0
    assert read_mask(with_zero / "masks/0.png").sum() > read_mask(tmp_path / "out/masks/0.png").sum()


def test_the_threshold_is_that_of_the_sidecar(trained, data, tmp_path, capsys):
    """The flag comes before the sidecar, and a damaged sidecar leaves the default."""
    masks, first_lines = {}, {}
    write_sidecar(Sidecar(model_type="tiny", input_size=64, threshold=0.01), trained)
    for name, flags in (("sidecar", ()), ("flag", ("--threshold", -0.02)), ("damaged", ())):
        if name == "damaged":
            sidecar_path(trained).write_text("{")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert run(trained, data / "test/imgs", tmp_path / name, *flags) == 0
        assert (len(warned) == 1 and "tiny.json is ignored" in str(warned[0].message)) == (name == "damaged")
        first_lines[name] = capsys.readouterr().out.splitlines()[0]
        masks[name] = read_mask(tmp_path / name / "masks/0.png")
        document = json.loads((tmp_path / name / "predictions.json").read_text())
        assert document["flags"]["threshold"] == {"sidecar": 0.01, "flag": -0.02, "damaged": 0}[name]
    assert first_lines["sidecar"] == "threshold 0.01 (from tiny.json)"
    assert first_lines["flag"] == "threshold -0.02 (--threshold)"
    assert first_lines["damaged"] == "threshold 0 (the default, without tiny.json)"
    assert 0 < masks["sidecar"].sum() < masks["damaged"].sum() < masks["flag"].sum() < masks["flag"].size


def test_the_best_threshold_is_on_the_logits_themselves(trained, data, tmp_path, capsys, monkeypatch):
    def by_brightness(net, images, prompts, **options):
        """Noise has gray values below 60 and cables have more than 170: logits below -0.8 and above 1.4."""
        return [image.mean(axis=2, dtype=np.float32) / 50 - 2 for image in images]

    monkeypatch.setattr(inference, "predict_logits", by_brightness)
    for threshold in (0, 0.25, 3):
        flags = ("--masks", data / "test/masks", "--threshold", threshold)
        assert run(trained, data / "test/imgs", tmp_path / f"{threshold}", *flags) == 0
        last_line = capsys.readouterr().out.splitlines()[-1]
        assert "best_threshold -0.7500, best_iou 1.0000" in last_line


def test_centerlines_and_instances_of_the_mask(trained, data, tmp_path, capsys):
    output = tmp_path / "out"
    threshold = ("--threshold", -100)  # every pixel is cable: a mask without a centerline
    assert run(trained, data / "test/imgs", output, "--centerlines", "--instances", *threshold) == 0
    assert json.loads((output / "centerlines/0.json").read_text())["cables"] == []
    assert run(trained, data / "test/imgs", output, "--centerlines", "--instances") == 0
    assert "replaced 15 files" in capsys.readouterr().out
    n_cables = 0
    for stem in "012":
        mask = read_mask(output / f"masks/{stem}.png")
        cables = centerlines(mask)
        document = json.loads((output / f"centerlines/{stem}.json").read_text())
        assert document == json.loads(json.dumps(cables_document(f"{stem}.png", mask.shape, cables)))
        assert read_image(output / f"centerlines/{stem}.jpg").shape == (*mask.shape, 3)
        with Image.open(output / f"instances/{stem}.png") as file:
            assert file.mode.startswith("I;16")
            np.testing.assert_array_equal(np.asarray(file), instance_mask(mask, cables))
        n_cables += len(cables)
    assert n_cables > 0
    assert run(trained, data / "test/imgs/0.png", output) == 0
    assert not (output / "centerlines").exists() and not (output / "instances").exists()


def test_prompts_reach_the_decoder(trained, data, tmp_path, capsys):
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\n0.png,0,0,10,10\n1.png,0,0,40,40\n")
    assert run(trained, data / "test/imgs", tmp_path / "out", "--prompt", tmp_path / "boxes.csv") == 2
    assert "no prompt for 1 of 3 images" in capsys.readouterr().err
    with (tmp_path / "boxes.csv").open("a") as file:
        file.write("2.png,5,5,60,40\n")
    assert run(trained, data / "test/imgs", tmp_path / "out", "--prompt", tmp_path / "boxes.csv") == 0
    assert run(trained, data / "test/imgs", tmp_path / "none") == 0
    with_box, without = (read_mask(tmp_path / f"{name}/masks/1.png") for name in ("out", "none"))
    assert (with_box != without).any()


def test_a_tile_is_predicted_like_an_image_of_its_own(trained, data, tmp_path):
    photo = cv2.resize(read_image(data / "test/imgs/1.png"), (320, 240), interpolation=cv2.INTER_NEAREST)
    large, corner = tmp_path / "large.png", tmp_path / "corner.png"
    Image.fromarray(photo).save(large)
    Image.fromarray(photo[-64:, :64]).save(corner)
    runs = {
        "tiles": (large, "--tiles", 64, "--batch_size", 3),
        "one tile": (large, "--tiles", 320),
        "whole": (large, "--tiles", "off"),
        "corner": (corner, "--tiles", "off"),
    }
    masks = {}
    for name, (path, *flags) in runs.items():
        assert run(trained, path, tmp_path / name, *flags) == 0
        masks[name] = read_mask(tmp_path / name / "masks" / f"{path.stem}.png")
    assert (masks["one tile"] == masks["whole"]).all()
    assert masks["tiles"].shape == (240, 320) and (masks["tiles"] != masks["whole"]).any()
    # The neighboring tiles begin 43 columns to the right and 44 rows higher, so only one tile counts here.
    ours, expected = masks["tiles"][-40:, :40], masks["corner"][-40:, :40]
    assert (ours == expected).all() and 0 < expected.mean() < 1
    with pytest.raises(SystemExit):
        run(trained, large, tmp_path / "no", "--tiles", 64, "--prompt", "p.csv")


def test_tiles_of_the_right_size_are_chosen_for_each_image(trained, tmp_path, capsys, monkeypatch):
    def by_brightness(net, images, prompts, **options):
        return [image.mean(axis=2, dtype=np.float32) - 100 for image in images]

    monkeypatch.setattr(inference, "predict_logits", by_brightness)
    (tmp_path / "photos").mkdir()
    for stem, width in (("thin", 8), ("thick", 40), ("none", 0)):
        image = np.pad(np.full((width, 400, 3), 255, np.uint8), ((100, 200 - width), (0, 0), (0, 0)))
        Image.fromarray(image).save(tmp_path / f"photos/{stem}.png")
    assert run(trained, tmp_path / "photos", tmp_path / "out", "--cable_width", 4) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    side = int(line.split()[9])
    assert line == f"tiles auto, of 3 images: 1 in tiles of {side} px, 2 whole"
    assert side == pytest.approx(8 * 64 / 4, rel=0.15)
    assert read_mask(tmp_path / "out/masks/thin.png").sum() == 8 * 400


def test_tiles_need_a_width_and_a_width_needs_tiles(trained, data, tmp_path, capsys):
    assert run(trained, data / "test/imgs", tmp_path / "out", "--tiles", "auto") == 2
    assert "--cable_width PIXELS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(trained, data / "test/imgs", tmp_path / "out", "--tiles", 64, "--cable_width", 4)
    assert "--cable_width is for --tiles auto" in capsys.readouterr().err


def test_frames_and_prompts_are_for_whole_images_by_default(trained, data, tmp_path, capsys):
    write_sidecar(Sidecar(model_type="tiny", input_size=64, cable_width=4), trained)
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\n1.png,5,5,60,40\n")
    photo, clip, box = data / "test/imgs/1.png", tmp_path / "clip.avi", ("--prompt", tmp_path / "boxes.csv")
    write_video(clip, [read_image(photo)])
    whole = [(photo, ("--tiles", "off")), (photo, box), (clip, ())]
    for number, (source, flags) in enumerate([*whole, (photo, ()), (clip, ("--tiles", "auto"))]):
        assert run(trained, source, tmp_path / f"out{number}", *flags) == 0
        assert ("tiles auto, of " in capsys.readouterr().out) == (number >= len(whole)), number
    with pytest.raises(SystemExit):
        run(trained, photo, tmp_path / "no", *box, "--tiles", "auto")


def test_a_video_gives_a_mask_a_frame_and_a_video(trained, data, tmp_path):
    frames = [read_image(data / f"cables/imgs/{number}.png") for number in range(6)]
    write_video(tmp_path / "clip.avi", frames)
    assert run(trained, tmp_path / "clip.avi", tmp_path / "out", "--polygons") == 0
    masks = sorted(path.name for path in (tmp_path / "out/masks").iterdir())
    assert masks == [f"clip_{number:06d}.png" for number in range(6)]
    assert run(trained, tmp_path / "clip.avi", tmp_path / "no", "--masks", data / "test/masks") == 2
    made = cv2.VideoCapture(str(tmp_path / "out/overlays/clip.mp4"))
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == 6 and made.get(cv2.CAP_PROP_FPS) == 5
    is_read, first = made.read()
    assert is_read and first.shape == frames[0].shape
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("tmp")] == []


def test_a_video_cut_short_is_predicted_and_too_short_a_one_is_named(trained, data, tmp_path, capsys):
    frames = [read_image(data / f"cables/imgs/{number}.png") for number in range(6)] * 5
    write_video(tmp_path / "clip.avi", frames)
    content = (tmp_path / "clip.avi").read_bytes()
    for share, code, message in ((0.8, 0, "note: "), (0.3, 1, "not predicted: ")):
        (tmp_path / "clip.avi").write_bytes(content[: int(share * len(content))])
        assert run(trained, tmp_path / "clip.avi", tmp_path / "out") == code
        assert (
            f"{message}{tmp_path}/clip.avi: of 30 frames that its header states, " in capsys.readouterr().err
        )
        n_masks = len(list((tmp_path / "out/masks").iterdir()))
        assert n_masks == media.frame_count(tmp_path / "out/overlays/clip.mp4") > 30 * (share - 0.1)
        assert len(written_files(tmp_path / "out")) == 2 * n_masks + 1


def test_a_file_that_is_no_video_leaves_the_output_as_it_was(trained, data, tmp_path, capsys):
    assert run(trained, data / "test/imgs", tmp_path / "out") == 0
    before = snapshot(tmp_path / "out")
    (tmp_path / "none.mp4").write_bytes(b"not a video")
    assert run(trained, tmp_path / "none.mp4", tmp_path / "out") == 2
    assert "none.mp4: no frame of this video can be decoded" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_a_video_that_cannot_be_written_ends_at_its_first_frame(trained, data, tmp_path, capsys, monkeypatch):
    def fail(video, width, height):
        raise av.error.OSError(28, "No space left on device")

    monkeypatch.setattr(media.VideoWriter, "_open", fail)
    write_video(tmp_path / "clip.avi", [read_image(data / "cables/imgs/0.png")] * 4)
    assert run(trained, tmp_path / "clip.avi", tmp_path / "out", "--batch_size", 1) == 2
    assert "clip.mp4 could not be written (No space left on device)" in capsys.readouterr().err
    assert written_files(tmp_path / "out") == []


def test_the_dataset_folder_is_read_as_its_imgs_with_the_rate_shown(trained, data, tmp_path, capsys):
    assert run(trained, data / "test", tmp_path / "out", "--masks", data / "test") == 0
    assert sorted(path.name for path in (tmp_path / "out/masks").iterdir()) == ["0.png", "1.png", "2.png"]
    assert " images/s]" in capsys.readouterr().err  # of the progress bar
    assert (tmp_path / "out/measures.csv").exists()


def test_a_folder_of_images_and_videos_in_subfolders(trained, data, tmp_path, capsys):
    frames = [read_image(data / f"cables/imgs/{number}.png") for number in range(6)]
    source = tmp_path / "source"
    for folder, stem, n in (("a", "one", 2), ("b", "one", 3), ("b", "two", 4)):
        (source / folder).mkdir(parents=True, exist_ok=True)
        write_video(source / folder / f"{stem}.avi", frames[:n])
    Image.fromarray(frames[0]).save(source / "b/photo.png")
    (source / "b/damaged.mov").write_bytes(b"not a video")
    flags = ("--polygons", "--threshold", 0.01)
    assert run(trained, source, tmp_path / "out", *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"not predicted: {source}/b/damaged.mov: no frame can be decoded"
    for stem, n in (("a_one", 2), ("b_one", 3), ("b_two", 4)):
        assert media.frame_count(tmp_path / f"out/overlays/{stem}.mp4") == n
        assert len(list((tmp_path / "out/masks").glob(f"{stem}_*.png"))) == n
    document = json.loads((tmp_path / "out/polygons.json").read_text())
    names = [image["file_name"] for image in document["images"]]
    assert names[:2] == ["b/photo.png", "a_one_000000.png"] and len(names) == 1 + 2 + 3 + 4
    (source / "b/damaged.mov").unlink()
    assert run(trained, source, tmp_path / "out") == 0
    assert "replaced 24 files" in capsys.readouterr().out  # 10 masks, 10 overlays, 3 videos, polygons


@pytest.fixture
def camera(data, tmp_path, monkeypatch):
    """Camera 0 films a clip of 6 frames without end; `camera(n, act)` calls `act` at its n-th frame."""
    frames = [read_image(data / f"cables/imgs/{number}.png") for number in range(6)]
    write_video(tmp_path / "clip.avi", frames)
    open_video, at = media.open_video, {}

    class Camera:
        def __init__(self):
            self.video, self.n_read = open_video(tmp_path / "clip.avi"), 0

        def get(self, key):
            return -1.0

        def read(self):
            time.sleep(0.01)
            is_read, frame = self.video.read()
            if not is_read:
                self.video = open_video(tmp_path / "clip.avi")
                is_read, frame = self.video.read()
            self.n_read += 1
            if self.n_read in at:
                return at[self.n_read](frame)
            return is_read, frame

    monkeypatch.setattr(media, "open_video", lambda source: Camera() if source == 0 else open_video(source))
    return at.__setitem__


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_camera_like_its_end(trained, tmp_path, capsys, camera, number):
    def interrupt(frame):
        os.kill(os.getpid(), number)
        return True, frame

    handler = signal.getsignal(number)
    camera(40, interrupt)
    assert run(trained, 0, tmp_path / "out", "--polygons", "--batch_size", 4) == 0
    output = capsys.readouterr()
    assert f"{number.name}: the results are written" in output.err
    assert signal.getsignal(number) is handler
    masks = sorted((tmp_path / "out/masks").iterdir())
    assert [path.name for path in masks] == [f"camera_0_{n:06d}.png" for n in range(len(masks))]
    assert 0 < len(masks) < 50 and f"{len(masks)} images, " in output.out  # the camera itself has no end
    with av.open(str(tmp_path / "out/overlays/camera_0.mp4")) as video:
        assert video.streams.video[0].frames == len(masks)
    assert len(json.loads((tmp_path / "out/polygons.json").read_text())["images"]) == len(masks)
    written = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert written == {*written_files(tmp_path / "out"), "predictions.json"}


def test_a_camera_that_is_unplugged_ends_like_a_video(trained, tmp_path, camera):
    camera(20, lambda frame: (False, None))
    assert run(trained, 0, tmp_path / "out") == 0
    assert media.frame_count(tmp_path / "out/overlays/camera_0.mp4") > 0


def test_a_second_signal_ends_a_camera_at_once(trained, tmp_path, capsys, camera):
    def interrupt_twice(frame):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        return True, frame

    camera(30, interrupt_twice)
    assert run(trained, 0, tmp_path / "out") in (0, 130)  # 0: the first signal has ended it already
    assert (tmp_path / "out/predictions.json").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("source", "name"), [(7, "camera"), ("rtsp://me:secret@127.0.0.1:9/x", "stream")])
def test_a_camera_or_stream_that_does_not_open_is_named(trained, tmp_path, capsys, monkeypatch, source, name):
    monkeypatch.setattr(media, "has_frames", lambda source: False)
    assert run(trained, source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"no frame of this {name} can be decoded" in error and "secret" not in error
    assert not (tmp_path / "out").exists()


# --- The output folder ------------------------------------------------------------------------


def test_a_second_prediction_replaces_exactly_the_first(trained, data, tmp_path, capsys):
    output, photos, masks = tmp_path / "out", data / "test/imgs", data / "test/masks"
    assert run(trained, photos, output, "--masks", masks, "--polygons", "--probabilities") == 0
    assert len(written_files(output)) == 3 * 3 + 3
    (output / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run(trained, photos / "1.png", output) == 0
    assert f"replaced 12 files of an earlier prediction in {output}" in capsys.readouterr().out
    left = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert left == {"masks/1.png", "overlays/1.jpg", "predictions.json", "notes.txt"}
    assert written_files(output) == ["masks/1.png", "overlays/1.jpg"]
    document = json.loads((output / "predictions.json").read_text())
    assert document["tool"] == "predict.py" and document["checkpoint"] == str(trained)
    assert document["flags"]["input"] == str(photos / "1.png") and document["flags"]["threshold"] == 0


@pytest.mark.parametrize(
    "fault",
    ["the dataset", "the images", "the checkpoint", "a link", "a foreign mask", "a changed mask", "a list"],
)
def test_an_output_that_would_lose_files_is_refused(trained, data, tmp_path, capsys, fault):
    photos, masks, output = data / "test/imgs", data / "test/masks", tmp_path / "out"
    message = "is an input"
    if fault == "the dataset":
        output = data / "test"
    elif fault == "the images":
        output = photos
    elif fault == "the checkpoint":
        output = trained.parent
    elif fault == "a link":
        output.mkdir()
        (output / "masks").symlink_to(masks, target_is_directory=True)
        message = "link to another folder"
    elif fault == "a foreign mask":
        (output / "masks").mkdir(parents=True)
        (output / "masks/other.png").write_bytes(b"mine")
        message = "1 files that were not written by predict.py"
    elif fault == "a changed mask":
        assert run(trained, photos, output) == 0
        (output / "masks/1.png").write_bytes(b"corrected by hand")
        message = "changed after they were written"
    elif fault == "a list":
        output.mkdir()
        (output / "predictions.json").write_text(json.dumps({"files": {"../data/test/imgs/0.png": None}}))
        message = "no list of predict.py"
    before = snapshot(tmp_path)
    assert run(trained, photos, output, "--masks", masks) == 2
    assert message in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_a_line_and_the_written_files_are_listed(
    trained, data, tmp_path, capsys, monkeypatch, number
):
    handler = signal.getsignal(number)
    calls = []

    def signal_in_fifth_call(file):  # amid a write
        calls.append(file)
        if len(calls) == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(os, "fsync", signal_in_fifth_call)

    output = tmp_path / "out"
    assert run(trained, data / "test/imgs", output, "--batch_size", 1) == 128 + number
    line = f"interrupted by {number.name}: {output / 'predictions.json'} lists the files written so far"
    assert capsys.readouterr().err.splitlines()[-1] == line
    written = {
        str(path.relative_to(output)) for path in output.rglob("*.*") if "predictions" not in path.name
    }
    assert written == set(written_files(output)) and 0 < len(written) < 6
    assert all(read_image(output / name).shape == (48, 64, 3) for name in written)
    assert signal.getsignal(number) is handler
    assert run(trained, data / "test/imgs", output) == 0


def test_a_killed_prediction_can_be_repeated(trained, data, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(OutputFolder, "finish", lambda self: None)  # as if killed: the list is not ended
    assert run(trained, data / "test/imgs", output) == 0
    (output / "masks/.1.png.77.tmp").write_bytes(b"half a ma")
    monkeypatch.undo()
    monkeypatch.setitem(variants.VARIANTS, "tiny", TINY)
    assert run(trained, data / "test/imgs/0.png", output) == 0
    assert sorted(path.name for path in (output / "masks").iterdir()) == ["0.png"]


def test_true_masks_that_are_missing_or_do_not_fit(trained, data, tmp_path, capsys):
    photos, masks = data / "test/imgs", data / "test/masks"
    Image.new("L", (9, 8)).save(masks / "2.png")
    assert run(trained, photos, tmp_path / "out", "--masks", masks) == 1
    assert "not compared: " in (error := capsys.readouterr().err)
    assert "2.png: is 48 x 64 (h x w) but its mask is 8 x 9" in error
    assert len(list((tmp_path / "out/masks").iterdir())) == 3
    with (tmp_path / "out/measures.csv").open(newline="") as file:
        assert sorted(row["picture"] for row in csv.DictReader(file)) == ["0", "1"]
    (masks / "0.png").unlink()
    (masks / "2.png").unlink()
    assert run(trained, photos, tmp_path / "out", "--masks", masks) == 2
    error = capsys.readouterr().err
    assert "no mask for 2 of 3 images" in error and "0.png" in error and "2.png" in error


def test_larger_images_than_max_pixels_are_left_out(trained, data, tmp_path, capsys):
    assert run(trained, data / "test/imgs", tmp_path / "out", "--max_pixels", 3000) == 1
    assert "0.png: has 48 x 64 pixels, more than --max_pixels 3000" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "high"])
def test_a_threshold_is_a_finite_number(trained, data, tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        run(trained, data / "test/imgs", tmp_path / "out", f"--threshold={value}")
    assert "argument --threshold: expected a finite number" in capsys.readouterr().err


# --- Mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch_size", "0"), ("--batch_size", "two"), ("--tiles", "15")]
)
def test_a_flag_out_of_range_is_refused(trained, data, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        run(trained, data / "test/imgs", tmp_path / "out", flag, value)
    assert f"argument {flag}: expected a whole number of at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("checkpoint", "checkpoint not found"),
        ("variant", "holds weights of none of vit_b"),
        ("input", "no such file or folder"),
        ("empty", "no .png, .jpg, .jpeg, .webp, .tif, .tiff or .bmp file in it, no video, and none in"),
        ("stems", "0.jpg and 0.png would give one mask"),
        ("masks", "no mask for 1 of 3 images"),
    ],
)
def test_mistakes_end_with_a_message(trained, data, tmp_path, capsys, fault, message):
    source, masks = data / "test/imgs", data / "test/masks"
    if fault == "checkpoint":
        trained.unlink()
    elif fault == "variant":
        checkpoint.save_weights({"resnet.conv1.weight": torch.zeros(3)}, trained)
    elif fault == "input":
        source = data / "nowhere"
    elif fault == "empty":
        source = tmp_path / "empty"
        (source / "folder").mkdir(parents=True)
    elif fault == "stems":
        (source / "0.jpg").write_bytes(b"")
    elif fault == "masks":
        (masks / "0.png").unlink()
    assert run(trained, source, tmp_path / "out", "--masks", masks) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_ends_with_a_message(trained, data, tmp_path, capsys):
    (tmp_path / "out").write_text("a file, not a folder")
    assert run(trained, data / "test/imgs", tmp_path / "out") == 2
    assert f"error: --output {tmp_path / 'out'}: cannot be created" in capsys.readouterr().err


@pytest.mark.parametrize(("threshold", "line"), [(100, "3 of 3 masks are empty"), (-100, "and 3 cover more")])
def test_masks_that_are_empty_or_full_are_counted(trained, data, tmp_path, capsys, threshold, line):
    assert run(trained, data / "test/imgs", tmp_path / "out", "--threshold", threshold) == 0
    assert line in capsys.readouterr().err
