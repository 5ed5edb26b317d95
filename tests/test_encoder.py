"""The accelerated encoders compute what the official ones do, forward and backward."""

import copy

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, Block

from sam import encoder, trainable, variants


def random_attention(side, heads=3, head_dim=16, rel_pos=True):
    torch.manual_seed(0)
    layer = Attention(heads * head_dim, heads, use_rel_pos=rel_pos, input_size=(side, side)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the bias of positions is zero at first
    return layer


def relative_error(ours, official):
    return ((ours - official).norm() / official.norm()).item()


@pytest.mark.parametrize("attend", [encoder._in_slices, encoder._with_longer_vectors])
@pytest.mark.parametrize(("batch", "side"), [(2, 32), (6, 14)])  # global, windowed
@torch.no_grad()
def test_attention_equals_the_official_layer(monkeypatch, attend, batch, side):
    layer = random_attention(side)
    x = torch.randn(batch, side, side, 48)
    official = layer(x)
    monkeypatch.setattr(encoder, "_in_slices", attend)
    monkeypatch.setattr(encoder, "SCORES_AT_ONCE", 300_000)  # several slices
    assert relative_error(encoder.vit_attention(layer, x), official) < 1e-5
    layer.rel_pos_w.zero_()
    assert relative_error(layer(x), official) > 0.01  # the bias matters in this test


@torch.no_grad()
def test_attention_without_relative_positions():
    layer = random_attention(8, rel_pos=False)
    x = torch.randn(2, 8, 8, 48)
    assert relative_error(encoder.vit_attention(layer, x), layer(x)) < 1e-5


@pytest.mark.parametrize("window", [0, 14])  # 20 is no multiple of 14: padded windows
@torch.no_grad()
def test_blocks_equal_the_official_ones_and_keep_their_keys(window):
    torch.manual_seed(0)
    block = Block(48, 3, use_rel_pos=True, window_size=window, input_size=(20, 20)).eval()
    for parameter in block.attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 20, 20, 48)
    official = block(x)
    keys = list(block.state_dict())
    encoder.accelerate(block)
    assert block.attn.forward.__func__ is encoder.vit_attention
    assert relative_error(block(x), official) < 1e-5
    assert list(block.state_dict()) == keys


@torch.no_grad()
def test_a_whole_vit_equals_the_official_one(tiny_sam):
    for name, parameter in tiny_sam.image_encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 3, 64, 64)
    official = tiny_sam.image_encoder(x)
    encoder.move_to_device(tiny_sam, torch.device("cpu"), None)
    assert relative_error(tiny_sam.image_encoder(x), official) < 1e-4


@torch.no_grad()
def test_tiny_vit_without_batch_norm_equals_the_official_one():
    torch.manual_seed(0)
    official = variants.VARIANTS["lite_medsam"].build().eval().image_encoder
    for module in official.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    folded = copy.deepcopy(official)
    encoder.accelerate(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    x = torch.rand(1, 3, 256, 256)
    assert relative_error(folded(x), official(x)) < 1e-4


# --- training ---


def test_gradients_of_attention_equal_the_official_ones():
    layer = random_attention(14)
    x = torch.randn(2, 14, 14, 48, requires_grad=True)
    weight = torch.randn(2, 14, 14, 48)
    inputs = [x, *layer.parameters()]
    official = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    ours = torch.autograd.grad((encoder.vit_attention(layer, x) * weight).sum(), inputs)
    for a, b in zip(ours, official, strict=True):
        assert relative_error(a, b) < 1e-4


def test_gradients_through_frozen_statistics_equal_the_official_ones():
    torch.manual_seed(0)
    official = variants.VARIANTS["lite_medsam"].build().eval().image_encoder.patch_embed
    for module in official.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_(0.5, 0.3)
            module.running_var.uniform_(0.5, 2)
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


def small_encoder(name, tiny_sam):
    """A ViT or TinyViT that `encoder.move_to_device` made ready to train, and a picture."""
    torch.manual_seed(0)
    if name == "vit":
        return tiny_sam, torch.rand(1, 3, 64, 64)
    return variants.VARIANTS["lite_medsam"].build().eval(), torch.rand(1, 3, 256, 256)


def prepare(sam, train, **options):
    encoder.move_to_device(sam, torch.device("cpu"), None, train=train)
    settings = {"lr": 1.0, "encoder_lr": 0.5, "layer_decay": 0.5, "lora_rank": 2, "lora_alpha": 4.0}
    return trainable.prepare_training(
        sam, train=train, **{"grad_checkpointing": False, **settings, **options}
    )


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@pytest.mark.parametrize("train", ["lora", "encoder"])
def test_all_that_trains_has_a_gradient_and_a_group_and_nothing_else_moves(tiny_sam, name, train):
    sam, x = small_encoder(name, tiny_sam)
    groups = prepare(sam, train)
    net = sam.image_encoder
    statistics = {key: value.clone() for key, value in net.named_buffers() if "running" in key}
    net(x).square().mean().backward()
    trained = {key for key, p in net.named_parameters() if p.requires_grad}
    assert {key for key, p in net.named_parameters() if p.grad is not None} == trained
    assert all((".lora_" in key) == (train == "lora") for key in trained)
    in_groups = [id(p) for group in groups[1:] for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert all(torch.equal(value, dict(net.named_buffers())[key]) for key, value in statistics.items())
    assert bool(statistics) == (name == "tiny_vit" and train == "encoder")


def test_rates_fall_with_every_block_from_the_output(tiny_sam):
    groups = prepare(tiny_sam, "encoder")
    rate = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    rates = {key: rate[id(p)] for key, p in tiny_sam.named_parameters() if p.requires_grad}
    assert rates["mask_decoder.iou_token.weight"] == 1.0
    assert rates["image_encoder.neck.2.weight"] == 0.5
    assert rates["image_encoder.blocks.1.attn.qkv.weight"] == 0.25
    assert rates["image_encoder.blocks.0.norm1.bias"] == 0.125
    assert rates["image_encoder.patch_embed.proj.weight"] == rates["image_encoder.pos_embed"] == 0.125
    lite = variants.VARIANTS["lite_medsam"].build().eval()
    prepare(lite, "encoder")
    depths = [depth for depth, _ in trainable.by_depth(lite.image_encoder)]
    assert depths == sorted(depths, reverse=True) and set(depths) == set(range(13))


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@torch.no_grad()
def test_merged_adapters_compute_the_same_under_official_keys(tiny_sam, name):
    sam, x = small_encoder(name, tiny_sam)
    fresh = copy.deepcopy(sam)
    loaded = {key: value.clone() for key, value in sam.state_dict().items()}
    prepare(sam, "lora")
    before = sam.image_encoder(x)
    for key, parameter in sam.image_encoder.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted = sam.image_encoder(x)
    fresh.load_state_dict(trainable.export_state_dict(sam, loaded), strict=True)
    fresh.eval()
    assert relative_error(before, adapted) > 0.01
    assert relative_error(fresh.image_encoder(x), adapted) < 1e-4


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@pytest.mark.parametrize("train", ["lora", "encoder"])
def test_checkpointing_computes_the_same_gradients(tiny_sam, name, train):
    gradients = []
    for grad_checkpointing in (False, True):
        sam, x = small_encoder(name, copy.deepcopy(tiny_sam))
        torch.manual_seed(1)  # of the adapters
        prepare(sam, train, grad_checkpointing=grad_checkpointing)
        out = sam.image_encoder(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients.append([p.grad for p in sam.image_encoder.parameters() if p.requires_grad])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*gradients, strict=True) if b.any())
