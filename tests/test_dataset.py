import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_cable, write_backgrounds, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch.utils.data import DataLoader

import dataset
from base.errors import UserError
from config import DatasetConfig
from dataset import DatasetIndex, TestSet, TrainSet
from imaging import augmentation, compositing, files, geometry, prompts
from imaging.files import FileInfo, Pair
from imaging.geometry import InputSpec
from sam import encoder, point_labels

FRAME = InputSpec(64, 32)


def source(data, *, backgrounds=True, name="cables", **keys):
    keys = {
        "data_dir": str(data / name),
        "bg_paths": [str(data / "backgrounds")] if backgrounds else None,
        **keys,
    }
    config = DatasetConfig.model_validate(keys, context={"yaml_dir": data})
    return dataset.index_datasets([config])[0]


def rng(seed=0):
    return np.random.default_rng(seed)


# --- files ---


def test_images_are_read_as_upright_rgb(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :3, 0] = 200  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    upright = files.read_image(tmp_path / "a.png")
    assert upright.shape == (6, 4, 3)
    assert (upright[:3] == [200, 0, 0]).all() and (upright[3:] == 0).all()


def test_16_bit_photos_are_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: expected 8-bit"):
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


@pytest.mark.parametrize("kind", ["photo", "labels", "probabilities", "16 bit"])
def test_what_is_no_binary_mask_is_named(tmp_path, kind):
    values = {
        "photo": rng().integers(0, 255, (40, 50)),
        "labels": np.repeat(np.arange(4), 10)[:, None] * np.ones((1, 50)),
        "probabilities": np.linspace(0, 255, 50)[None] * np.ones((40, 1)),
        "16 bit": np.full((40, 50), 65535),
    }[kind]
    Image.fromarray(values.astype(np.uint16 if kind == "16 bit" else np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: (not a binary mask|expected 8-bit)"):
        files.read_mask(tmp_path / "m.png")


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
    with pytest.raises(UserError) as error:
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
    with pytest.raises(UserError) as error:
        source(tmp_path, backgrounds=False, name="a")
    assert str(error.value).startswith("13 problem(s)")
    assert str(error.value).count("cannot be decoded") == 10 and "... and 3 more" in str(error.value)


# --- sizes ---


@pytest.mark.parametrize("size", [(480, 640), (641, 333), (17, 1000), (1000, 3), (64, 64)])
def test_sizes_and_pixels_are_those_of_sam_predictor(size):
    official = ResizeLongestSide(64)
    assert geometry.fit_size(size, 64) == official.get_preprocess_shape(*size, 64) or min(size) < 16
    image = rng().integers(0, 255, (*size, 3)).astype(np.uint8)
    if min(geometry.fit_size(size, 64)) > 1:
        resized = geometry.resize_image(image, geometry.fit_size(size, 64))
        assert (resized == official.apply_image(image)).all()


def test_thin_masks_survive_being_resized():
    mask = np.zeros((960, 1280), np.float32)
    mask[::97] = 1.0  # one pixel wide, a twentieth of a target pixel
    small = geometry.resize_mask(mask, (48, 64))
    assert small.mean() == pytest.approx(mask.mean(), rel=1e-5)
    assert (small.max(axis=1) > 0).sum() == 10


def test_model_input_pads_bottom_right_and_averages_the_target():
    mask = np.zeros((32, 64), np.float32)
    mask[8, :] = 1.0
    image = np.full((32, 64, 3), 9, np.uint8)
    sample = geometry.to_model_input(image, mask, FRAME)
    assert sample["image"].shape == (64, 64, 3) and sample["image"].dtype == torch.uint8
    assert sample["size"].tolist() == [32, 64]
    assert (sample["image"][:32] == 9).all() and (sample["image"][32:] == 0).all()
    assert (sample["target"][0, 4] == 128).all()  # half of each 2 x 2 cell
    assert sample["target"].dtype == torch.uint8 and sample["target"].int().sum() == 128 * 32
    valid = encoder.valid_pixels(sample["size"][None], FRAME.mask_grid, FRAME.mask_grid / FRAME.img_size)
    assert valid[0, 0].sum() == 16 * 32 and valid[0, 0, :16].all()


def test_a_grid_finer_than_the_input_has_a_target_of_its_own():
    mask = np.zeros((64, 128), np.float32)
    mask[9, :] = 1.0  # thinner than a pixel of the input
    sample = geometry.to_model_input(np.zeros((64, 128, 3), np.uint8), mask, InputSpec(64, 128))
    assert sample["image"].shape == (64, 64, 3) and sample["size"].tolist() == [32, 64]
    assert (sample["target"][0, 9] == 255).all() and sample["target"].int().sum() == 255 * 128


def test_model_input_is_never_a_view_of_a_picture_that_others_read():
    image = np.zeros((64, 64, 3), np.uint8)  # square and of the model's size: nothing to resize or pad
    image.flags.writeable = False
    sample = geometry.to_model_input(image, np.zeros((64, 64), np.float32), FRAME)
    assert not np.shares_memory(sample["image"].numpy(), image)


def test_cells_partly_in_the_padding_are_not_valid():
    valid = encoder.valid_pixels(torch.tensor([[33, 64], [1, 1]]), 32, 0.5)
    assert valid[0, 0].any(dim=1).sum() == 16
    assert valid[1].sum() == 1


stems = st.text("abAB. é", min_size=1, max_size=3).filter(lambda stem: stem.strip(". "))
names = st.sets(
    st.tuples(stems, st.sampled_from([".png", ".jpg", ".JPEG", ".txt", ""])), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=100)
@given(images=names, masks=names)
def test_every_file_is_in_one_pair_or_in_one_message(tmp_path_factory, images, masks):
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for kind, chosen in (("imgs", images), ("masks", masks)):
        (folder / kind).mkdir()
        for stem, suffix in chosen:
            (folder / kind / (stem + suffix)).touch()
        pictures = [path for path in (folder / kind).iterdir() if path.suffix.lower() in files.IMAGE_SUFFIXES]
        found[kind] = {path.stem: path for path in sorted(pictures)}
        doubles = len(pictures) - len(found[kind])
        found[kind, "doubles"] = doubles
    faults = []
    pairs = files.find_pairs(folder, faults)
    if not found["imgs"] or not found["masks"]:
        assert pairs == [] and any("no .png" in fault for fault in faults)
        return
    shared = found["imgs"].keys() & found["masks"].keys()
    assert {pair.image_path.stem for pair in pairs} == shared
    assert all(pair.image_path.stem == pair.mask_path.stem for pair in pairs)
    alone = found["imgs"].keys() ^ found["masks"].keys()
    doubled = found["imgs", "doubles"] + found["masks", "doubles"]
    assert len(faults) == len(alone) + doubled


# --- compositing ---


def with_mask(image, mask):
    return np.dstack([image, (np.asarray(mask, np.float32) * 255).astype(np.uint8)])


def test_cut_out_leaves_no_trace_of_the_old_background():
    mask = draw_cable(rng(), (60, 80), 6)
    photo = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    photo = with_mask(cv2.GaussianBlur(photo, (0, 0), 0.8), mask)  # as a camera mixes the edge
    cut_out = compositing.cut_out(photo)
    own_colours = np.dstack([photo[..., :3], cut_out[..., 3]])

    def greenest(cables):
        image = np.zeros((60, 80, 3), np.uint8)
        compositing.paste(cables, image, np.zeros((60, 80), np.float32))
        return image[..., 1].max()

    assert greenest(own_colours) > 70
    assert greenest(cut_out) < 40


def test_cut_out_has_a_soft_edge_where_the_mask_is():
    mask = draw_cable(rng(), (60, 80), 6)
    alpha = compositing.cut_out(with_mask(np.zeros((60, 80, 3), np.uint8), mask))[..., 3]
    assert ((alpha > 127) == mask).mean() > 0.99
    assert ((alpha > 13) & (alpha < 242)).any()
    assert alpha.sum() / 255 == pytest.approx(mask.sum(), rel=0.02)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cut_out_keeps_the_colour_of_very_thin_cables(width):
    mask = draw_cable(rng(), (60, 80), width)
    image = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    assert (compositing.cut_out(with_mask(image, mask))[..., :3] == (200, 30, 30)).all()


def test_large_photos_are_brought_down_before_cutting_out_and_keep_thin_cables(tmp_path):
    write_dataset(tmp_path / "large", 1, size=(1500, 2000), width=1)
    pair = source(tmp_path, name="large", backgrounds=False).pairs[0]
    photo = compositing.load_pair(pair, longest=500)
    image, mask = photo[..., :3], photo[..., 3]
    assert photo.shape == (375, 500, 4)
    assert mask.sum() / 255 == pytest.approx(files.read_mask(pair.mask_path).sum() / 16, rel=0.02)
    assert 0 < mask.max() < 128  # a pixel's cable fills a quarter of a pixel
    cut_out = compositing.load_cut_out(pair, longest=500)
    cable = image[mask == mask.max()].min()
    assert cut_out[..., :3].min() >= cable
    assert cut_out[..., 3].sum() == pytest.approx(mask.sum(), rel=0.03)
    assert compositing.load_pair(pair, longest=2000).shape == (1500, 2000, 4)


def test_paste_blends_by_the_mask_and_joins_the_masks():
    cut_out = np.zeros((1, 4, 4), np.uint8)
    cut_out[..., :3] = 200
    cut_out[0, :, 3] = 0, 51, 255, 51
    image, mask = np.full((1, 4, 3), 100, np.uint8), np.array([[0.5, 0, 0.5, 0.5]], np.float32)
    compositing.paste(cut_out, image, mask)
    assert image[0, :, 0].tolist() == [100, 120, 200, 120]
    assert mask[0] == pytest.approx([0.5, 0.2, 1.0, 0.6])
    compositing.paste(cut_out, image, mask, recolor=lambda colors: 255 - colors)
    assert image[0, :, 2].tolist() == [100, 107, 55, 107]


def test_without_augmentation_cables_stay_where_and_as_they_were(data):
    write_dataset(data / "thick", 3, width=11)
    cables = source(data, name="thick")
    image, mask = dataset.composite(cables, 2, (48, 64), rng())
    photo = files.read_image(cables.pairs[2].image_path)
    truth = files.read_mask(cables.pairs[2].mask_path)
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
    assert (image == files.read_image(cables.pairs[1].image_path)).all()
    assert (mask == files.read_mask(cables.pairs[1].mask_path)).all()


# --- augmentation ---


def test_at_least_a_quarter_of_the_cable_stays_in_the_frame():
    corner = np.zeros((48, 64, 4), np.uint8)
    corner[1:9, 1:9, 3] = 255  # far off center: most shifts would lose it
    for seed in range(200):
        moved = compositing.random_affine(corner.copy(), (48, 64), rng(seed))[..., 3].sum() / 255
        assert moved > 0.2 * compositing.SCALE[0] ** 2 * 64, seed
        assert moved < 1.1 * compositing.SCALE[1] ** 2 * 64, seed


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7])
def test_warp_keeps_image_and_mask_together_and_their_centre(scale):
    mask = cv2.GaussianBlur(draw_cable(rng(3), (96, 128), 9).astype(np.float32), (0, 0), 1)
    cut_out = np.repeat((mask * 255).astype(np.uint8)[..., None], 4, axis=2)
    canvas = (round(96 * scale), round(128 * scale))
    matrix = compositing._similarity(mask.shape, canvas, scale, 0.0, np.zeros(2))
    warped = compositing._warp(cut_out, matrix, canvas, scale) / 255
    inner = np.s_[3:-3, 3:-3]  # at the photo's rim the mask ends and colors go on
    assert np.abs(warped[..., 0] - warped[..., 3])[inner].max() < 0.03
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    expected = cv2.resize(mask, canvas[::-1], interpolation=interpolation)
    assert np.abs(warped[..., 3] - expected)[inner].max() < 0.12
    assert warped[..., 3][inner].sum() == pytest.approx(expected[inner].sum(), rel=0.02)


