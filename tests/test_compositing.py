"""Cutting out, pasting and transforming cables; the samples made of them."""

import cv2
import numpy as np
import pytest
from conftest import draw_cable, rng, write_backgrounds, write_dataset
from PIL import Image

from imaging import compositing, files, masks, pairing
from imaging.appearance import Color, Light, Shading


def files_in(data, name="cables"):
    """The pairs of a dataset and the backgrounds beside it."""
    pairs, faults = pairing.find_pairs(data / name)
    assert not faults
    return pairs, files.image_files(data / "backgrounds")


def with_mask(image, mask):
    return np.dstack([image, (np.asarray(mask, np.float32) * 255).astype(np.uint8)])


def test_a_mask_without_background_is_pasted_at_a_random_scale():
    cut_out = compositing.cut_out(with_mask(np.full((60, 80, 3), 90, np.uint8), np.ones((60, 80))))
    assert (cut_out[..., 4] == 255).all()  # the largest radius
    relief = compositing.measure_relief(cut_out)
    assert np.isfinite(relief.across).all() and np.isfinite(relief.normals).all()
    for seed in range(5):
        for placement in compositing.draw_placements(cut_out, (64, 64), rng(seed)):
            assert np.isfinite(placement.matrix).all()


def test_cut_out_leaves_no_trace_of_the_old_background():
    mask = draw_cable(rng(), (60, 80), 6)
    photo = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    photo = with_mask(cv2.GaussianBlur(photo, (0, 0), 0.8), mask)  # as a camera mixes the edge
    cut_out = compositing.cut_out(photo)
    own_colors = np.dstack([photo[..., :3], cut_out[..., 3]])

    def greenest(cables):
        image = np.zeros((60, 80, 3), np.uint8)
        compositing.paste(compositing.premultiply(cables), image, np.zeros((60, 80), np.float32))
        return image[..., 1].max()

    assert greenest(own_colors) > 70
    assert greenest(cut_out[..., :4]) < 40


def test_cut_out_has_a_soft_edge_where_the_mask_is():
    mask = draw_cable(rng(), (60, 80), 6)
    alpha = compositing.cut_out(with_mask(np.zeros((60, 80, 3), np.uint8), mask))[..., 3]
    assert ((alpha > 127) == mask).mean() > 0.99
    assert ((alpha > 13) & (alpha < 242)).any()
    assert alpha.sum() / 255 == pytest.approx(mask.sum(), rel=0.02)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cut_out_keeps_the_color_of_very_thin_cables(width):
    mask = draw_cable(rng(), (60, 80), width)
    image = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    assert (compositing.cut_out(with_mask(image, mask))[..., :3] == (200, 30, 30)).all()


def test_large_photos_are_brought_down_before_cutting_out_and_keep_thin_cables(tmp_path):
    write_dataset(tmp_path / "large", 1, size=(1500, 2000), width=1)
    (pair,), _ = pairing.find_pairs(tmp_path / "large")
    photo = compositing.load_pair(pair, longest=500)
    image, mask = photo[..., :3], photo[..., 3]
    assert photo.shape == (375, 500, 4)
    assert mask.sum() / 255 == pytest.approx(masks.read_mask(pair.mask_path).sum() / 16, rel=0.02)
    assert 0 < mask.max() < 128  # a pixel's cable fills a quarter of a pixel
    cut_out = compositing.load_cut_out(pair, longest=500)
    cable = image[mask == mask.max()].min()
    assert cut_out[..., :3].min() >= cable
    assert cut_out[..., 3].sum() == pytest.approx(mask.sum(), rel=0.03)
    assert compositing.load_pair(pair, longest=2000).shape == (1500, 2000, 4)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(600, 800), (601, 807)])
