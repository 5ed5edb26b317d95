import cv2
import numpy as np
import pytest
import torch
from conftest import draw_cable, write_backgrounds, write_dataset
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch.utils.data import DataLoader

import dataset
import model
from config import DatasetConfig
from dataset import Frame, Pair, Source, TestSet, TrainSet

FRAME = Frame(64, 32)


def source(data, *, backgrounds=True, name="cables", **keys):
    keys = {
        "data_dir": str(data / name),
        "bg_paths": [str(data / "backgrounds")] if backgrounds else None,
        **keys,
    }
    config = DatasetConfig.model_validate(keys, context={"yaml_dir": data})
    return dataset.find_sources([config])[0]


def rng(seed=0):
    return np.random.default_rng(seed)


# --- files ---


def test_images_are_read_as_upright_rgb(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :3, 0] = 200  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    upright = dataset.read_image(tmp_path / "a.png")
    assert upright.shape == (6, 4, 3) == (*dataset.image_size(tmp_path / "a.png"), 3)
    assert (upright[:3] == [200, 0, 0]).all() and (upright[3:] == 0).all()


def test_16_bit_photos_are_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: expected 8-bit"):
        dataset.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("top", [255, 1, 3, 128])
def test_png_mask_is_above_half_of_its_maximum(tmp_path, top):
    mask = draw_cable(rng(), (40, 50), 5)
    Image.fromarray(mask.astype(np.uint8) * top).save(tmp_path / "m.png")
    assert (dataset.read_mask(tmp_path / "m.png") == mask).all()


def test_jpeg_mask_is_above_127_and_noise_stays_out(tmp_path):
    noise = rng().integers(0, 9, (40, 50)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "m.jpg", quality=60)
    assert not dataset.read_mask(tmp_path / "m.jpg").any()
    mask = draw_cable(rng(), (40, 50), 7)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "n.jpg", quality=90)
    assert (dataset.read_mask(tmp_path / "n.jpg") != mask).mean() < 0.01


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_mask_of_any_8_bit_mode(tmp_path, mode):
    mask = draw_cable(rng(), (40, 50), 5)
    red = np.zeros((40, 50, 3), np.uint8)
    red[mask] = (255, 0, 0) if mode in ("P", "RGB", "RGBA") else 255
    Image.fromarray(red).convert(mode).save(tmp_path / "m.png")
    assert (dataset.read_mask(tmp_path / "m.png") == mask).all()


def test_all_background_is_a_legal_mask(tmp_path):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "m.png")
    assert not dataset.read_mask(tmp_path / "m.png").any()


def test_smooth_edges_are_legal_in_a_mask(tmp_path):
    smooth = cv2.resize(
        draw_cable(rng(), (400, 500), 50).astype(np.uint8) * 255, (50, 40), interpolation=cv2.INTER_AREA
    )
    Image.fromarray(smooth).save(tmp_path / "m.png")
    assert (dataset.read_mask(tmp_path / "m.png") == (smooth > 127.5)).all()


