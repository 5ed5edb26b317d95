"""What trains: freezing, adapters, parameter groups, merged weights."""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def freeze(sam: Sam) -> list[nn.Parameter]:
    """Freeze all but the mask decoder, and return the decoder's trainable parameters.

    Decoding computes mask token 0 alone (`multimask_output=False`), so the other tokens' output
    heads would never see a gradient: they stay frozen too, as they were loaded. The whole model
    stays in eval mode: nothing in SAM's decoder differs in training mode, and the encoder's
    BatchNorm statistics must not move.
    """
    sam.eval()
    sam.requires_grad_(False)
    sam.mask_decoder.requires_grad_(True)
    sam.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)
    return [parameter for parameter in sam.parameters() if parameter.requires_grad]


def prepare_training(
    sam: Sam,
    *,
    train: str,
    lr: float,
    encoder_lr: float,
    layer_decay: float,
    lora_rank: int,
    lora_alpha: float,
    grad_checkpointing: bool,
) -> list[dict]:
    """Make what `train` names trainable in a placed model; returns the optimizer's parameter groups.

    "decoder": the mask decoder at `lr`. "lora": also adapters on the encoder's projections, at
    `encoder_lr`. "encoder": also all of the encoder, at `encoder_lr` in its neck and `layer_decay`
    times that with every block before it. Each group has its `params` and its maximum rate `peak_lr`.
    """
    groups = [{"params": freeze(sam), "peak_lr": lr}]
    net = sam.image_encoder
    if train == "lora":
        add_lora(net, rank=lora_rank, alpha=lora_alpha)
        adapters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        groups.append({"params": adapters, "peak_lr": encoder_lr})
    elif train == "encoder":
        unfreeze(net)
        levels = {}
        for depth, parameter in by_depth(net):
            levels.setdefault(depth, []).append(parameter)
        for depth, parameters in levels.items():
            groups.append({"params": parameters, "peak_lr": encoder_lr * layer_decay**depth})
    if grad_checkpointing and train != "decoder":
        checkpoint_blocks(net)
    return groups


def trained_weights(sam: Sam) -> dict[str, Tensor]:
    """What trains, by its name in the model: all that a resumed run needs beside the loaded weights."""
    return {name: p.detach() for name, p in sam.named_parameters() if p.requires_grad}


def gradients(sam: Sam) -> dict[str, Tensor]:
    """Copies of the gradients accumulated so far (0 where there are none), by the names of their weights."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in sam.named_parameters()
        if p.requires_grad
    }


def load_gradients(sam: Sam, values: dict[str, Tensor]) -> None:
    """Set what `gradients` returned."""
    parameters = dict(sam.named_parameters())
    for name, gradient in values.items():
        parameters[name].grad = gradient.to(parameters[name].device)


def load_trained_weights(sam: Sam, weights: dict[str, Tensor]) -> None:
    """Set what `trained_weights` returned."""
    parameters = dict(sam.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def export_state_dict(sam: Sam, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official `state_dict`: what trained as it is now, adapters merged, the rest as it was loaded."""
    weights = dict(loaded)
    for name, delta in lora_deltas(sam.image_encoder).items():
        merged = loaded[f"image_encoder.{name}"].float() + delta.cpu()
        weights[f"image_encoder.{name}"] = merged.to(loaded[f"image_encoder.{name}"].dtype)
    return weights | {name: weight for name, weight in trained_weights(sam).items() if name in loaded}


# --- Encoders ----------------------------------------------------------------------------------

# Attention and MLP projections of SAM's ViT and of TinyViT.
PROJECTIONS = r".*(attn\.(qkv|proj)|mlp\.(lin1|lin2|fc1|fc2))"


def add_lora(encoder: nn.Module, *, rank: int, alpha: float) -> None:
    """Add trainable low-rank adapters to the projections (Hu et al., LoRA, ICLR 2022), in float32."""
    with warnings.catch_warnings():  # of bitsandbytes and other packages that are not there
        warnings.simplefilter("ignore")
        from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=PROJECTIONS), encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_deltas(encoder: nn.Module) -> dict[str, Tensor]:
    """What the adapters add to the official weights, by their names inside the encoder."""
    return {
        f"{name}.weight": module.get_delta_weight("default").detach()
        for name, module in encoder.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def unfreeze(encoder: nn.Module) -> None:
    """Let all weights train; BatchNorm keeps its statistics, since the encoder stays in eval mode."""
    encoder.requires_grad_(True)
    for module in encoder.modules():
        if hasattr(module, "attention_bias_idxs"):
            # In eval mode TinyViT's attention uses biases cached when they were loaded.
            module.train()


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Keep only the inputs of the blocks for the backward pass, which computes the rest again."""
    for block in blocks(encoder):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT or a TinyViT, in order."""
    if hasattr(encoder, "blocks"):
        return list(encoder.blocks)
    return [block for layer in encoder.layers for block in layer.blocks]


def by_depth(encoder: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """The trainable parameters with their distance from the output: 0 for the neck, 1 for the last block.

    What stands before a block, such as an embedding or a downsampling, counts as part of it.
    """
    order = blocks(encoder)
    depth = {id(p): len(order) - i for i, block in enumerate(order) for p in block.parameters()}
    neck = {id(p) for p in encoder.neck.parameters()}
    current = len(order)
    for parameter in encoder.parameters():  # in the order of the forward pass, but for the position's
        current = 0 if id(parameter) in neck else depth.get(id(parameter), current)
        if parameter.requires_grad:
            yield current, parameter
