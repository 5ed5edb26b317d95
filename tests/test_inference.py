"""The Python API, tiles without seams, prompts as SamPredictor takes them."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor

import checkpoint
import inference
from base.errors import UserError
from imaging.files import read_image
from imaging.prompts import NO_PROMPT, Prompt
from inference import LoadedSam, box_prompt, load, predict_logits, predict_logits_tiled
from sidecar import Sidecar, write_sidecar


def by_pixel(images, prompts):
    """A model that sees pixels one by one."""
    for image in images:
        yield image.mean(axis=2, dtype=np.float32) - 100


@pytest.mark.parametrize("size", [(300, 500), (64, 64), (40, 500), (65, 30)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles_give_what_the_whole_gives(size, batch_size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    shapes = []

    def predict(images, prompts):
        shapes.extend(image.shape for image in images)
        assert len(images) == len(prompts) <= batch_size
        return by_pixel(images, prompts)

    tiled = predict_logits_tiled(predict, image, tile_size=64, batch_size=batch_size)
    (whole,) = by_pixel([image], [NO_PROMPT])
    np.testing.assert_allclose(tiled, whole, atol=1e-3)
    assert max(max(shape) for shape in shapes) <= 64


def test_tiles_that_disagree_leave_no_seam():
    answers = iter(np.random.default_rng(1).uniform(-5, 5, 1000))

    def predict(images, prompts):
        return [np.full(image.shape[:2], next(answers), np.float32) for image in images]

    tiled = predict_logits_tiled(predict, np.zeros((300, 420, 3), np.uint8), tile_size=64, batch_size=4)
    steps = max(np.abs(np.diff(tiled, axis=axis)).max() for axis in (0, 1))
    assert np.ptp(tiled) > 5  # they do disagree
    assert steps < 1.5 * 10 / (inference.TILE_OVERLAP * 64)  # no more than the blending's slope


def test_tiles_cover_everything_and_overlap():
    for length in (64, 65, 100, 113, 1000):
        starts = inference._tile_starts(length, 64)
        assert starts[0] == 0 and starts[-1] == length - 64
        assert np.diff(starts).max(initial=0) <= 0.75 * 64 + 1


@torch.no_grad()
def test_prompts_are_those_of_sam_predictor(tiny_weights, tiny_sam):
    image = np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    points, box = (
        np.array([[10.0, 20.0], [70.0, 30.0]], np.float32),
        np.array([5.0, 6.0, 60.0, 40.0], np.float32),
    )
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    given = {"point_coords": points, "point_labels": np.array([1, 0])}
    official_points = predictor.predict(**given, multimask_output=False, return_logits=True)[0][0]
    official_box = predictor.predict(box=box, multimask_output=False, return_logits=True)[0][0]
    with_points = Prompt(np.vstack([points, [[0, 0]]]).astype(np.float32), np.array([1, 0, -1]))
    with_box = Prompt(box.reshape(2, 2), np.array([2, 3]))
    prompts = [(with_points,), (with_box,), (with_points, with_box), NO_PROMPT]
    logits = list(predict_logits(LoadedSam(tiny_sam, "tiny", None), [image] * 4, prompts))
    np.testing.assert_allclose(logits[0], official_points, atol=1e-4)
    np.testing.assert_allclose(logits[1], official_box, atol=1e-4)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 and np.abs(logits[0] - logits[3]).max() > 1e-3
    both = np.maximum(logits[0], logits[1])  # of the low resolution; upscaled that is a little more
    assert (logits[2] >= both - 1e-5).all()
    assert np.abs(logits[2] - both).mean() < 0.1 * np.abs(logits[0] - logits[1]).mean()
    assert np.abs(logits[2] - logits[0]).max() > 1e-3


def test_prompts_in_chunks_give_the_same_logits(tiny_weights, tiny_sam):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (48, 90, 3), dtype=np.uint8) for _ in range(2)]
    boxes = random.uniform(0, 40, (9, 2, 2)).astype(np.float32)
    prompts = [Prompt(box, np.array([2, 3])) for box in boxes]
    shares = [prompts[:7], prompts[7:]]
    n_decoded = []

    class Recorded(LoadedSam):
        def decode(self, embeddings, points, labels):
            n_decoded.append(len(points))
            return super().decode(embeddings, points, labels)

    net = Recorded(tiny_sam, "tiny", None)
    together = list(predict_logits(net, images, shares))
    in_chunks = list(predict_logits(net, images, shares, prompt_batch_size=4))
    assert n_decoded == [9, 4, 4, 1]
    np.testing.assert_allclose(in_chunks, together, atol=1e-5)


# --- The size of tiles ------------------------------------------------------------------------


def cables(size, width):
    """A photo of dark ground with two straight bright cables of `width` pixels."""
    image = np.zeros((*size, 3), np.uint8)
    for part in (0.3, 0.7):
        top = round(part * size[0])
        image[top : top + width] = 255
    return image


@pytest.mark.parametrize(
    ("size", "width", "width_in_training", "expected"),
    [
        ((900, 1200), 24, 6, 256),  # 64 px of input for 24 / 6 times as many pixels of the photo
        ((900, 1200), 24, 3, 512),
        ((2400, 3200), 60, 5, 768),
        ((1200, 900), 24, 6, 256),
        ((900, 1200), 33, 1.6, None),  # at least as wide in the whole photo
        ((900, 1200), 24, 1.5, None),  # tiles of 1024 px would be nearly the whole photo
        ((900, 1200), 60, 1.6, None),
        ((60, 80), 3, 20, 32),  # an input of 64 px is enlarged at most twice
        ((900, 1200), 3, 20, 180),  # 9 x 7 tiles: there are at most 64
        ((900, 1200), 0, 6, None),  # nothing is found
        ((30, 20), 2, 20, None),  # smaller than the smallest tile
    ],
)
def test_tiles_make_cables_as_wide_as_in_training(tiny_weights, size, width, width_in_training, expected):
    segment = load(tiny_weights, "cpu", tiles="auto", cable_width=width_in_training)
    (whole,) = by_pixel([cables(size, width)], [NO_PROMPT])
    chosen = segment.tile_size(whole)
    assert chosen == expected if expected is None else chosen == pytest.approx(expected, rel=0.1)


def test_images_of_one_batch_have_tiles_of_their_own(tiny_weights, monkeypatch):
    """The mask of each is that of its own tile size, also if one stays whole."""
    segment = load(tiny_weights, "cpu", tiles="auto", cable_width=6)
    shapes = []

    def recorded(net, images, prompts, **options):
        shapes.append({image.shape[:2] for image in images})
        return by_pixel(images, prompts)

    monkeypatch.setattr(inference, "predict_logits", recorded)
    images = [cables((300, 400), width) for width in (12, 0, 24)]
    predictions = list(segment.logits_and_tiles(images))
    for image, (logits, _) in zip(images, predictions, strict=True):
        np.testing.assert_array_equal(logits > 0, image[..., 0] > 100)
    sides = [side for _, side in predictions]
    assert sides[0] < sides[2] and sides[1] is None
    assert {(sides[0], sides[0])} in shapes and {(sides[2], sides[2])} in shapes


@pytest.mark.parametrize(("in_training", "share"), [(2.4, 0.5), (3.8, 0.5), (8, 0.24)])
def test_the_whole_image_counts_less_if_its_tiles_are_small(tiny_weights, monkeypatch, in_training, share):
    segment = load(tiny_weights, "cpu", tiles="auto", cable_width=in_training)

    def sure_of_the_whole(net, images, prompts, **options):
        for image, logits in zip(images, by_pixel(images, prompts), strict=True):
            yield 3 * logits if image.shape[:2] == (300, 400) else logits

    monkeypatch.setattr(inference, "predict_logits", sure_of_the_whole)
    image = cables((300, 400), 12)
    ((logits, side),) = segment.logits_and_tiles([image])
    assert side / 400 == pytest.approx(12 * 64 / in_training / 400, rel=0.1)
    (once,) = by_pixel([image], [NO_PROMPT])
    np.testing.assert_allclose(logits, (1 + 2 * share) * once, rtol=0.05)


def test_the_width_in_training_is_that_of_the_sidecar(tiny_weights):
    with pytest.raises(UserError, match=r"--tiles auto needs the width .*tiny.json does not say it"):
        load(tiny_weights, "cpu", tiles="auto")
    write_sidecar(Sidecar(model_type="tiny", input_size=64), tiny_weights)
    with pytest.raises(UserError, match="--cable_width PIXELS"):
        load(tiny_weights, "cpu", tiles="auto")
    write_sidecar(Sidecar(model_type="tiny", input_size=64, cable_width=4.5), tiny_weights)
    assert load(tiny_weights, "cpu", tiles="auto").cable_width == 4.5
    assert load(tiny_weights, "cpu", tiles="auto", cable_width=7).cable_width == 7


def test_tiles_are_the_default_where_the_width_is_known(tiny_weights):
    assert load(tiny_weights, "cpu").tiles is None
    assert load(tiny_weights, "cpu", cable_width=7).tiles == "auto"
    write_sidecar(Sidecar(model_type="tiny", input_size=64, cable_width=4.5), tiny_weights)
    assert load(tiny_weights, "cpu").tiles == "auto"
    assert load(tiny_weights, "cpu", tiles="off").tiles is None
    assert load(tiny_weights, "cpu", tiles=np.int64(80)).tiles == 80
    for tiles in (0, 15, "of", 20.5, [64]):
        with pytest.raises(
            UserError, match=f"tiles={re.escape(repr(tiles))}: expected a whole number of at least 16"
        ):
            load(tiny_weights, "cpu", tiles=tiles)


def test_a_missing_image_is_named(tiny_weights):
    with pytest.raises(UserError, match="no image: None"):  # what cv2.imread returns for a missing file
        load(tiny_weights, "cpu")(None)


def test_with_prompts_images_stay_whole(tiny_weights, monkeypatch):
    segment, shapes = load(tiny_weights, "cpu", cable_width=6), []

    def recorded(net, images, prompts, **options):
        shapes.extend(image.shape[:2] for image in images)
        return by_pixel(images, prompts)

    monkeypatch.setattr(inference, "predict_logits", recorded)
    image = cables((300, 400), 12)
    segment(image, [box_prompt(10, 20, 60, 40)])
    assert shapes == [(300, 400)]
    segment(image)
    assert len(shapes) > 2


# --- The Python API ---------------------------------------------------------------------------


@pytest.fixture
def photos():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 90), (64, 64), (100, 30))]


@pytest.fixture
def logits_of_sam(tiny_sam, photos):
    """What SamPredictor finds in the photos."""
    predictor = SamPredictor(tiny_sam)
    found = []
    for image in photos:
        predictor.set_image(image)
        found.append(predictor.predict(multimask_output=False, return_logits=True)[0][0])
    return found


def test_an_image_gives_a_mask_and_a_list_gives_a_list(tiny_weights, photos, logits_of_sam):
    segment = load(tiny_weights, "cpu", float(np.median(logits_of_sam[0])), batch_size=2, amp="off")
    masks, probs = segment(photos), segment(photos, return_probs=True)
    assert type(masks) is type(probs) is list and len(masks) == len(probs) == 3
    for image, mask, prob, logits in zip(photos, masks, probs, logits_of_sam, strict=True):
        assert mask.dtype == bool and prob.dtype == np.float32
        assert np.mean(mask != (logits > segment.threshold)) < 0.002
        np.testing.assert_allclose(prob, 1 / (1 + np.exp(-logits)), atol=1e-5)
        np.testing.assert_array_equal(segment(image), mask)
        np.testing.assert_allclose(segment(image, return_probs=True), prob, atol=1e-6)
    assert 0.4 < masks[0].mean() < 0.6
    assert segment([]) == []


def test_the_threshold_of_the_api_is_that_of_the_sidecar(tiny_weights, photos, logits_of_sam):
    middle = float(np.median(logits_of_sam[0]))
    assert load(str(tiny_weights), torch.device("cpu")).threshold == 0
    write_sidecar(Sidecar(model_type="tiny", input_size=64, threshold=middle), tiny_weights)
    segment = load(str(tiny_weights), "cpu", amp="off")
    assert segment.threshold == segment.sidecar.threshold == middle
    assert 0.4 < segment(photos[0]).mean() < 0.6
    assert load(tiny_weights, "cpu", 0.5).threshold == 0.5


def test_prompts_of_one_image_and_of_several(tiny_weights, photos):
    segment = load(tiny_weights, "cpu", amp="off")
    boxes = [[box_prompt(5, 6, 20, 30)], [box_prompt(1, 1, 60, 60), box_prompt(5, 6, 20, 30)], NO_PROMPT]
    probs = segment(photos, boxes, return_probs=True)
    for image, box, prob in zip(photos, boxes, probs, strict=True):
        np.testing.assert_allclose(segment(image, box, return_probs=True), prob, atol=1e-5)
    without = segment(photos, return_probs=True)
    assert np.abs(probs[0] - without[0]).max() > 1e-4 and np.abs(probs[2] - without[2]).max() < 1e-5
    with pytest.raises(UserError, match="tiles=64 cannot be combined with prompts"):
        load(tiny_weights, "cpu", tiles=64)(photos, boxes)
    with pytest.raises(UserError, match="3 images but 2 lists of prompts"):
        segment(photos, boxes[:2])
    for wrong in ([], boxes[0][0], np.zeros((2, 4)), [(10, 20, 60, 40)]):
        with pytest.raises(UserError, match="image 0: expected a list of at least one prompt, got"):
            segment(photos[0], wrong)


def test_a_box_may_be_given_by_any_two_opposite_corners():
    for x1, y1, x2, y2 in ((10, 20, 60, 40), (60, 40, 10, 20), (60, 20, 10, 40)):
        assert box_prompt(x1, y1, x2, y2).points.tolist() == [[10, 20], [60, 40]]


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 5, 3), np.float32), r"got float32 \(4, 5, 3\)"),
        (np.zeros((4, 5), np.uint8), r"got uint8 \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 \(4, 5, 4\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got uint8 \(0, 5, 3\)"),
        (["photo.jpg"], "got str"),
        (Image.new("RGB", (5, 4)), "got Image"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), "got Tensor"),
    ],
)
def test_what_is_no_rgb_image_is_refused(tiny_weights, image, found):
    with pytest.raises(UserError, match=f"image 0: expected a NumPy array, RGB uint8 .*{found}"):
        load(tiny_weights, "cpu")(image)
    with pytest.raises(UserError, match="image 0: expected a NumPy array"):
        list(load(tiny_weights, "cpu").logits(image if isinstance(image, list) else [image]))


@pytest.mark.parametrize(("trained_with", "times"), [("box", 1), ("point", 1), ("mixed", 0), ("none", 0)])
def test_a_checkpoint_trained_with_prompts_warns_once_without_them(
    tiny_weights, recwarn, trained_with, times
):
    write_sidecar(Sidecar(model_type="tiny", input_size=64, prompt=trained_with), tiny_weights)
    image = np.zeros((48, 64, 3), np.uint8)
    segment = load(tiny_weights, "cpu")
    segment(image, [box_prompt(1, 2, 30, 40)])

    def shown() -> list[str]:
        return [str(one.message) for one in recwarn if "was trained" in str(one.message)]

    assert not shown()
    for _ in range(2):
        segment([image, image])
        with warnings.catch_warnings():  # forgets which warnings were shown
            pass
    words = f"{tiny_weights} was trained with --prompt {trained_with}, and there are no prompts"
    assert len(shown()) == times and all(line.startswith(words) for line in shown())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("device", 0, "'auto' or a device of PyTorch, such as 'cuda:1'"),
        ("threshold", "a", "a finite number"),
        ("threshold", float("nan"), "a finite number"),
        ("cable_width", -1, "a number above 0"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("amp", "half", "one of auto, bf16, fp16, off"),
    ],
)
def test_wrong_arguments_are_named_before_the_checkpoint_is_read(tmp_path, name, value, expected):
    with pytest.raises(UserError, match=f"^{name}={value!r}: expected {expected}$"):
        load(tmp_path / "none.pth", **({"device": "cpu"} | {name: value}))


def test_a_segmenter_is_shown_in_a_line(tiny_weights):
    write_sidecar(Sidecar(model_type="tiny", input_size=64, threshold=0.5), tiny_weights)
    text = repr(load(tiny_weights, "cpu"))
    assert len(text) < 300 and "model_type='tiny'" in text and "threshold=0.5" in text


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_weights, tiny_sam, number):
    name = "mask_decoder.iou_token.weight"
    state_dict = tiny_sam.state_dict()
    state_dict[name][0, 0] = number
    checkpoint.save_weights(state_dict, tiny_weights)
    message = (
        f"{tiny_weights} holds weights that are NaN or infinite, such as {name}: give another checkpoint"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        inference.load_any(tiny_weights)


def test_a_flipped_view_is_an_image(tiny_weights, photos):
    """Callers turn BGR to RGB with a negative step."""
    segment = load(tiny_weights, "cpu", amp="off")
    view = photos[0][..., ::-1]
    np.testing.assert_array_equal(segment(view, return_probs=True), segment(view.copy(), return_probs=True))


def test_the_example_of_the_documents_runs(tiny_weights, photos, tmp_path, monkeypatch):
    text = (Path(inference.__file__).parent / "docs/prediction.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("exp/my_cables/checkpoints").mkdir(parents=True)
    shutil.copy(tiny_weights, "exp/my_cables/checkpoints/best.pth")
    Path("photos").mkdir()
    Image.fromarray(photos[0]).save("photos/0.png")
    names = {}
    exec(example, names)
    segment = load(tiny_weights)
    np.testing.assert_array_equal(names["image"], read_image(Path("photos/0.png")))
    np.testing.assert_array_equal(names["mask"], segment(photos[0]))
    np.testing.assert_array_equal(names["masks"][1], names["mask"])
    assert names["probs"].dtype == np.float32 and names["in_box"].shape == names["mask"].shape