@pytest.mark.parametrize("kind", ["photo", "labels", "probabilities", "16 bit"])
def test_what_is_no_binary_mask_is_named(tmp_path, kind):
    values = {
        "photo": rng().integers(0, 255, (40, 50)),
        "labels": np.repeat(np.arange(4), 10)[:, None] * np.ones((1, 50)),
        "probabilities": np.linspace(0, 255, 50)[None] * np.ones((40, 1)),
        "16 bit": np.full((40, 50), 65535),
    }[kind]
    Image.fromarray(values.astype(np.uint16 if kind == "16 bit" else np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m\.png: (not a binary mask|expected 8-bit)"):
        dataset.read_mask(tmp_path / "m.png")


def test_pairs_match_by_stem_whatever_the_extension(tmp_path):
    write_dataset(tmp_path / "a", 3)
    (tmp_path / "a" / "imgs" / "notes.txt").write_text("not a photo")
    Image.open(tmp_path / "a" / "imgs" / "1.png").save(tmp_path / "a" / "imgs" / "1.JPEG", format="JPEG")
    (tmp_path / "a" / "imgs" / "1.png").unlink()
    found = source(tmp_path, backgrounds=False, name="a")
    assert [pair.image_path.name for pair in found.pairs] == ["0.png", "1.JPEG", "2.png"]
    assert [pair.mask_path.name for pair in found.pairs] == ["0.png", "1.png", "2.png"]


def test_all_faults_in_the_data_are_listed(tmp_path):
    folder = write_dataset(tmp_path / "a", 6)
    (folder / "masks" / "0.png").unlink()
    (folder / "imgs" / "1.png").unlink()
    Image.open(folder / "imgs" / "2.png").save(folder / "imgs" / "2.jpg")
    whole = (folder / "imgs" / "3.png").read_bytes()
    (folder / "imgs" / "3.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "masks" / "4.png")
    Image.fromarray(rng().integers(0, 255, (48, 64)).astype(np.uint8)).save(folder / "masks" / "5.png")
    (tmp_path / "backgrounds").mkdir()
    with pytest.raises(ValueError) as error:
        source(tmp_path, name="a")
    message = str(error.value)
    assert message.startswith("7 problem(s)")
    for part in (
        "0.png: has no mask",
        "1.png: has no photo",
        "same stem as 2",
        "3.png: cannot be decoded",
        "4.png: is 48 x 64 (h x w) but its mask is 9 x 9",
        "5.png: not a binary",
        "backgrounds: no .png",
    ):
        assert part in message, message


def test_of_many_faults_ten_are_shown_and_all_counted(tmp_path):
    folder = write_dataset(tmp_path / "a", 13)
    for path in (folder / "imgs").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError) as error:
        source(tmp_path, backgrounds=False, name="a")
    assert str(error.value).startswith("13 problem(s)")
    assert str(error.value).count("cannot be decoded") == 10 and "... and 3 more" in str(error.value)


# --- sizes ---


@pytest.mark.parametrize("size", [(480, 640), (641, 333), (17, 1000), (1000, 3), (64, 64)])
def test_sizes_and_pixels_are_those_of_sam_predictor(size):
    official = ResizeLongestSide(64)
    assert dataset.fit_size(size, 64) == official.get_preprocess_shape(*size, 64) or min(size) < 16
    image = rng().integers(0, 255, (*size, 3)).astype(np.uint8)
    if min(dataset.fit_size(size, 64)) > 1:
        resized = dataset.resize_image(image, dataset.fit_size(size, 64))
        assert (resized == official.apply_image(image)).all()


def test_thin_masks_survive_being_resized():
    mask = np.zeros((960, 1280), np.float32)
    mask[::97] = 1.0  # one pixel wide, a twentieth of a target pixel
    small = dataset.resize_mask(mask, (48, 64))
    assert small.mean() == pytest.approx(mask.mean(), rel=1e-5)
    assert (small.max(axis=1) > 0).sum() == 10


def test_model_input_pads_bottom_right_and_averages_the_target():
    mask = np.zeros((32, 64), np.float32)
    mask[8, :] = 1.0
    image = np.full((32, 64, 3), 9, np.uint8)
    sample = dataset.model_input(image, mask, FRAME, "none", rng())
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert sample["size"].tolist() == [32, 64]
    assert (sample["image"][:, :32] == 9).all() and (sample["image"][:, 32:] == 0).all()
    assert (sample["target"][0, 4] == 0.5).all()  # half of each 2 x 2 cell
    assert sample["target"].sum() == 0.5 * 32
    valid = model.valid_pixels(sample["size"][None], FRAME.grid, FRAME.grid / FRAME.img_size)
    assert valid[0, 0].sum() == 16 * 32 and valid[0, 0, :16].all()


def test_cells_partly_in_the_padding_are_not_valid():
    valid = model.valid_pixels(torch.tensor([[33, 64], [1, 1]]), 32, 0.5)
    assert valid[0, 0].any(dim=1).sum() == 16
    assert valid[1].sum() == 1


# --- compositing ---


def test_cut_out_leaves_no_trace_of_the_old_background():
    mask = draw_cable(rng(), (60, 80), 6)
    image = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 0.8)  # as a camera mixes the edge
    foreground, alpha = dataset.cut_out(image, mask.astype(np.float32))
    green = dataset.paste(foreground, alpha, np.zeros_like(image))[..., 1]
    green_of_the_photo_itself = dataset.paste(image, alpha, np.zeros_like(image))[..., 1]
    assert green_of_the_photo_itself.max() > 70
    assert green.max() < 40


def test_cut_out_has_a_soft_edge_where_the_mask_is():
    mask = draw_cable(rng(), (60, 80), 6)
    _, alpha = dataset.cut_out(np.zeros((60, 80, 3), np.uint8), mask.astype(np.float32))
    assert ((alpha > 0.5) == mask).mean() > 0.99
    assert ((alpha > 0.05) & (alpha < 0.95)).any()
    assert alpha.sum() == pytest.approx(mask.sum(), rel=0.02)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cut_out_keeps_the_colour_of_very_thin_cables(width):
    mask = draw_cable(rng(), (60, 80), width)
    image = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    foreground, _ = dataset.cut_out(image, mask.astype(np.float32))
    assert (foreground == (200, 30, 30)).all()


def test_large_photos_are_brought_down_before_cutting_out_and_keep_thin_cables(tmp_path):
    write_dataset(tmp_path / "large", 1, size=(1500, 2000), width=1)
    pair = source(tmp_path, name="large", backgrounds=False).pairs[0]
    image, mask = dataset.read_pair(pair, longest=500)
    assert image.shape == (375, 500, 3) and mask.shape == (375, 500)
    assert mask.sum() == pytest.approx(dataset.read_mask(pair.mask_path).sum() / 16, rel=1e-3)
    assert 0 < mask.max() < 0.5  # a pixel's cable fills a quarter of a pixel
    foreground, alpha = dataset.cut_out(image, mask)
    cable = image[mask == mask.max()].min()
    assert foreground.min() >= cable and alpha.sum() == pytest.approx(mask.sum(), rel=0.01)
    whole, _ = dataset.read_pair(pair, longest=2000)
    assert whole.shape == (1500, 2000, 3)


def test_without_augmentation_cables_stay_where_and_as_they_were(data):
    write_dataset(data / "thick", 3, width=11)
    cables = source(data, name="thick")
    image, mask = dataset.composite(cables, 2, (48, 64), rng())
    photo = dataset.read_image(cables.pairs[2].image_path)
    truth = dataset.read_mask(cables.pairs[2].mask_path)
    assert ((mask > 0.5) == truth).mean() > 0.99
    deep = cv2.erode(truth.astype(np.uint8), np.ones((7, 7))) > 0
    assert deep.any()
    assert (image[deep] == photo[deep]).all()
    far = cv2.dilate(truth.astype(np.uint8), np.ones((9, 9))) == 0
    assert image[far].max() <= 90 and (image[far] != photo[far]).any()


def test_ground_truth_follows_the_augmented_cables(data):
    # Cables are bright and backgrounds dark by far, so that the pasted cable can be seen in numbers.
    cables = source(data, w_aug=True)
    for seed in range(12):
        image, mask = dataset.composite(cables, 0, (48, 64), rng(seed))
        brightness = cv2.GaussianBlur(image, (3, 3), 0).max(axis=2).astype(float)
        assert image.shape == (48, 64, 3) and mask.shape == (48, 64)
        if (mask > 0.9).sum() > 20:
            assert brightness[mask > 0.9].mean() > brightness[mask < 0.1].mean() + 30, seed


def test_an_empty_mask_composites_to_the_background_alone(data):
    cables = source(data)
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(cables.pairs[0].mask_path)
    image, mask = dataset.composite(cables, 0, (48, 64), rng())
    assert not mask.any() and image.max() <= 90


def test_photos_are_used_as_they_are_without_backgrounds(data):
    cables = source(data, backgrounds=False)
    image, mask = dataset.make_sample(cables, 1, (48, 64), rng())
    assert (image == dataset.read_image(cables.pairs[1].image_path)).all()
    assert (mask == dataset.read_mask(cables.pairs[1].mask_path)).all()


# --- augmentation ---


def test_at_least_a_quarter_of_the_cable_stays_in_the_frame():
    corner = np.zeros((48, 64), np.float32)
    corner[:9, :9] = 1.0  # far off centre: most shifts would lose it
    image = np.zeros((48, 64, 3), np.uint8)
    for seed in range(200):
        before = np.array(dataset.SCALE) ** 2 * corner.sum()
        _, moved = dataset.move(image, corner, (48, 64), rng(seed))
        assert moved.sum() > 0.2 * before[0], seed
        assert moved.sum() < 1.1 * before[1], seed


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7])
def test_warp_keeps_image_and_mask_together_and_their_centre(scale):
    mask = cv2.GaussianBlur(draw_cable(rng(3), (96, 128), 9).astype(np.float32), (0, 0), 1)
    image = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    canvas = (round(96 * scale), round(128 * scale))
    matrix = dataset._similarity(mask.shape, canvas, scale, 0.0, np.zeros(2))
    warped, warped_mask = dataset._warp(image, mask, matrix, canvas, scale)
    inner = np.s_[2:-2, 2:-2]  # outside the photo the mask is 0 and colours go on
    assert np.abs(warped[..., 0] / 255 - warped_mask)[inner].max() < 0.03
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    expected = cv2.resize(mask, canvas[::-1], interpolation=interpolation)
    assert np.abs(warped_mask - expected)[inner].max() < 0.12
    assert warped_mask.sum() == pytest.approx(mask.sum() * scale**2, rel=0.02)