def test_where_a_cable_leaves_its_photo_its_end_is_soft_and_keeps_its_colour():
    cut_out = np.full((40, 40, 4), 200, np.uint8)
    cut_out[..., 3] = 255
    matrix = compositing._similarity((40, 40), (80, 80), 1.0, 30.0, np.zeros(2))
    warped = compositing._warp(cut_out, matrix, (80, 80), 1.0)
    alpha = warped[..., 3]
    assert (warped[..., :3] == 200).all()
    assert ((alpha > 30) & (alpha < 220)).sum() > 50
    assert alpha.sum() / 255 == pytest.approx(38 * 38, rel=0.01)


def test_flip_moves_image_and_mask_alike_and_spares_its_argument():
    mask = draw_cable(rng(1), (20, 30), 3).astype(np.uint8)
    picture = np.repeat(mask[..., None], 4, axis=2)
    picture.flags.writeable = False  # as it comes from the cache
    seen = set()
    for seed in range(40):
        flipped = augmentation.flip(picture, rng(seed))
        assert (flipped[..., 0] == flipped[..., 3]).all()
        seen.add(flipped.tobytes())
        flipped[:] = 7
    assert len(seen) == 4
    assert (picture[..., 0] == mask).all()


def test_cables_take_every_colour():
    red = np.full((4, 4, 3), (200, 40, 40), np.uint8)
    recoloured = np.stack([augmentation.recolor_cables(red, rng(seed))[0, 0] for seed in range(60)])
    assert set(recoloured.argmax(axis=1)) == {0, 1, 2}
    assert np.ptp(recoloured.max(axis=1).astype(int)) > 60