def test_a_shrunk_jpeg_fits_its_mask(tmp_path, orientation, size):
    mask = draw_cable(rng(2), size, 25)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "imgs").mkdir()
    (tmp_path / "masks").mkdir()
    white_cable = Image.fromarray(mask.astype(np.uint8) * 255)
    white_cable.save(tmp_path / "imgs/0.jpg", quality=95, exif=exif)
    white_cable.save(tmp_path / "masks/0.png", exif=exif)
    (pair,), _ = pairing.find_pairs(tmp_path)
    loaded = compositing.load_pair(pair, longest=230).astype(int)
    height, width = (150, 200) if size == (600, 800) else (150, 202)
    assert loaded.shape == (*((height, width) if orientation < 5 else (width, height)), 4)
    gray, soft_mask = loaded[..., 0], loaded[..., 3]
    difference = np.abs(gray - soft_mask).mean()
    assert difference < 1
    for axis in (0, 1):
        assert np.abs(np.roll(gray, 1, axis) - soft_mask).mean() > 3 * difference


@pytest.mark.parametrize("width", [3, 7, 15])
def test_a_cut_out_knows_the_radius_of_its_cables(width):
    mask = np.zeros((60, 80), np.uint8)
    mask[20 : 20 + width] = 1
    mask[45:48] = 1  # another cable, 3 px wide
    radius = compositing.cut_out(with_mask(np.zeros((60, 80, 3), np.uint8), mask))[..., 4] / 2
    assert radius[20 : 20 + width, 10:70] == pytest.approx(width / 2, abs=0.5)
    assert radius[45:48, 10:70] == pytest.approx(1.5, abs=0.5)


def test_paste_blends_by_the_mask_and_joins_the_masks():
    cut_out = np.zeros((1, 4, 4), np.uint8)
    cut_out[..., :3] = 200
    cut_out[0, :, 3] = 0, 51, 255, 51
    image, mask = np.full((1, 4, 3), 100, np.uint8), np.array([[0.5, 0, 0.5, 0.5]], np.float32)
    layer = compositing.premultiply(cut_out)
    assert layer[0, :, 0].tolist() == [0, 40, 200, 40]
    compositing.paste(layer, image, mask)
    assert image[0, :, 0].tolist() == [100, 120, 200, 120]
    assert mask[0] == pytest.approx([0.5, 0.2, 1.0, 0.6])


def test_dressing_colors_the_cables_and_turns_with_the_light():
    mask = np.zeros((64, 64), np.uint8)
    mask[24:40] = 1  # a horizontal cable
    cut_out = compositing.cut_out(with_mask(np.full((64, 64, 3), 128, np.uint8), mask))
    blue = Color(np.array([40.0, 20.0, -60.0]), 0.0, 0.0)
    shading = Shading(drop=0.5, power=2.0, gloss=0.0, gloss_width=0.2)
    light = Light(np.array([0.0, 1.0]), 0.3, 0.0, 0.0, 1.0, np.ones(3))  # from above
    relief = compositing.measure_relief(cut_out)
    layer = compositing.dress(cut_out, relief, blue, shading, light)
    assert (layer[..., 3] == cut_out[..., 3]).all()
    center = layer[32, 30].astype(int)
    assert center[2] > center[0] + 30
    assert layer[32, 30, 2] > layer[26, 30, 2] > layer[37, 30, 2]  # the edge is darker, the lower one more so
    quarter = compositing.Placement(compositing.similarity_matrix(np.zeros(2), np.zeros(2), 2.0, 90.0), 2.0)
    turned = quarter.turn_back(light).direction
    assert quarter.matrix[:, :2] @ turned / 2 == pytest.approx(light.direction)
    assert np.linalg.norm(turned) == pytest.approx(1)


def test_recoloring_in_place_leaves_the_rest_of_the_photo():
    mask = draw_cable(rng(), (60, 80), 8)
    photo = with_mask(np.full((60, 80, 3), 120, np.uint8), mask)
    compositing.recolor_in_place(photo, Color(np.array([15.0, 0.0, 0.0]), 0.0, 0.0))
    assert photo[mask, :3].max() < 60
    assert (photo[~mask, :3] == 120).all()


# --- samples ---


def test_without_augmentation_cables_stay_where_and_as_they_were(data):
    write_dataset(data / "thick", 3, width=11)
    pairs, backgrounds = files_in(data, "thick")
    image, mask = compositing.composite(pairs, backgrounds, 2, (48, 64), rng(), augment=False)
    photo = files.read_image(pairs[2].image_path)
    truth = masks.read_mask(pairs[2].mask_path)
    assert ((mask > 0.5) == truth).mean() > 0.99
    deep = cv2.erode(truth.astype(np.uint8), np.ones((7, 7))) > 0
    assert deep.any()
    assert (image[deep] == photo[deep]).all()
    far = cv2.dilate(truth.astype(np.uint8), np.ones((9, 9))) == 0
    assert image[far].max() <= 90 and (image[far] != photo[far]).any()