def test_flip_moves_image_and_mask_alike():
    mask = draw_cable(rng(1), (20, 30), 3).astype(np.float32)
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8)
    seen = set()
    for seed in range(20):
        flipped, flipped_mask = dataset.flip(image, mask, rng(seed))
        assert (flipped[..., 0] == flipped_mask).all()
        seen.add(flipped_mask.tobytes())
    assert len(seen) == 4


def test_cables_take_every_colour():
    red = np.full((4, 4, 3), (200, 40, 40), np.uint8)
    recoloured = np.stack([dataset.recolour_cables(red, rng(seed))[0, 0] for seed in range(60)])
    assert set(recoloured.argmax(axis=1)) == {0, 1, 2}
    assert np.ptp(recoloured.max(axis=1).astype(int)) > 60


def test_degrade_keeps_shape_and_range():
    image = rng().integers(0, 255, (30, 40, 3)).astype(np.uint8)
    results = [dataset.degrade(image, rng(seed)) for seed in range(30)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) == 30
    dark = np.zeros((8, 8, 3), np.uint8)  # darkening black must not wrap around or fold back
    assert min(int(dataset.degrade(dark, rng(seed)).max()) for seed in range(10)) == 0


# --- prompts ---


def test_label_constants_are_those_of_the_decoder():
    assert (dataset.ABSENT, dataset.NOT_A_POINT, dataset.FOREGROUND_POINT, dataset.BOX_CORNERS) == (
        model.ABSENT,
        model.NOT_A_POINT,
        model.FOREGROUND_POINT,
        (model.BOX_CORNER_1, model.BOX_CORNER_2),
    )


