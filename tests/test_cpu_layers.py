"""The layers for CPUs compute what the official ones compute, forward and backward."""

import copy

import pytest
import torch

from sam import cpu_layers, encoder, variants
from sam.cpu_layers import ChannelNorm, WindowAttention


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    """Parts of two windows: five windows are no multiple of that."""
    monkeypatch.setattr(cpu_layers, "MAX_SCORES", 2 * 4 * 49 * 49)


@pytest.fixture(scope="module")
def tiny_vit():
    torch.manual_seed(0)
    return variants.VARIANTS["lite_medsam"].build().image_encoder


@pytest.fixture
def official(tiny_vit):
    """An attention layer (128 channels, 4 heads, windows of 7 x 7) with large biases, in training mode."""
    layer = copy.deepcopy(tiny_vit.layers[1].blocks[0].attn)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.attention_biases, std=2)
    torch.nn.init.normal_(layer.qkv.weight, std=0.2)
    layer.train()  # in eval mode, it would use a copy of its biases that was made before
    return layer


def relative_error(ours, official):
    return ((ours - official).norm() / official.norm()).item()


def test_output_and_gradients_equal_the_official_ones(official):
    ours = WindowAttention(official)
    x, weight = torch.randn(2, 5, 49, 128).unbind()
    inputs = [x.requires_grad_(), *official.parameters()]
    outputs = [layer(x) for layer in (ours, official)]
    assert relative_error(*outputs) < 1e-6
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in outputs]
    assert len(inputs) == 8
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        assert torch.equal(ours(x), outputs[0])
        official.attention_biases.zero_()
        assert relative_error(ours(x), outputs[0]) > 0.1  # the biases matter in this test


def test_gradients_are_exact_in_float64():
    qkv = torch.randn(3, 4, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cpu_layers._Attend.apply, (qkv, bias))


def test_bfloat16_is_as_exact_as_the_official_layer(official):
    ours = WindowAttention(official)
    x, weight = torch.randn(2, 5, 49, 128).unbind()
    inputs = [x.requires_grad_(), official.attention_biases, official.qkv.weight]

    def output_and_gradients(layer, low_precision):
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            output = layer(x)
        return [output.float(), *torch.autograd.grad((output * weight).sum(), inputs)]

    exact = output_and_gradients(official, False)
    errors = [
        [relative_error(a, b) for a, b in zip(output_and_gradients(layer, True), exact, strict=True)]
        for layer in (ours, official)
    ]
    assert all(ours < 1.2 * official < 0.05 for ours, official in zip(*errors, strict=True)), errors


def test_the_gradient_of_the_input_is_right_with_frozen_biases(official):
    official.requires_grad_(False)
    x = torch.randn(5, 49, 128, requires_grad=True)
    expected = torch.autograd.grad(official(x).square().sum(), x)[0]
    actual = torch.autograd.grad(WindowAttention(official)(x).square().sum(), x)[0]
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(("device", "replaced"), [("cpu", True), ("meta", False)])
def test_attention_is_replaced_on_a_cpu_only(device, replaced):
    sam = variants.VARIANTS["lite_medsam"].build()
    names = list(sam.state_dict())
    encoder.move_to_device(sam, torch.device(device), None, train="encoder")
    attentions = [module.attn for module in sam.image_encoder.modules() if hasattr(module, "attn")]
    assert [isinstance(attention, WindowAttention) for attention in attentions] == [replaced] * 10
    assert list(sam.state_dict()) == names


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_the_depthwise_convolution_are_exact(stride):
    shapes = (2, 3, 8, 6), (3, 1, 3, 3), (3,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *args: cpu_layers.depthwise_conv(*args, stride), inputs)
    expected = torch.nn.functional.conv2d(*inputs, stride, padding=1, groups=3)
    assert torch.equal(cpu_layers.depthwise_conv(*inputs, stride), expected)


def test_channel_norm_equals_the_official_one(tiny_vit):
    official = copy.deepcopy(tiny_vit.neck[1])
    for parameter in official.parameters():
        torch.nn.init.normal_(parameter)
    ours = ChannelNorm(official)
    x, weight = torch.randn(2, 2, 256, 3, 5).unbind()
    inputs = [x.requires_grad_(), official.weight, official.bias]
    outputs = [layer(x) for layer in (ours, official)]
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in outputs]
    assert relative_error(*outputs) < 1e-6
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_frozen_encoder_with_fused_gelu_equals_the_official_one(tiny_vit, dtype):
    official = copy.deepcopy(tiny_vit).to(dtype).to(memory_format=torch.channels_last).eval()
    ours = copy.deepcopy(official)
    encoder.accelerate(ours)
    cpu_layers.fuse_gelu(ours, dtype)
    fused = [module for module in ours.modules() if isinstance(module, cpu_layers.LayerWithGelu)]
    assert len(fused) == 2 * 2 + 3 * 2 + 10  # MBConv, PatchMerging, Mlp
    x = torch.rand(1, 3, 256, 256, dtype=dtype).to(memory_format=torch.channels_last)
    assert relative_error(ours(x), official(x)) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(("train", "n_fused"), [("decoder", 20), ("lora", 0), ("encoder", 0)])
def test_gelu_is_fused_only_if_no_gradient_passes(train, n_fused):
    sam = variants.VARIANTS["lite_medsam"].build().eval()
    encoder.move_to_device(sam, torch.device("cpu"), None, train=train)
    fused = [m for m in sam.image_encoder.modules() if isinstance(m, cpu_layers.LayerWithGelu)]
    assert len(fused) == n_fused


def test_gelu_is_not_fused_in_a_precision_that_the_processor_lacks(tiny_vit):
    net = copy.deepcopy(tiny_vit)
    cpu_layers.fuse_gelu(net, torch.float16)
    assert not any(isinstance(module, cpu_layers.LayerWithGelu) for module in net.modules())


def test_norms_add_up_their_gradients_in_float32_under_autocast():
    norm = torch.nn.LayerNorm(64)
    pixels = torch.randn(1, 16384, 64, generator=torch.manual_seed(0)).bfloat16()
    weights = torch.rand(pixels.shape, generator=torch.manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        output = cpu_layers.TokenNorm(norm)(pixels)
    ours = torch.autograd.grad((output * weights).sum(), norm.parameters())
    exact = torch.autograd.grad((norm(pixels.float()) * weights).sum(), norm.parameters())
    for gradient, expected in zip(ours, exact, strict=True):
        assert (gradient - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("train", ["decoder", "encoder"])
def test_no_norm_of_an_encoder_keeps_the_gradients_of_low_precision(train):
    sam = variants.VARIANTS["lite_medsam"].build()
    names = list(sam.state_dict())
    encoder.move_to_device(sam, torch.device("cpu"), torch.bfloat16, train=train)
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in sam.image_encoder.modules())
    assert train == "decoder" or list(sam.state_dict()) == names