def test_the_mask_follows_the_augmented_cables(data):
    # Cables are bright and backgrounds dark by far, so that brightness shows the pasted cables.
    pairs, backgrounds = files_in(data)
    n_compared = 0
    for seed in range(12):
        image, mask = compositing.composite(pairs, backgrounds, 0, (48, 64), rng(seed), augment=True)
        assert (image.shape, image.dtype) == ((48, 64, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((48, 64), np.float32)
        brightness = cv2.GaussianBlur(image, (3, 3), 0).max(axis=2).astype(float)
        inside, outside = brightness[mask > 0.9], brightness[mask < 0.1]
        if len(inside) > 20:  # else too little of the cable is in the frame
            n_compared += 1
            assert inside.mean() > outside.mean() + 30, seed
    assert n_compared >= 6


def test_an_empty_mask_composites_to_the_background_alone(data):
    pairs, backgrounds = files_in(data)
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(pairs[0].mask_path)
    image, mask = compositing.composite(pairs, backgrounds, 0, (48, 64), rng(), augment=False)
    assert not mask.any() and image.max() <= 90


def test_a_photo_sample_without_augmentation_is_the_photo(data):
    pairs, _ = files_in(data)
    image, mask = compositing.photo_sample(pairs[1], (48, 64), rng(), augment=False)
    assert (image == files.read_image(pairs[1].image_path)).all()
    assert mask.dtype == np.float32 and (mask == masks.read_mask(pairs[1].mask_path)).all()


def test_an_augmented_photo_sample_keeps_image_and_mask_together(data, monkeypatch):
    monkeypatch.setattr(compositing, "RECOLOR_PHOTO_PROBABILITY", 0)  # the test finds the cable by its color
    write_dataset(data / "thick", 1, width=11)
    pairs, _ = files_in(data, "thick")
    samples = [compositing.photo_sample(pairs[0], (48, 64), rng(seed), augment=True) for seed in range(8)]
    assert len({image.tobytes() for image, _ in samples}) == 8
    for image, mask in samples:
        assert (image.shape, mask.shape, mask.dtype) == ((48, 64, 3), (48, 64), np.float32)
        brightness = image.max(axis=2).astype(float)
        assert brightness[mask > 0.9].mean() > brightness[mask < 0.1].mean() + 50


@pytest.mark.parametrize("augment", [False, True])
def test_samples_read_all_files_that_may_come_from_a_cache_through_read(data, augment):
    pairs, backgrounds = files_in(data)
    seen = []

    def read(load, item, longest):
        seen.append((load, item))
        return load(item, longest)

    direct = compositing.composite(pairs, backgrounds, 3, (48, 64), rng(1), augment=augment)
    through = compositing.composite(pairs, backgrounds, 3, (48, 64), rng(1), augment=augment, read=read)
    assert all((a == b).all() for a, b in zip(direct, through, strict=True))
    assert seen[0][0] is compositing.load_background and seen[0][1] in backgrounds
    assert (compositing.load_cut_out, pairs[3]) in seen[1:]


# --- transforms ---


def cut_out_of(mask):
    return compositing.cut_out(with_mask(np.full((*mask.shape, 3), 200, np.uint8), mask))


def test_cables_land_in_the_frame_with_widths_of_the_range():
    corner = np.zeros((96, 128), np.uint8)
    corner[2:8, 1:60] = 1  # a cable of 6 px far off center
    cut_out, widths = cut_out_of(corner), []
    for seed in range(200):
        for placement in compositing.draw_placements(cut_out, (192, 256), rng(seed)):
            assert 2 * compositing.SCALE_RANGE[0] <= placement.scale <= compositing.MAX_MAGNIFICATION
            widths.append(6 * placement.scale)
        layer = compositing.warp(
            cut_out[..., :4], compositing.draw_placements(cut_out, (192, 256), rng(seed))[0], (192, 256)
        )
        assert layer[..., 3].max() > 100, seed
    assert min(widths) < 9 and max(widths) > 13


def test_a_bundle_is_parallel_and_one_width_apart():
    mask = np.zeros((96, 128), np.uint8)
    mask[40:48] = 1
    cut_out = cut_out_of(mask)
    drawn = [compositing.draw_placements(cut_out, (192, 256), rng(seed)) for seed in range(100)]
    bundles = [placements for placements in drawn if len(placements) > 1]
    assert 8 < len(bundles) < 40
    for first, second, *_ in bundles:
        assert (first.matrix[:, :2] == second.matrix[:, :2]).all() and first.bend is second.bend
        step = np.linalg.norm(second.matrix[:, 2] - first.matrix[:, 2]) - 8 * first.scale
        assert -0.2 * 8 * first.scale < step < compositing.BUNDLE_GAPS[1] + 0.1 * 8 * first.scale


def test_a_cut_out_without_cables_is_pasted_nowhere():
    assert compositing.draw_placements(cut_out_of(np.zeros((40, 40))), (40, 40), rng()) == []


@pytest.mark.parametrize("bend", [False, True])
@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7])
def test_warp_keeps_image_and_mask_together_and_their_place(scale, bend):
    mask = cv2.GaussianBlur(draw_cable(rng(3), (96, 128), 9).astype(np.float32), (0, 0), 1)
    layer = np.repeat((mask * 255).astype(np.uint8)[..., None], 4, axis=2)
    canvas = (round(96 * scale), round(128 * scale))
    matrix = compositing.similarity_matrix(np.full(2, -0.5), np.full(2, -0.5), scale, 0.0)
    still = np.zeros((*canvas, 2), np.float32) if bend else None
    warped = compositing.warp(layer, compositing.Placement(matrix, scale, still), canvas) / 255
    assert (warped[..., 0] == warped[..., 3]).all()
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    expected = cv2.resize(mask, canvas[::-1], interpolation=interpolation)
    inner = np.s_[3:-3, 3:-3]
    assert np.abs(warped[..., 3] - expected)[inner].max() < 0.14
    assert warped[..., 3][inner].sum() == pytest.approx(expected[inner].sum(), rel=0.02)


