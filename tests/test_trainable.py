"""What trains, what stays frozen, parameter groups, LoRA, checkpointing, and exported weights."""

import copy

import pytest
import torch
from conftest import build_tiny

from sam import decoder, encoder, trainable, variants


def small_model(name):
    """A SAM with a ViT or a TinyViT, and a normalized image for its encoder."""
    torch.manual_seed(0)
    if name == "vit":
        return build_tiny(), torch.rand(1, 3, 64, 64)
    return variants.VARIANTS["lite_medsam"].build().eval(), torch.rand(1, 3, 256, 256)


def prepare(sam, train, grad_checkpointing=False):
    encoder.move_to_device(sam, torch.device("cpu"), None, train=train)
    torch.manual_seed(1)  # of the adapters
    return trainable.prepare_training(
        sam,
        train=train,
        lr=1.0,
        encoder_lr=0.5,
        layer_decay=0.5,
        lora_rank=2,
        lora_alpha=4.0,
        grad_checkpointing=grad_checkpointing,
    )


def fill_adapters(net):
    """Adapters start as zero; give them an effect."""
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def decode_without_prompts(sam, embeddings):
    batch = len(embeddings)
    return decoder.decode(sam, embeddings, torch.zeros(batch, 0, 2), torch.zeros(batch, 0).long())


# --- what trains ---


def test_only_what_decoding_uses_is_trained(tiny_sam):
    parameters = trainable.freeze(tiny_sam)
    names = {name for name, parameter in tiny_sam.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("mask_decoder.") for name in names)
    logits, iou = decode_without_prompts(tiny_sam, torch.randn(2, 32, 8, 8))
    (logits.sum() + iou.sum()).backward()
    assert len(parameters) == len(names)
    assert all(parameter.grad is not None for parameter in parameters)
    assert not any(module.training for module in tiny_sam.modules())


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@pytest.mark.parametrize("train", ["lora", "encoder"])
def test_all_that_trains_has_a_gradient_and_a_group_and_statistics_stay(name, train):
    sam, x = small_model(name)
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


def test_the_classifier_of_mobile_sam_is_not_used_and_never_trains():
    sam = variants.VARIANTS["mobile_sam"].build().eval()
    prepare(sam, "encoder")
    frozen = {key for key, p in sam.image_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"norm_head.weight", "norm_head.bias", "head.weight", "head.bias"}
    sam.image_encoder(torch.rand(1, 3, 1024, 1024)).square().mean().backward()
    assert {key for key, p in sam.image_encoder.named_parameters() if p.grad is None} == frozen


def test_learning_rates_decay_with_every_block_from_the_output(tiny_sam):
    groups = prepare(tiny_sam, "encoder")
    rate = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    rates = {key: rate[id(p)] for key, p in tiny_sam.named_parameters() if p.requires_grad}
    assert rates["mask_decoder.iou_token.weight"] == 1.0
    assert rates["image_encoder.neck.2.weight"] == 0.5
    assert rates["image_encoder.blocks.1.attn.qkv.weight"] == 0.25
    assert rates["image_encoder.blocks.0.norm1.bias"] == 0.125
    assert rates["image_encoder.patch_embed.proj.weight"] == rates["image_encoder.pos_embed"] == 0.125


def test_depths_of_tiny_vit_fall_from_input_to_output():
    sam, _ = small_model("tiny_vit")
    prepare(sam, "encoder")
    net = sam.image_encoder
    by_id = {id(p): depth for depth, p in trainable.layer_depths(net)}
    depths = {name: by_id[id(p)] for name, p in net.named_parameters()}
    assert len(trainable.blocks(net)) == 12
    assert list(depths.values()) == sorted(depths.values(), reverse=True)
    assert set(depths.values()) == set(range(13))
    assert depths["patch_embed.seq.0.c.weight"] == depths["layers.0.blocks.0.conv1.c.weight"] == 12
    assert depths["layers.0.downsample.conv1.c.weight"] == depths["layers.0.blocks.1.conv1.c.weight"] == 11


