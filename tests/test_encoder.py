"""The accelerated encoders compute what the official ones do."""

import copy

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, Block

import encoder
import model


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
    model.place(tiny_sam, torch.device("cpu"), None)
    assert relative_error(tiny_sam.image_encoder(x), official) < 1e-4


@torch.no_grad()
def test_tiny_vit_without_batch_norm_equals_the_official_one():
    torch.manual_seed(0)
    official = model.VARIANTS["lite_medsam"].build().eval().image_encoder
    for module in official.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    folded = copy.deepcopy(official)
    encoder.accelerate(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    x = torch.rand(1, 3, 256, 256)
    assert relative_error(folded(x), official(x)) < 1e-4
