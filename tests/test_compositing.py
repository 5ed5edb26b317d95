"""Cutting out, pasting and transforming cables; the samples made of them."""

import cv2
import numpy as np
import pytest
from conftest import draw_cable, rng, write_backgrounds, write_dataset
from PIL import Image

from imaging import compositing, files, masks, pairing


def files_in(data, name="cables"):
    """The pairs of a dataset and the backgrounds beside it."""
    pairs, faults = pairing.find_pairs(data / name)
    assert not faults
    return pairs, files.image_files(data / "backgrounds")


def with_mask(image, mask):
    return np.dstack([image, (np.asarray(mask, np.float32) * 255).astype(np.uint8)])


def test_cut_out_leaves_no_trace_of_the_old_background():
    mask = draw_cable(rng(), (60, 80), 6)
    photo = np.where(mask[..., None], (200, 30, 30), (0, 255, 0)).astype(np.uint8)
    photo = with_mask(cv2.GaussianBlur(photo, (0, 0), 0.8), mask)  # as a camera mixes the edge
    cut_out = compositing.cut_out(photo)
    own_colors = np.dstack([photo[..., :3], cut_out[..., 3]])

    def greenest(cables):
        image = np.zeros((60, 80, 3), np.uint8)
        compositing.paste(cables, image, np.zeros((60, 80), np.float32))
        return image[..., 1].max()

    assert greenest(own_colors) > 70
    assert greenest(cut_out) < 40


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


def test_an_augmented_photo_sample_keeps_image_and_mask_together(data):
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


def test_at_least_a_quarter_of_the_cable_stays_in_the_frame():
    corner = np.zeros((48, 64, 4), np.uint8)
    corner[1:9, 1:9, 3] = 255  # far off center: most shifts would lose it
    for seed in range(200):
        moved = compositing.random_affine(corner, (48, 64), rng(seed))[..., 3].sum() / 255
        assert moved > 0.2 * compositing.SCALE_RANGE[0] ** 2 * 64, seed
        assert moved < 1.1 * compositing.SCALE_RANGE[1] ** 2 * 64, seed


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7])
def test_warp_keeps_image_and_mask_together_and_their_center(scale):
    mask = cv2.GaussianBlur(draw_cable(rng(3), (96, 128), 9).astype(np.float32), (0, 0), 1)
    cut_out = np.repeat((mask * 255).astype(np.uint8)[..., None], 4, axis=2)
    canvas = (round(96 * scale), round(128 * scale))
    matrix = compositing.similarity_matrix(mask.shape, canvas, scale, 0.0, np.zeros(2))
    warped = compositing.warp(cut_out, matrix, canvas, scale) / 255
    inner = np.s_[3:-3, 3:-3]  # at the photo's rim the mask ends and colors go on
    assert np.abs(warped[..., 0] - warped[..., 3])[inner].max() < 0.03
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    expected = cv2.resize(mask, canvas[::-1], interpolation=interpolation)
    assert np.abs(warped[..., 3] - expected)[inner].max() < 0.12
    assert warped[..., 3][inner].sum() == pytest.approx(expected[inner].sum(), rel=0.02)


def test_where_a_cable_leaves_its_photo_its_end_is_soft_and_keeps_its_color():
    cut_out = np.full((40, 40, 4), 200, np.uint8)
    cut_out[..., 3] = 255
    matrix = compositing.similarity_matrix((40, 40), (80, 80), 1.0, 30.0, np.zeros(2))
    warped = compositing.warp(cut_out, matrix, (80, 80), 1.0)
    alpha = warped[..., 3]
    assert (warped[..., :3] == 200).all() and (cut_out[..., 3] == 255).all()
    assert ((alpha > 30) & (alpha < 220)).sum() > 50
    assert alpha.sum() / 255 == pytest.approx(38 * 38, rel=0.01)


def test_backgrounds_of_any_shape_are_cropped_to_the_canvas(tmp_path):
    write_backgrounds(tmp_path / "b", 1, size=(30, 200))
    image = files.read_image(tmp_path / "b" / "bg 0.jpg")
    for canvas in ((48, 64), (64, 10), (7, 7)):
        crops = [compositing.random_crop(image, canvas, rng(seed)) for seed in range(5)]
        assert all(crop.shape == (*canvas, 3) for crop in crops)
        assert len({crop.tobytes() for crop in crops}) == 5