# --- replaced modules ---


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@pytest.mark.parametrize("train", ["decoder", "lora", "encoder"])
def test_no_module_has_a_patched_forward(name, train):
    sam, _ = small_model(name)
    prepare(sam, train, grad_checkpointing=True)
    assert not any("forward" in vars(module) for module in sam.modules())


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@pytest.mark.parametrize("train", ["lora", "encoder"])
def test_checkpointing_runs_blocks_again_for_the_same_gradients_under_the_same_names(name, train):
    results, runs = [], []
    for grad_checkpointing in (False, True):
        sam, x = small_model(name)
        prepare(sam, train, grad_checkpointing)
        fill_adapters(sam.image_encoder)
        blocks = trainable.blocks(sam.image_encoder)
        runs.clear()
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *args, number=number: runs.append(number))
        out = sam.image_encoder(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        forward, again = runs[: len(blocks)], runs[len(blocks) :]
        assert forward == list(range(len(blocks)))
        learning = [i for i in forward if any(p.requires_grad for p in blocks[i].parameters())]
        assert again == (learning[::-1] if grad_checkpointing else []) and len(learning) > 1
        results.append((out, trainable.gradients(sam), list(sam.state_dict())))
    (out, gradients, keys), (checkpointed_out, checkpointed, checkpointed_keys) = results
    assert keys == checkpointed_keys and list(gradients) == list(checkpointed)
    assert torch.equal(out, checkpointed_out)
    assert all(torch.equal(gradients[key], checkpointed[key]) for key in gradients)
    assert any(gradient.any() for key, gradient in gradients.items() if "image_encoder" in key)


# --- adapters ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_keep_no_float32_copy_of_an_input_and_train_in_float32(dtype):
    sam, x = small_model("vit")
    encoder.move_to_device(sam, torch.device("cpu"), dtype, train="lora")
    trainable.add_lora(sam.image_encoder, rank=2, alpha=4.0)
    fill_adapters(sam.image_encoder)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = sam.image_encoder(x.to(dtype))
    # The inputs have 48 channels, or 192 inside the MLP.
    inputs = [t for t in kept if t.shape[-1] in (48, 192) and not isinstance(t, torch.nn.Parameter)]
    assert {t.shape[-1] for t in inputs} == {48, 192}
    assert {t.dtype for t in inputs} == {dtype}
    out.float().square().mean().backward()
    trained = [p for p in sam.image_encoder.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in trained)


def test_adapters_compute_in_float32_what_peft_computes():
    from peft import LoraConfig, inject_adapter_in_model

    sam, x = small_model("vit")
    ours, theirs = sam.image_encoder, copy.deepcopy(sam.image_encoder)
    trainable.add_lora(ours, rank=2, alpha=4.0)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4.0, target_modules=trainable.LORA_TARGETS), theirs)
    fill_adapters(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for net in (ours, theirs):
        out = net(x)
        out.square().mean().backward()
        results.append((out, [p.grad for name, p in net.named_parameters() if ".lora_" in name]))
    (out, gradients), (peft_out, peft_gradients) = results
    assert torch.equal(out, peft_out)
    assert len(gradients) == 16
    assert all(map(torch.equal, gradients, peft_gradients))


# --- saved and exported weights ---


@pytest.mark.parametrize("name", ["vit", "tiny_vit"])
@torch.no_grad()
def test_merged_adapters_compute_the_same_under_official_keys(name):
    sam, x = small_model(name)
    fresh = copy.deepcopy(sam)
    initial = {key: value.clone() for key, value in sam.state_dict().items()}
    prepare(sam, "lora")
    before = sam.image_encoder(x)
    fill_adapters(sam.image_encoder)
    adapted = sam.image_encoder(x)
    exported = trainable.export_state_dict(sam, initial)
    fresh.load_state_dict(exported, strict=True)
    fresh.eval()
    change = (adapted - before).norm()
    assert change > 0.01 * before.norm()
    assert (fresh.image_encoder(x) - adapted).norm() < 0.01 * change
    changed = {key for key in initial if not torch.equal(exported[key], initial[key])}
    deltas = trainable.lora_deltas(sam.image_encoder)
    assert changed == {f"image_encoder.{key}" for key in deltas} and changed


@pytest.mark.parametrize("train", ["decoder", "lora", "encoder"])
def test_weights_and_gradients_are_restored(tiny_sam, train):
    twin = copy.deepcopy(tiny_sam)
    prepare(tiny_sam, train)
    with torch.no_grad():
        for parameter in tiny_sam.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    embeddings = tiny_sam.image_encoder(torch.rand(1, 3, 64, 64))
    sum(out.sum() for out in decode_without_prompts(tiny_sam, embeddings)).backward()
    saved_weights, saved_gradients = trainable.trained_weights(tiny_sam), trainable.gradients(tiny_sam)
    prepare(twin, train)
    trainable.load_trained_weights(twin, saved_weights)
    trainable.load_gradients(twin, saved_gradients)
    for (key, ours), twins in zip(tiny_sam.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, twins), key
        assert (twins.grad is not None) == ours.requires_grad, key
    assert all(torch.equal(value, saved_gradients[key]) for key, value in trainable.gradients(twin).items())
    assert any(gradient.any() for gradient in saved_gradients.values())
    tiny_sam.zero_grad()
    assert not any(gradient.any() for gradient in trainable.gradients(tiny_sam).values())
