"""Exported models compute the logits of SAM in transformers and onnxruntime."""

import os
import re
import signal
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY, build_tiny
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import checkpoint
import export
import inference
from imaging.files import read_image
from sam import encoder, variants
from sidecar import Sidecar, write_sidecar


@pytest.fixture
def image_path(data):
    return data / "test/imgs/0.png"  # 64 x 48 pixels


def run(weights, output_format, output):
    return export.main(["--checkpoint", str(weights), "--format", output_format, "--output", str(output)])


def official_logits(sam, image, **prompt):
    """Low-resolution logits (1, g, g) of SamPredictor."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    with torch.no_grad():
        return predictor.predict(**prompt, multimask_output=False)[2]


def randomize(sam):
    """Add random values to all weights, so that a weight under a wrong name changes logits."""
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def random_weights(tiny_weights, tiny_sam):
    """A checkpoint of `tiny_sam` with random weights."""
    randomize(tiny_sam)
    checkpoint.save_weights(tiny_sam.state_dict(), tiny_weights)
    return tiny_weights


@pytest.fixture(scope="module")
def made_graph():
    """The graph of `random_weights`, which takes seconds to make."""
    torch.manual_seed(0)
    sam = build_tiny()
    randomize(sam)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.VARIANTS, "tiny", TINY)
        return export.to_onnx(sam, "tiny")


@pytest.fixture
def graph(made_graph, monkeypatch):
    """Exports of `random_weights` take the graph that is made already."""
    monkeypatch.setattr(export, "to_onnx", lambda sam, model_type: made_graph)


def check_reads_back(folder, state_dict):
    """The folder, and the file in it, are checkpoints for this tool."""
    for path in (folder, folder / "model.safetensors"):
        weights = checkpoint.load_weights(path)
        assert weights.keys() == state_dict.keys()
        assert all(torch.equal(weights[name], state_dict[name]) for name in weights)
    assert inference.load(folder, "cpu").threshold == -0.75
    assert checkpoint.file_digest(folder) == checkpoint.file_digest(folder / "model.safetensors")


def test_transformers_computes_the_same(random_weights, tiny_sam, image_path, tmp_path):
    from transformers import SamModel, SamProcessor

    write_sidecar(Sidecar(model_type="tiny", input_size=64, threshold=-0.75), random_weights)
    assert run(random_weights, "hf", tmp_path / "hf") == 0
    check_reads_back(tmp_path / "hf", tiny_sam.state_dict())
    net, processor = (kind.from_pretrained(tmp_path / "hf") for kind in (SamModel, SamProcessor))
    with Image.open(image_path) as file:
        inputs = processor(images=file.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        outputs = net.eval()(**inputs, multimask_output=False)
    official = official_logits(tiny_sam, read_image(image_path))
    assert np.ptp(official) > 0.5
    np.testing.assert_allclose(outputs.pred_masks[0, 0].numpy(), official, atol=1e-4)
    (masks,) = processor.image_processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    assert masks.shape[-2:] == (48, 64)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_transformers_computes_the_same_with_a_box(random_weights, tiny_sam, image_path, tmp_path):
    from transformers import SamModel, SamProcessor

    assert run(random_weights, "hf", tmp_path / "hf") == 0
    net, processor = (kind.from_pretrained(tmp_path / "hf") for kind in (SamModel, SamProcessor))
    image_u8, box = read_image(image_path), [5.0, 6.0, 40.0, 30.0]
    inputs = processor(images=image_u8.copy(), input_boxes=[[box]], return_tensors="pt")
    with torch.no_grad():
        outputs = net.eval()(**inputs, multimask_output=False)
    official = official_logits(tiny_sam, image_u8, box=np.array(box))
    np.testing.assert_allclose(outputs.pred_masks[0, 0].numpy(), official, atol=1e-4)


def test_onnx_computes_the_same_for_any_number_of_images(random_weights, graph, tiny_sam, data, tmp_path):
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
        official = official_logits(tiny_sam, images[number, :48])
        np.testing.assert_allclose(together[number], official, atol=1e-4)


def test_onnx_of_a_checkpoint_trained_with_boxes_gives_a_warning(random_weights, graph, tmp_path, capsys):
    for prompt, is_warned in (("box", True), ("point", True), ("mixed", False), ("none", False)):
        write_sidecar(Sidecar(model_type="tiny", input_size=64, prompt=prompt), random_weights)
        assert run(random_weights, "onnx", tmp_path / f"{prompt}.onnx") == 0
        assert (f"was trained with --prompt {prompt}, and the ONNX" in capsys.readouterr().err) == is_warned


def test_onnx_computes_the_same_for_lite_medsam(tmp_path):
    path = variants.pretrained_path("lite_medsam")
    assert run(path, "onnx", tmp_path / "lite.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "lite.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    sizes = np.array([[200, 256], [256, 256], [256, 100]])
    (logits,) = session.run(None, {"images": images, "sizes": sizes})
    sam, model_type = inference.load_any(path)
    encoder.accelerate(sam.image_encoder)
    with torch.no_grad():
        ours = export.WithoutPrompt(sam, model_type)(torch.from_numpy(images), torch.from_numpy(sizes))
    np.testing.assert_allclose(logits, ours.numpy(), atol=1e-3 * ours.abs().max())
    assert ((logits > 0) != (ours.numpy() > 0)).mean() < 1e-4


def test_the_example_of_the_documents_gives_the_mask_of_predict(
    random_weights, graph, image_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    image = cv2.resize(read_image(image_path), (203, 150), interpolation=cv2.INTER_NEAREST)
    Path("photos").mkdir()
    Image.fromarray(image).save("photos/0.png")
    segment = inference.load(random_weights, "cpu", amp="off")
    threshold = float(np.quantile(next(segment.logits([image])), 0.7))
    sidecar = Sidecar(model_type="tiny", input_size=64, threshold=threshold, cable_width=4.5)
    write_sidecar(sidecar, random_weights)
    assert run(random_weights, "onnx", Path("cables.onnx")) == 0
    text = (Path(export.__file__).parent / "docs/export.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnx" in code]
    names = {}
    exec(example, names)
    expected = inference.load(random_weights, "cpu", tiles="off", amp="off")(image)
    assert 0.25 < expected.mean() < 0.35
    assert np.mean(names["mask"] != expected) < 1e-3
    check_description(names["session"], threshold)


def check_description(session, threshold):
    """Names of axes and metadata of an ONNX file."""
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes == {
        "images": ["batch", 64, 64, 3],
        "sizes": ["batch", 2],
        "logits": ["batch", 1, 32, 32],
    }
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata.items() >= {"model_type": "tiny", "input_size": "64", "color_order": "RGB"}.items()
    assert float(metadata["threshold"]) == threshold and float(metadata["cable_width"]) == 4.5
    assert "Pillow BILINEAR" in metadata["resize_filter"] and "part of the graph" in metadata["normalization"]


def test_weights_that_do_not_fit_in_one_file_go_to_a_second_one(
    random_weights, graph, tiny_sam, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    assert run(random_weights, "onnx", tmp_path / "new/cables.onnx") == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert sizes.keys() == {"cables.onnx", "cables.onnx.data"}
    n_weights = sum(weight.numel() for weight in tiny_sam.parameters())
    assert sizes["cables.onnx.data"] > 0.9 * 4 * n_weights
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "new/cables.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": image[None], "sizes": np.array([[64, 64]])})
    np.testing.assert_allclose(logits[0], official_logits(tiny_sam, image), atol=1e-4)


def test_only_vit_h_needs_a_second_file():
    """Its switch, without the memory of these models."""
    with torch.device("meta"):
        sizes = {
            name: 4 * sum(weight.numel() for weight in variants.VARIANTS[name].build().parameters())
            for name in ("vit_b", "vit_l", "vit_h")
        }
    assert [name for name, size in sizes.items() if size > export.ONNX_LIMIT] == ["vit_h"]


def test_the_mask_generator_takes_the_checkpoint(random_weights, tiny_sam, image_path):
    fresh = variants.VARIANTS["tiny"].build()
    fresh.load_state_dict(torch.load(random_weights, weights_only=True), strict=True)
    generator = SamAutomaticMaskGenerator(
        fresh, points_per_side=3, pred_iou_thresh=-1e9, stability_score_thresh=-1.0
    )
    masks = generator.generate(read_image(image_path))
    assert masks and all(mask["segmentation"].shape == (48, 64) for mask in masks)


@pytest.mark.parametrize(
    ("output_format", "fault", "message"),
    [
        ("hf", "lite_medsam", "transformers has no model of lite_medsam"),
        ("hf", "mobile_sam", "transformers has no model of mobile_sam; use --format onnx"),
        ("hf", "exists", "out already exists"),
        ("hf", "no folder", "cannot be created"),
        ("onnx", "missing", "checkpoint not found"),
        ("onnx", "data exists", "out.data already exists"),
    ],
)
def test_what_cannot_be_exported_ends_with_a_message(
    random_weights, tmp_path, capsys, output_format, fault, message
):
    output, weights = tmp_path / "out", random_weights
    if fault == "lite_medsam":
        weights = variants.pretrained_path("lite_medsam")
    elif fault == "mobile_sam":
        checkpoint.save_weights(variants.VARIANTS["mobile_sam"].build().state_dict(), weights)
    elif fault == "exists":
        output.mkdir()
    elif fault == "no folder":
        output = random_weights / "out"  # inside a file
    elif fault == "missing":
        weights = tmp_path / "none.pth"
    elif fault == "data exists":
        (tmp_path / "out.data").touch()
    before = set(tmp_path.rglob("*"))
    assert run(weights, output_format, output) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


def test_a_full_disk_ends_with_a_message_and_leaves_nothing(random_weights, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    output = tmp_path / "out"
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes of one file
    try:
        assert run(random_weights, "hf", output) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"{output}" in error and "could not be written" in error and "File too large" in error
    assert [path for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize("output_format", ["hf", "onnx"])
def test_a_folder_that_cannot_be_written_to_is_named_as_given(
    random_weights, graph, monkeypatch, capsys, output_format
):
    monkeypatch.setattr(export.os, "access", lambda folder, mode: True)  # as for root on some systems
    output = Path("/proc/self/cables")  # even root creates nothing there
    if not output.parent.is_dir():
        pytest.skip("this system has no /proc")
    assert run(random_weights, output_format, output) == 2
    error = capsys.readouterr().err
    assert f"--output {output}: could not be written" in error and ".cables" not in error


def test_a_folder_without_permission_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.os, "access", lambda folder, mode: False)
    assert run(tmp_path / "never read.pth", "onnx", tmp_path / "new/cables.onnx") == 2
    assert f"no permission to write to {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nowhere_is_not_replaced(random_weights, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert run(random_weights, "onnx", tmp_path / "out") == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(random_weights, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(export, "hf_config", lambda sam: os.kill(os.getpid(), number))
    assert run(random_weights, "hf", tmp_path / "new/out") == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}: nothing was written\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
def test_a_bug_shows_its_traceback(random_weights, tmp_path, monkeypatch, error):
    def fail(sam):
        raise error("a bug")

    monkeypatch.setattr(export, "hf_config", fail)
    with pytest.raises(error, match="a bug"):
        run(random_weights, "hf", tmp_path / "out")