def test_degrade_keeps_shape_and_range():
    image = rng().integers(0, 255, (30, 40, 3)).astype(np.uint8)
    results = [augmentation.camera_degradation(image, rng(seed)) for seed in range(30)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) == 30
    dark = np.zeros((8, 8, 3), np.uint8)  # darkening black must not wrap around or fold back
    assert min(int(augmentation.camera_degradation(dark, rng(seed)).max()) for seed in range(10)) == 0


def test_noise_is_normal():
    z = augmentation.NORMAL_QUANTILES
    assert abs(z.mean()) < 1e-9 and z.std() == pytest.approx(1.0, abs=0.02)
    assert (np.abs(z) < 1).mean() == pytest.approx(0.683, abs=0.01)


@pytest.mark.parametrize(
    "draw",
    [augmentation._draw_box, augmentation._draw_strip, augmentation._draw_text, augmentation._draw_keys],
)
def test_clutter_of_every_kind_is_drawn_in_one_colour_within_the_picture(draw):
    changed = []
    for seed in range(20):
        layer = np.zeros((60, 90, 3), np.uint8)
        draw(layer, [200, 100, 50], rng(seed))
        drawn = layer.any(axis=2)
        changed.append(drawn.mean())
        strong = layer[layer[..., 0] > 150].astype(float)
        assert np.allclose(strong[:, 1] / strong[:, 0], 0.5, atol=0.02)
    assert np.mean(np.array(changed) > 0) > 0.7  # some of it falls out of the frame
    assert np.mean(changed) < 0.5


