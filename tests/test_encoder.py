"""The accelerated encoders compute what the official ones compute, forward and backward."""

import copy

import pytest
import torch
from conftest import TINY_SIZE, randomize_batch_norm
from segment_anything.modeling.image_encoder import Attention, Block

from sam import encoder, variants

SIZES = [(48, 64), (64, 40), (64, 64), (30, 64)]


def random_images():
    """Padded images (B, 64, 64, 3) uint8 and their sizes (B, 2)."""
    sizes = torch.tensor(SIZES)
    shape = len(SIZES), TINY_SIZE, TINY_SIZE, 3
    noise = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    return noise * encoder.valid_pixels(sizes, TINY_SIZE)[:, 0, :, :, None], sizes


def random_attention(side, heads=3, head_dim=16, rel_pos=True):
    torch.manual_seed(0)
    layer = Attention(heads * head_dim, heads, use_rel_pos=rel_pos, input_size=(side, side)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # SAM initializes the position biases with zeros
    return layer


def tiny_vit(model_type="lite_medsam"):
    """A variant's TinyViT with random weights and random BatchNorm parameters and statistics."""
    torch.manual_seed(0)
    net = variants.VARIANTS[model_type].build().eval().image_encoder
    randomize_batch_norm(net)
    return net


def relative_error(ours, official):
    return ((ours - official).norm() / official.norm()).item()


# --- preprocess, encode, move_to_device ---


def test_mean_std_is_the_preprocessing_of_sam(tiny_sam, tiny_weights):
    images, sizes = random_images()
    ours = encoder.preprocess(images, sizes, "tiny")
    for i, (height, width) in enumerate(SIZES):
        official = tiny_sam.preprocess(images[i : i + 1, :height, :width].permute(0, 3, 1, 2).float())
        torch.testing.assert_close(ours[i : i + 1], official)


def test_valid_pixels_on_a_coarser_grid():
    valid = encoder.valid_pixels(torch.tensor([[9, 16], [1, 3]]), side=8, scale=0.5)
    assert valid.shape == (2, 1, 8, 8)
    rows, columns = valid[:, 0].any(dim=2).sum(dim=1), valid[:, 0].any(dim=1).sum(dim=1)
    assert rows.tolist() == [4, 1] and columns.tolist() == [8, 1]  # partly covered pixels are padding


def test_low_precision_applies_to_the_encoder_only(tiny_sam, tiny_weights):
    images, sizes = random_images()
    exact = encoder.encode(tiny_sam, images, sizes, "tiny")
    encoder.move_to_device(tiny_sam, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in tiny_sam.image_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tiny_sam.mask_decoder.parameters()} == {torch.float32}
    low = encoder.encode(tiny_sam, images, sizes, "tiny")
    assert low.dtype == torch.bfloat16
    assert torch.cosine_similarity(low.float(), exact, dim=1).min() > 0.99


@torch.no_grad()
def test_an_embedding_does_not_depend_on_its_batch(tiny_sam, tiny_weights):
    images, sizes = random_images()
    encoder.move_to_device(tiny_sam, torch.device("cpu"), None)
    together = encoder.encode(tiny_sam, images, sizes, "tiny")
    alone = encoder.encode(tiny_sam, images[2:3], sizes[2:3], "tiny")
    assert torch.equal(together[2:3], alone) and not torch.equal(together[1:2], alone)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_images_have_an_empty_embedding_and_the_encoder_does_not_run(tiny_sam, tiny_weights, dtype):
    images, sizes = random_images()
    encoder.move_to_device(tiny_sam, torch.device("cpu"), dtype)
    expected = encoder.encode(tiny_sam, images[:1], sizes[:1], "tiny")[:0]
    tiny_sam.image_encoder.register_forward_pre_hook(lambda *args: pytest.fail("the encoder ran"))
    empty = encoder.encode(tiny_sam, images[:0], sizes[:0], "tiny")
    assert empty.shape == expected.shape == (0, 32, 8, 8)
    assert empty.dtype == expected.dtype


@torch.no_grad()
def test_eager_encoding_does_not_use_the_compiled_encoder(tiny_sam, tiny_weights):
    images, sizes = random_images()
    expected = encoder.encode(tiny_sam, images, sizes, "tiny")
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph.forward(*args)

    tiny_sam.image_encoder.compile(backend=backend)
    eager = encoder.encode(tiny_sam, images, sizes, "tiny", eager=True)
    assert torch.equal(eager, expected) and not runs
    torch.testing.assert_close(encoder.encode(tiny_sam, images, sizes, "tiny"), expected)
    assert runs
    torch.compiler.reset()


# --- accelerate, forward ---


@pytest.mark.parametrize("grad", [False, True], ids=["sliced", "augmented"])  # the two ways to compute it
@pytest.mark.parametrize(("batch", "side"), [(2, 32), (6, 14)], ids=["global", "windowed"])
def test_attention_equals_the_official_layer(monkeypatch, grad, batch, side):
    monkeypatch.setattr(encoder, "MAX_SCORES", 300_000)  # several slices
    layer = random_attention(side)
    x = torch.randn(batch, side, side, 48)
    with torch.set_grad_enabled(grad):
        official = layer(x)
        assert relative_error(encoder.FusedAttention(layer)(x), official) < 1e-5
        layer.rel_pos_w.data.zero_()
        assert relative_error(layer(x), official) > 0.01  # the biases matter in this test


def test_vectors_filled_up_with_zeros_give_the_same_attention(monkeypatch):
    layer, x = random_attention(14), torch.randn(6, 14, 14, 48)  # vectors of 16 + 14 + 14 numbers
    lengths = []

    def record(q, *args, **options):
        lengths.append(q.shape[-1])
        return attention(q, *args, **options)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setitem(encoder.WIDTH_MULTIPLES, "cpu", 8)  # as on other devices
    assert relative_error(encoder.FusedAttention(layer)(x), layer(x)) < 1e-5
    assert lengths == [48]


@pytest.mark.parametrize("grad", [False, True], ids=["sliced", "augmented"])
def test_relative_positions_of_another_size_are_interpolated_as_officially(grad):
    layer = random_attention(8)
    x = torch.randn(2, 11, 11, 48)
    with torch.set_grad_enabled(grad):
        assert relative_error(encoder.FusedAttention(layer)(x), layer(x)) < 1e-5


@torch.no_grad()
def test_attention_without_relative_positions():
    layer = random_attention(8, rel_pos=False)
    x = torch.randn(2, 8, 8, 48)
    assert relative_error(encoder.FusedAttention(layer)(x), layer(x)) < 1e-5


@pytest.mark.parametrize("window", [0, 14])  # 20 is not a multiple of 14: the windows are padded
@torch.no_grad()
def test_accelerated_blocks_equal_the_official_ones_and_keep_their_parameters(window):
    torch.manual_seed(0)
    block = Block(48, 3, use_rel_pos=True, window_size=window, input_size=(20, 20)).eval()
    for parameter in block.attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 20, 20, 48)
    official, parameters = block(x), dict(block.named_parameters())
    encoder.accelerate(block)
    assert not any(isinstance(module, Attention) for module in block.modules())
    assert relative_error(block(x), official) < 1e-5
    accelerated = dict(block.named_parameters())
    assert list(accelerated) == list(parameters)
    assert all(accelerated[name] is parameters[name] for name in parameters)
    assert not any(module.training for module in block.modules())


