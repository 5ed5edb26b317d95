"""export.py: the same logits in transformers and onnxruntime, and the official tools on the checkpoint."""

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import checkpoint
import export
import inference
from imaging.files import read_image
from sam import encoder, variants


@pytest.fixture
def photo(data):
    return data / "test/imgs/0.png"  # 48 x 64


def run(weights, kind, output):
    return export.main(["--checkpoint", str(weights), "--format", kind, "--output", str(output)])


def our_logits(sam, image):
    """Low-resolution logits without prompts, by SamPredictor."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    with torch.no_grad():
        return predictor.predict(multimask_output=False)[2]


@pytest.fixture
def random_weights(tiny_weights, tiny_sam):
    """A checkpoint no weight of which is 0 or 1, so that each one that goes astray shows."""
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_sam.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    checkpoint.save_weights(tiny_sam.state_dict(), tiny_weights)
    return tiny_weights


def test_transformers_computes_the_same(random_weights, tiny_sam, photo, tmp_path):
    from transformers import SamModel, SamProcessor

    assert run(random_weights, "hf", tmp_path / "hf") == 0
    net, processor = (kind.from_pretrained(tmp_path / "hf") for kind in (SamModel, SamProcessor))
    with Image.open(photo) as file:
        inputs = processor(images=file.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        found = net.eval()(**inputs, multimask_output=False)
    official = our_logits(tiny_sam, read_image(photo))
    assert np.ptp(official) > 0.5
    np.testing.assert_allclose(found.pred_masks[0, 0].numpy(), official, atol=1e-4)
    (masks,) = processor.image_processor.post_process_masks(
        found.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    assert masks.shape[-2:] == (48, 64)
    # with prompts too
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(read_image(photo))
    box = [5.0, 6.0, 40.0, 30.0]
    with torch.no_grad():
        official = predictor.predict(box=np.array(box), multimask_output=False)[2]
        scaled = processor(images=read_image(photo).copy(), input_boxes=[[box]], return_tensors="pt")
        found = net(**scaled, multimask_output=False)
    np.testing.assert_allclose(found.pred_masks[0, 0].numpy(), official, atol=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_onnx_computes_the_same_for_any_number_of_pictures(random_weights, tiny_sam, data, tmp_path):
    assert run(random_weights, "onnx", tmp_path / "cables.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "cables.onnx", providers=["CPUExecutionProvider"])
    images = np.zeros((3, 64, 64, 3), np.uint8)
    for number in range(3):
        images[number, :48] = read_image(data / f"test/imgs/{number}.png")
    sizes = np.array([[48, 64]] * 3)
    (together,) = session.run(None, {"images": images, "sizes": sizes})
    (alone,) = session.run(None, {"images": images[1:2], "sizes": sizes[1:2]})
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    for number in range(3):
        official = our_logits(tiny_sam, images[number, :48])
        np.testing.assert_allclose(together[number], official, atol=1e-4)


def test_lite_medsam_becomes_onnx(tmp_path):
    path = variants.pretrained_path("lite_medsam")
    assert run(path, "onnx", tmp_path / "lite.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "lite.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    sizes = np.array([[200, 256], [256, 256], [256, 100]])
    (found,) = session.run(None, {"images": images, "sizes": sizes})
    sam, model_type = inference.load_any(path)
    encoder.accelerate(sam.image_encoder)
    with torch.no_grad():
        ours = export.WithoutPrompt(sam, model_type)(torch.from_numpy(images), torch.from_numpy(sizes))
    np.testing.assert_allclose(found, ours.numpy(), atol=1e-3 * ours.abs().max())
    assert ((found > 0) != (ours.numpy() > 0)).mean() < 1e-4


def test_the_mask_generator_takes_the_checkpoint(random_weights, tiny_sam, photo):
    fresh = variants.VARIANTS["tiny"].build()
    fresh.load_state_dict(torch.load(random_weights, weights_only=True), strict=True)
    generator = SamAutomaticMaskGenerator(
        fresh, points_per_side=3, pred_iou_thresh=-1e9, stability_score_thresh=-1.0
    )
    masks = generator.generate(read_image(photo))
    assert masks and all(mask["segmentation"].shape == (48, 64) for mask in masks)


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("hf", "lite_medsam", "transformers has no model of lite_medsam"),
        ("hf", "exists", "is there already"),
        ("onnx", "missing", "checkpoint not found"),
        ("onnx", "large", "more than the 2 GB"),
    ],
)
def test_what_cannot_be_exported_is_said(random_weights, tmp_path, monkeypatch, capsys, kind, fault, message):
    output, weights = tmp_path / "out", random_weights
    if fault == "lite_medsam":
        weights = variants.pretrained_path("lite_medsam")
    elif fault == "exists":
        output.mkdir()
    elif fault == "missing":
        weights = tmp_path / "none.pth"
    else:
        monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    assert run(weights, kind, output) == 2
    assert message in capsys.readouterr().err
    assert fault == "exists" or not output.exists()