def test_clutter_leaves_the_truth_and_the_background_file_alone(data):
    image = np.full((60, 90, 3), 77, np.uint8)
    image.flags.writeable = False
    cluttered = augmentation.add_clutter(image, rng(1))
    assert cluttered.shape == image.shape and cluttered.dtype == np.uint8
    assert 0.01 < np.mean((cluttered != image).any(axis=2)) < 1
    assert (augmentation.add_clutter(image, rng(1)) == cluttered).all()


def test_shadows_darken_beside_the_cable_alone():
    image = np.full((256, 256, 3), 200, np.uint8)
    cables = np.zeros((256, 256, 4), np.uint8)
    augmentation.cast_shadow(cables, image, rng())
    assert (image == 200).all()
    cables[100:110, :, 3] = 255
    augmentation.cast_shadow(cables, image, rng())
    assert image.min() < 170 and image.max() == 200
    assert (image[:80] == 200).all() and (image[130:] == 200).all()  # at most 5 px away, blurred by 4


# --- prompts ---


def test_label_constants_are_those_of_the_decoder():
    assert (
        point_labels.ABSENT,
        point_labels.NOT_A_POINT,
        point_labels.FOREGROUND_POINT,
        prompts.BOX_CORNERS,
    ) == (
        point_labels.ABSENT,
        point_labels.NOT_A_POINT,
        point_labels.FOREGROUND_POINT,
        (point_labels.BOX_CORNER_1, point_labels.BOX_CORNER_2),
    )