def test_points_lie_on_cables_one_to_three_of_them():
    mask = draw_cable(rng(), (48, 64), 3).astype(np.float32)
    counts = set()
    for seed in range(40):
        points, labels = dataset.draw_prompt("point", mask, rng(seed))
        count = int((labels == 1).sum())
        counts.add(count)
        assert labels.tolist() == [1] * count + [-1] + [-2] * (3 - count)
        assert all(mask[int(y), int(x)] for x, y in points[:count])
    assert counts == {1, 2, 3}


def test_box_surrounds_the_cables_with_jitter_inside_the_frame():
    mask = np.zeros((48, 64), np.float32)
    mask[10:30, 0:50] = 1
    boxes = []
    for seed in range(40):
        points, labels = dataset.draw_prompt("box", mask, rng(seed))
        assert labels.tolist() == [2, 3]
        boxes.append(points.ravel())
    boxes = np.array(boxes)
    assert np.abs(boxes - [0, 10, 49, 29]).max() <= 2.5 + 1e-6
    assert np.ptp(boxes, axis=0)[[1, 2, 3]].min() > 0.5 and boxes.min() >= 0


def test_mixed_draws_all_kinds_and_empty_masks_get_none():
    mask = draw_cable(rng(), (48, 64), 3).astype(np.float32)
    labels = [dataset.draw_prompt("mixed", mask, rng(seed))[1] for seed in range(60)]
    kinds = [("point" if 1 in one else "box" if 2 in one else "none") for one in labels]
    assert all(kinds.count(kind) > 10 for kind in ("point", "box", "none"))
    for kind in dataset.PROMPTS:
        points, labels = dataset.draw_prompt(kind, np.zeros((48, 64), np.float32), rng())
        assert (labels == dataset.ABSENT).all() and len(points) == dataset.PROMPT_TOKENS[kind]


def test_a_cable_thinner_than_half_a_pixel_is_still_prompted():
    points, labels = dataset.draw_prompt("point", np.where(np.eye(20) > 0, 0.2, 0).astype(np.float32), rng())
    assert labels[0] == 1 and points[0, 0] == points[0, 1]


# --- epochs ---


def fake_source(n, percentage):
    config = DatasetConfig.model_construct(percentage=percentage, bg_paths=(), w_aug=False)
    return Source(config, tuple(Pair(f"{i}", f"{i}") for i in range(n)), ())