def test_a_bend_moves_cables_smoothly():
    mask = np.zeros((96, 128), np.uint8)
    mask[44:52] = 255
    layer = np.repeat(mask[..., None], 4, axis=2)
    matrix = compositing.similarity_matrix(np.zeros(2), np.zeros(2), 1.0, 0.0)
    bend = compositing.draw_bend((96, 128), rng(2))
    assert np.abs(np.diff(bend, axis=0)).max() < 0.5 and np.abs(np.diff(bend, axis=1)).max() < 0.5
    bent = compositing.warp(layer, compositing.Placement(matrix, 1.0, bend), (96, 128))[..., 3]
    assert (bent != mask).mean() > 0.01
    assert bent.sum() == pytest.approx(float(mask.sum()), rel=0.35)


def test_beyond_its_photo_a_cable_ends_or_goes_on_mirrored():
    layer = np.full((40, 40, 4), 200, np.uint8)
    matrix = compositing.similarity_matrix(np.full(2, 19.5), np.full(2, 39.5), 1.0, 30.0)
    ends, mirrored = (
        compositing.warp(layer, compositing.Placement(matrix, 1.0, border=border), (80, 80))
        for border in (cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT_101)
    )
    assert ends[..., 3].sum() == pytest.approx(200 * 40 * 40, rel=0.01)
    assert ((ends > 30) & (ends < 170)).any()  # with a soft end
    assert (mirrored == 200).all()


def test_backgrounds_of_any_shape_are_cropped_to_the_canvas(tmp_path):
    write_backgrounds(tmp_path / "b", 1, size=(30, 200))
    image = files.read_image(tmp_path / "b" / "bg 0.jpg")
    for canvas in ((48, 64), (64, 10), (7, 7)):
        crops = [compositing.random_crop(image, canvas, rng(seed)) for seed in range(5)]
        assert all(crop.shape == (*canvas, 3) for crop in crops)
        assert len({crop.tobytes() for crop in crops}) == 5