@torch.no_grad()
def test_a_whole_vit_equals_the_official_one(tiny_sam):
    for name, parameter in tiny_sam.image_encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 3, 64, 64)
    official = tiny_sam.image_encoder(x)
    encoder.move_to_device(tiny_sam, torch.device("cpu"), None)
    assert relative_error(tiny_sam.image_encoder(x), official) < 1e-4


@pytest.mark.parametrize("fold", [True, False])
@torch.no_grad()
def test_tiny_vit_without_batch_norm_layers_equals_the_official_one(fold):
    official = tiny_vit()
    ours = copy.deepcopy(official)
    encoder.accelerate(ours, fold=fold)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in ours.modules()) != fold
    x = torch.rand(1, 3, 256, 256)
    assert relative_error(ours(x), official(x)) < 1e-4


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
def test_acceleration_keeps_device_and_dtype(fold, device, dtype):
    net = tiny_vit().patch_embed.to(device, dtype)
    encoder.accelerate(net, fold=fold)
    parameters = list(net.parameters())
    assert len(parameters) == (4 if fold else 6)
    assert {(p.device.type, p.dtype) for p in parameters} == {(device, dtype)}
    assert {p.requires_grad for p in parameters} == {not fold}


# --- accelerate, backward ---


def test_gradients_of_attention_equal_the_official_ones():
    layer = random_attention(14)
    x = torch.randn(2, 14, 14, 48, requires_grad=True)
    weight = torch.randn(2, 14, 14, 48)
    inputs = [x, *layer.parameters()]
    official = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    ours = torch.autograd.grad((encoder.FusedAttention(layer)(x) * weight).sum(), inputs)
    for a, b in zip(ours, official, strict=True):
        assert relative_error(a, b) < 1e-4


@torch.no_grad()
def test_the_strided_patch_embedding_of_mobile_sam_is_folded_exactly():
    official = tiny_vit("mobile_sam").patch_embed
    ours = copy.deepcopy(official)
    encoder.accelerate(ours)
    x = torch.randn(2, 3, 32, 48)
    assert ours(x).shape == (2, 64, 8, 12)
    assert relative_error(ours(x), official(x)) < 1e-5


@pytest.mark.parametrize("model_type", ["lite_medsam", "mobile_sam"])
def test_gradients_through_frozen_statistics_equal_the_official_ones(model_type):
    official = tiny_vit(model_type).patch_embed
    ours = copy.deepcopy(official)
    encoder.accelerate(ours, fold=False)
    assert list(ours.state_dict()) == list(official.state_dict())
    x = torch.randn(2, 3, 32, 32)
    outputs, gradients = [], []
    for net in (official, ours):
        outputs.append(net(x))
        weight = torch.linspace(-1, 1, outputs[-1].numel()).view_as(outputs[-1])
        gradients.append(torch.autograd.grad((outputs[-1] * weight).sum(), list(net.parameters())))
    assert relative_error(*outputs) < 1e-5
    assert len(gradients[0]) == 6
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*gradients, strict=True))