def test_points_lie_on_cables_one_to_three_of_them():
    target = draw_cable(rng(), (64, 64), 3).astype(np.uint8) * 255
    counts = set()
    for seed in range(40):
        points, labels = prompts.draw_prompt("point", target, (64, 64), 64, rng(seed))
        count = int((labels == 1).sum())
        counts.add(count)
        assert labels.tolist() == [1] * count + [-1] + [-2] * (3 - count)
        assert all(target[int(y), int(x)] for x, y in points[:count])
    assert counts == {1, 2, 3}


def test_prompts_are_in_pixels_of_the_frame():
    target = np.zeros((16, 16), np.uint8)  # of a picture of 60 x 64 pixels, 4 x 4 in a cell
    target[14, 3] = 255  # rows 56 to 59, columns 12 to 15
    points, _ = prompts.draw_prompt("point", target, (60, 64), 64, rng())
    assert points[0].tolist() == [13.5, 57.5]
    boxes = [prompts.draw_prompt("box", target, (60, 64), 64, rng(seed))[0].ravel() for seed in range(20)]
    assert np.abs(np.array(boxes) - [12, 56, 15, 59]).max() <= 0.2 + 1e-6
    assert np.max(boxes, axis=0)[3] <= 59


def test_box_surrounds_the_cables_with_jitter_inside_the_frame():
    target = np.zeros((64, 64), np.uint8)
    target[10:30, 0:50] = 255
    boxes = []
    for seed in range(40):
        points, labels = prompts.draw_prompt("box", target, (48, 64), 64, rng(seed))
        assert labels.tolist() == [2, 3]
        boxes.append(points.ravel())
    boxes = np.array(boxes)
    assert np.abs(boxes - [0, 10, 49, 29]).max() <= 2.5 + 1e-6
    assert np.ptp(boxes, axis=0)[[1, 2, 3]].min() > 0.5 and boxes.min() >= 0


def test_mixed_draws_all_kinds_and_empty_masks_get_none():
    target = draw_cable(rng(), (64, 64), 3).astype(np.uint8) * 255
    labels = [prompts.draw_prompt("mixed", target, (64, 64), 64, rng(seed))[1] for seed in range(60)]
    kinds = [("point" if 1 in one else "box" if 2 in one else "none") for one in labels]
    assert all(kinds.count(kind) > 10 for kind in ("point", "box", "none"))
    for kind in prompts.PROMPT_KINDS:
        points, labels = prompts.draw_prompt(kind, np.zeros((64, 64), np.uint8), (64, 64), 64, rng())
        assert (labels == point_labels.ABSENT).all() and len(points) == prompts.PROMPT_TOKENS[kind]


def test_a_cable_thinner_than_half_a_cell_is_still_prompted():
    target = np.where(np.eye(20) > 0, 50, 0).astype(np.uint8)
    points, labels = prompts.draw_prompt("point", target, (20, 20), 20, rng())
    assert labels[0] == 1 and points[0, 0] == points[0, 1]


# --- epochs ---


def fake_source(n, percentage):
    config = DatasetConfig.model_construct(percentage=percentage, bg_paths=(), w_aug=False)
    pairs = tuple(Pair(f"{i}", f"{i}") for i in range(n))
    return DatasetIndex(config, pairs, (), {pair.image_path: FileInfo((48, 64), "") for pair in pairs})


@pytest.mark.parametrize(
    ("n", "percentage", "expected"),
    [(100, 0.1, 10), (100, 1.0, 100), (7, 0.5, 4), (30, 0.001, 1), (10, 2.5, 25), (3, 3.0, 9)],
)
def test_percentage_over_several_epochs(n, percentage, expected):
    subsets = []
    for epoch in range(5):
        plan, _ = dataset.epoch_plan([fake_source(n, percentage)], 0, epoch)
        counts = np.bincount(plan[:, 1], minlength=n)
        assert len(plan) == expected
        assert counts.min() >= int(percentage) and counts.max() <= int(np.ceil(percentage))
        subsets.append(tuple(counts))
    assert len(set(subsets)) > 1 or percentage in (1.0, 3.0)