@pytest.mark.parametrize(
    ("n", "percentage", "expected"),
    [(100, 0.1, 10), (100, 1.0, 100), (7, 0.5, 4), (30, 0.001, 1), (10, 2.5, 25), (3, 3.0, 9)],
)
def test_percentage_over_several_epochs(n, percentage, expected):
    subsets = []
    for epoch in range(5):
        plan = dataset.epoch_plan([fake_source(n, percentage)], 0, epoch)
        counts = np.bincount(plan[:, 1], minlength=n)
        assert len(plan) == expected
        assert counts.min() >= int(percentage) and counts.max() <= int(np.ceil(percentage))
        subsets.append(tuple(counts))
    assert len(set(subsets)) > 1 or percentage in (1.0, 3.0)


def test_an_epoch_mixes_all_datasets_in_a_new_order():
    sources = [fake_source(20, 0.5), fake_source(5, 2.0)]
    plans = [dataset.epoch_plan(sources, 0, epoch) for epoch in range(3)]
    for plan in plans:
        assert np.bincount(plan[:, 0]).tolist() == [10, 10]
        assert len(set(plan[:10, 0])) == 2  # shuffled, not one dataset after the other
    assert not (plans[0] == plans[1]).all()
    assert (plans[1] == dataset.epoch_plan(sources, 0, 1)).all()
    assert not (plans[1] == dataset.epoch_plan(sources, 1, 1)).all()


def run_of_batches(train_set, num_workers, seed):
    np.random.seed(seed)
    torch.manual_seed(seed)
    return list(
        dataset.train_loader(
            train_set, batch_size=4, epochs=2, start=0, num_workers=num_workers, pin_memory=False
        )
    )


def test_samples_depend_on_nothing_but_seed_epoch_and_index(data):
    sources = [source(data, w_aug=True), source(data, backgrounds=False, name="test")]
    train_set = TrainSet(sources, frame=FRAME, prompt="mixed", seed=5)
    plain = run_of_batches(train_set, 0, seed=1)
    assert [len(batch["image"]) for batch in plain] == [4, 4, 1, 4, 4, 1]
    for num_workers in (1, 3):
        for batch, same in zip(plain, run_of_batches(train_set, num_workers, seed=2), strict=True):
            assert batch.keys() == same.keys()
            assert all(torch.equal(batch[name], same[name]) for name in batch)
    shifted = train_set[1, 3]  # out of order
    assert torch.equal(shifted["image"], plain[3]["image"][3])
    other_seed = TrainSet(sources, frame=FRAME, prompt="mixed", seed=6)
    assert not torch.equal(other_seed[1, 3]["image"], shifted["image"])
    assert not torch.equal(train_set[0, 3]["image"], shifted["image"])


def test_a_run_can_start_at_any_batch():
    whole = list(dataset.RunSampler(epoch_length=7, batch_size=3, epochs=4))
    assert whole[:4] == [
        [(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)], [(0, 6)], [(1, 0), (1, 1), (1, 2)]
    ]  # fmt: skip
    for start in range(13):
        sampler = dataset.RunSampler(epoch_length=7, batch_size=3, epochs=4, start=start)
        assert list(sampler) == whole[start:] and len(sampler) == 12 - start


def test_the_test_set_is_the_same_at_every_use_and_keeps_full_resolution(data):
    tests = TestSet(source(data, percentage=0.5, w_aug=True), frame=FRAME, prompt="box", seed=0)
    again = TestSet(source(data, percentage=0.5, w_aug=True), frame=FRAME, prompt="box", seed=0)
    assert len(tests) == 3
    for first, second in zip(
        DataLoader(tests, batch_size=None), DataLoader(again, batch_size=None, num_workers=2), strict=True
    ):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert first["truth"].shape == (48, 64) and first["truth"].dtype == torch.bool
    assert len(TestSet(source(data, percentage=4.0), frame=FRAME, prompt="none", seed=0)) == 6


def test_training_is_not_fed_the_test_sets_composites(data):
    train_set = TrainSet([source(data)], frame=FRAME, prompt="none", seed=0)
    tests = TestSet(source(data), frame=FRAME, prompt="none", seed=0)
    seen = {train_set[0, index]["image"].numpy().tobytes() for index in range(6)}
    assert not seen & {tests[index]["image"].numpy().tobytes() for index in range(6)}


def test_backgrounds_of_any_shape_are_cropped_to_the_canvas(tmp_path):
    write_backgrounds(tmp_path / "b", 1, size=(30, 200))
    image = dataset.read_image(tmp_path / "b" / "bg 0.jpg")
    for canvas in ((48, 64), (64, 10), (7, 7)):
        crops = [dataset.random_crop(image, canvas, rng(seed)) for seed in range(5)]
        assert all(crop.shape == (*canvas, 3) for crop in crops)
        assert len({crop.tobytes() for crop in crops}) == 5