def test_an_epoch_mixes_all_datasets_in_a_new_order():
    sources = [fake_source(20, 0.5), fake_source(5, 2.0)]

    def plan(seed, epoch):
        rows, order = dataset.epoch_plan(sources, seed, epoch)
        return rows[order]

    plans = [plan(0, epoch) for epoch in range(3)]
    for rows in plans:
        assert np.bincount(rows[:, 0]).tolist() == [10, 10]
        assert len(set(rows[:10, 0])) == 2  # shuffled, not one dataset after the other
    assert not (plans[0] == plans[1]).all()
    assert (plans[1] == plan(0, 1)).all()
    assert not (plans[1] == plan(1, 1)).all()


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
    train_set = TrainSet(sources, spec=FRAME, prompt="mixed", seed=5)
    plain = run_of_batches(train_set, 0, seed=1)
    assert [len(batch["image"]) for batch in plain] == [4, 4, 1, 4, 4, 1]
    for num_workers in (1, 3):
        for batch, same in zip(plain, run_of_batches(train_set, num_workers, seed=2), strict=True):
            assert batch.keys() == same.keys()
            assert all(torch.equal(batch[name], same[name]) for name in batch)
    cached = TrainSet(sources, spec=FRAME, prompt="mixed", seed=5, cache_bytes=1 << 20)
    for batch, same in zip(plain, run_of_batches(cached, 2, seed=3), strict=True):
        assert all(torch.equal(batch[name], same[name]) for name in batch)
    use = train_set.epoch(1)[3]  # out of order
    alone = train_set[use]
    assert torch.equal(alone["image"], plain[3]["image"][3])
    other_seed = TrainSet(sources, spec=FRAME, prompt="mixed", seed=6)
    assert not torch.equal(other_seed[use]["image"], alone["image"])
    assert not torch.equal(train_set[replace(use, born=0)]["image"], alone["image"])


def test_a_run_can_start_at_any_batch():
    train_set = TrainSet([fake_source(7, 1.0)], spec=FRAME, prompt="none", seed=0)
    span = {"batch_size": 3, "epochs": 4}
    whole = list(train_set.batches(**span, start=0))
    assert [len(batch) for batch in whole] == [3, 3, 1] * 4
    assert [batch[0].epoch for batch in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted(use.pair for batch in whole[:3] for use in batch) == list(range(7))
    for start in range(13):
        assert list(train_set.batches(**span, start=start)) == whole[start:]
        assert list(train_set.batches_to_make(**span, start=start)) == whole[start:]


# --- reuse ---


def reuse_source(n, percentage=1.0):
    """A source of composites that is never read, for what is planned only."""
    config = DatasetConfig.model_construct(percentage=percentage, bg_paths=("b",), w_aug=True)
    pairs = tuple(Pair(f"{i}", f"{i}") for i in range(n))
    return DatasetIndex(config, pairs, (), {pair.image_path: FileInfo((48, 64), "") for pair in pairs})


@pytest.mark.parametrize("reuse", [1, 2, 3, 4])
def test_reuse_renews_exactly_the_stated_samples(reuse):
    train_set = TrainSet([reuse_source(10), reuse_source(5)], spec=FRAME, prompt="none", seed=0, reuse=reuse)
    assert train_set.places == (15 if reuse > 1 else 0)
    epochs_of = {}
    for epoch in range(12):
        uses = train_set.epoch(epoch)
        assert sorted(use.slot for use in uses) == list(range(15))
        for use in uses:
            is_new = epoch == 0 or (epoch + use.slot) % reuse == 0
            assert (use.born == epoch) == is_new
            assert use.place == (use.slot if reuse > 1 else None)
            epochs_of.setdefault((use.born, use.slot), []).append((epoch, use.source, use.pair))
        if epoch:
            assert abs(sum(use.born == epoch for use in uses) - 15 / reuse) < 1
    for (born, _), used in epochs_of.items():
        assert [epoch for epoch, _, _ in used] == list(range(born, born + len(used)))
        assert len({(number, pair) for _, number, pair in used}) == 1
        if 0 < born < 12 - reuse:
            assert len(used) == reuse


@pytest.mark.parametrize(("batch_size", "start"), [(4, 0), (4, 6), (3, 17), (20, 0)])
def test_every_sample_is_made_once_before_its_first_use(batch_size, start):
    sources = [reuse_source(9), fake_source(4, 1.5), reuse_source(3, 0.5)]
    train_set = TrainSet(sources, spec=FRAME, prompt="none", seed=0, reuse=3, keep_photos=True)
    assert train_set.places == 9 + 4 + 2
    span = {"batch_size": batch_size, "epochs": 8, "start": start}
    made = train_set.batches_to_make(**span)
    held, sizes = {}, []
    for batch in train_set.batches(**span):
        while any(held.get(use.place) != use.born for use in batch):
            new = next(made)
            sizes.append(len(new))
            assert len({use.place for use in new}) == len(new) <= batch_size
            assert all(held.get(use.place) != use.born for use in new)  # nothing twice
            held.update({use.place: use.born for use in new})
    assert next(made, None) is None
    per_epoch = train_set.epoch_length
    assert sum(sizes) <= per_epoch + (8 - start * batch_size // per_epoch) * (per_epoch - 6) / 3 + 8


def test_photos_that_never_change_have_one_place_in_all_epochs():
    train_set = TrainSet([fake_source(6, 0.5)], spec=FRAME, prompt="point", seed=0, keep_photos=True)
    uses = [use for epoch in range(20) for use in train_set.epoch(epoch)]
    assert {use.place for use in uses} == set(range(6))
    assert all(use.place == use.pair and use.born == 0 for use in uses)


def test_a_reused_sample_is_the_same_with_a_prompt_of_its_own(data):
    sources = [source(data, w_aug=True)]
    train_set = TrainSet(sources, spec=FRAME, prompt="point", seed=0, reuse=3)
    by_slot = [{use.slot: use for use in train_set.epoch(epoch)} for epoch in (3, 4, 5)]
    slot = next(slot for slot, use in by_slot[0].items() if use.born == 3)
    samples = [train_set[uses[slot]] for uses in by_slot]
    for sample in samples[1:]:
        assert all(torch.equal(sample[name], samples[0][name]) for name in ("image", "target", "size"))
    prompts = {tuple(sample["points"].flatten().tolist()) for sample in samples}
    assert len(prompts) == 3
    redrawn = train_set.draw_prompt(by_slot[1][slot], samples[0]["target"], samples[0]["size"])
    assert all(torch.equal(redrawn[name], samples[1][name]) for name in redrawn)


def test_the_cache_covers_all_that_training_reads(data, monkeypatch):
    sources = [source(data, w_aug=True), source(data, backgrounds=False, w_aug=True, name="test")]
    train_set = TrainSet(sources, spec=FRAME, prompt="none", seed=0, cache_bytes=1 << 22)
    before = [train_set[use] for epoch in range(9) for use in train_set.epoch(epoch)]
    for folder in ("cables", "test", "backgrounds"):
        shutil.rmtree(data / folder)
    again = [train_set[use] for epoch in range(9) for use in train_set.epoch(epoch)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(before, again, strict=True))


def test_the_test_set_is_the_same_at_every_use_and_keeps_full_resolution(data):
    tests = TestSet(source(data, percentage=0.5, w_aug=True), spec=FRAME, prompt="box", seed=0)
    again = TestSet(source(data, percentage=0.5, w_aug=True), spec=FRAME, prompt="box", seed=0)
    assert len(tests) == 3
    for first, second in zip(
        DataLoader(tests, batch_size=None), DataLoader(again, batch_size=None, num_workers=2), strict=True
    ):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert first["truth"].shape == (48, 64) and first["truth"].dtype == torch.bool
    assert len(TestSet(source(data, percentage=4.0), spec=FRAME, prompt="none", seed=0)) == 6


def test_training_is_not_fed_the_test_sets_composites(data):
    train_set = TrainSet([source(data)], spec=FRAME, prompt="none", seed=0)
    tests = TestSet(source(data), spec=FRAME, prompt="none", seed=0)
    seen = {train_set[use]["image"].numpy().tobytes() for use in train_set.epoch(0)}
    assert not seen & {tests[index]["image"].numpy().tobytes() for index in range(6)}


def test_backgrounds_of_any_shape_are_cropped_to_the_canvas(tmp_path):
    write_backgrounds(tmp_path / "b", 1, size=(30, 200))
    image = files.read_image(tmp_path / "b" / "bg 0.jpg")
    for canvas in ((48, 64), (64, 10), (7, 7)):
        crops = [compositing.random_crop(image, canvas, rng(seed)) for seed in range(5)]
        assert all(crop.shape == (*canvas, 3) for crop in crops)
        assert len({crop.tobytes() for crop in crops}) == 5
