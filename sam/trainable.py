"""What trains: freezing, LoRA adapters, parameter groups, gradient checkpointing, exported weights.

"Encoder" means `sam.image_encoder`, a ViT of SAM or the TinyViT of LiteMedSAM and MobileSAM.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ParameterGroup(TypedDict):
    """A parameter group for a torch optimizer, with its peak learning rate."""

    params: list[nn.Parameter]
    peak_lr: float


def freeze(sam: Sam) -> list[nn.Parameter]:
    """Freeze everything but the mask decoder; returns the parameters of the decoder that train.

    Decoding computes mask token 0 only (`multimask_output=False`). The heads of the other tokens would
    never get a gradient, so they are frozen too. The whole model stays in eval mode: SAM's decoder has
    no layer that behaves differently in training mode, and the statistics of the encoder's BatchNorm must
    not change.
    """
    sam.eval()
    sam.requires_grad_(False)
    sam.mask_decoder.requires_grad_(True)
    sam.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)
    return _trainable_parameters(sam)


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
) -> list[ParameterGroup]:
    """Make trainable what `train` names, in a model that `encoder.move_to_device` has prepared.

    Args:
        train: "decoder": the mask decoder trains, at `lr`. "lora": adapters on the encoder's projections
            train too, at `encoder_lr`. "encoder": all of the encoder trains too, its neck at
            `encoder_lr`, and each block before it at `layer_decay` times the rate of the next block.
        grad_checkpointing: see `checkpoint_blocks`; has no effect when the encoder is frozen.

    Returns:
        Parameter groups; together they hold all parameters that train.
    """
    # Norms and biases decay too: over 1300 steps, weight decay changes a weight by less than 1 % (about
    # 0.5 * 1e-3 * 0.01 per step), and exempting them would change resumed runs.
    groups: list[ParameterGroup] = [{"params": freeze(sam), "peak_lr": lr}]
    encoder = sam.image_encoder
    if train == "lora":
        add_lora(encoder, rank=lora_rank, alpha=lora_alpha)
        groups.append({"params": _trainable_parameters(encoder), "peak_lr": encoder_lr})
    elif train == "encoder":
        unfreeze_encoder(encoder)
        by_depth: dict[int, list[nn.Parameter]] = {}
        for depth, parameter in layer_depths(encoder):
            by_depth.setdefault(depth, []).append(parameter)
        for depth, parameters in by_depth.items():
            groups.append({"params": parameters, "peak_lr": encoder_lr * layer_decay**depth})
    if grad_checkpointing and train != "decoder":
        checkpoint_blocks(encoder)
    return groups


def _trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# --- Saving and restoring what trains -----------------------------------------------------------


def trained_weights(sam: Sam) -> dict[str, Tensor]:
    """The parameters that train, by their names in the model (not copies).

    With the weights that the run started from, this is all that a resumed run needs of the model.
    """
    return {name: p.detach() for name, p in sam.named_parameters() if p.requires_grad}


def load_trained_weights(sam: Sam, weights: dict[str, Tensor]) -> None:
    """Copy weights that `trained_weights` returned into a model that is prepared in the same way."""
    parameters = dict(sam.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def gradients(sam: Sam) -> dict[str, Tensor]:
    """Copies of the accumulated gradients, by the names of their parameters; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in sam.named_parameters()
        if p.requires_grad
    }


def load_gradients(sam: Sam, values: dict[str, Tensor]) -> None:
    """Set the gradients to values that `gradients` returned, moved to the parameters' devices."""
    parameters = dict(sam.named_parameters())
    for name, gradient in values.items():
        parameters[name].grad = gradient.to(parameters[name].device)


def export_state_dict(sam: Sam, initial_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official `state_dict` of the model as it is now.

    Adapters are merged into the weights that they adapt. All weights that do not train are those of
    `initial_state_dict`, the official one that the model was loaded from (on the CPU).
    """
    weights = dict(initial_state_dict)
    for name, delta in lora_deltas(sam.image_encoder).items():
        initial = initial_state_dict[f"image_encoder.{name}"]
        weights[f"image_encoder.{name}"] = (initial.float() + delta).to(initial.dtype)
    trained = trained_weights(sam)  # among them adapters, which have no official name
    return weights | {name: weight for name, weight in trained.items() if name in initial_state_dict}


# --- Encoder ------------------------------------------------------------------------------------

# Projections of attention and MLP in SAM's ViT (lin1, lin2) and in TinyViT (fc1, fc2).
LORA_TARGETS = r".*(attn\.(qkv|proj)|mlp\.(lin1|lin2|fc1|fc2))"
# The classifier of MobileSAM's TinyViT: its weights are in every checkpoint, and nothing uses them.
UNUSED = ("norm_head", "head")


def add_lora(encoder: nn.Module, *, rank: int, alpha: float) -> None:
    """Freeze an encoder and add trainable low-rank adapters to its projections, in place.

    The weights of the adapters are float32 whatever the dtype of the encoder; their products have the dtype
    of the encoder. Source: Hu et al., LoRA, ICLR 2022.
    """
    with warnings.catch_warnings():  # peft warns about optional packages that are not installed
        warnings.simplefilter("ignore")
        from peft import LoraConfig, inject_adapter_in_model
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)  # type: ignore[arg-type]
    inject_adapter_in_model(config, encoder)
    encoder.requires_grad_(False)
    adapted: list[Any] = [m for m in encoder.modules() if hasattr(m, "get_delta_weight")]  # layers of peft
    for module in adapted:
        # peft would make a float32 copy of every input and keep it for the backward pass.
        module.cast_input_dtype_enabled = False
        for side in (module.lora_A, module.lora_B):
            side["default"] = Float32WeightLinear(side["default"])


class Float32WeightLinear(nn.Module):
    """A linear layer without bias whose weight is float32 and trains; it computes in the dtype of its input.

    Gradients of the weight are float32. With a float32 input, it computes what `nn.Linear` computes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the weight of a layer under the same name, in float32."""
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


def lora_deltas(encoder: nn.Module) -> dict[str, Tensor]:
    """What the adapters add to the official weights, by the official names inside the encoder; on the CPU."""
    deltas = {}
    for name, module in encoder.named_modules():
        if hasattr(module, "get_delta_weight"):  # it would compute on the device, which may round to TF32
            down, up = (side["default"].weight.detach().cpu() for side in (module.lora_A, module.lora_B))
            deltas[f"{name}.weight"] = up @ down * module.scaling["default"]
    return deltas


def unfreeze_encoder(encoder: nn.Module) -> None:
    """Make all parameters that an encoder uses trainable; its BatchNorm stays in eval mode."""
    encoder.requires_grad_(True)
    for name in UNUSED:
        if hasattr(encoder, name):
            encoder.get_submodule(name).requires_grad_(False)
    for module in encoder.modules():
        if hasattr(module, "attention_bias_idxs"):
            # In eval mode TinyViT's attention would use a copy of its biases, made when they were loaded.
            module.train()


class CheckpointedBlocks(nn.ModuleList):
    """A `ModuleList` of blocks that are checkpointed when its owner iterates over it to call them.

    Only iteration differs: it yields functions, not modules. Indices, `children()`, the names of
    parameters and the keys of the `state_dict` are those of the `ModuleList` in whose place it stands.
    """

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:  # type: ignore[override]
        return iter([partial(checkpoint, block, use_reentrant=False) for block in self.children()])


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Turn on gradient checkpointing, in place: the backward pass computes activations inside blocks again.

    It replaces each `ModuleList` of blocks by `CheckpointedBlocks`. The gradients stay the same; only
    the inputs of the blocks stay in memory between forward and backward pass.
    """
    for owner in _owners_of_blocks(encoder):
        owner.blocks = CheckpointedBlocks(owner.blocks.children())


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder, in the order of the forward pass."""
    return [block for owner in _owners_of_blocks(encoder) for block in owner.blocks.children()]


def _owners_of_blocks(encoder: Any) -> list[Any]:
    """The modules that have a list `blocks`: a ViT itself, or each layer of a TinyViT."""
    return [encoder] if hasattr(encoder, "blocks") else list(encoder.layers)


def layer_depths(encoder: Any) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield each trainable parameter of an encoder after its depth, counted from the output.

    The neck has depth 0, the last block 1, the first block `len(blocks(encoder))`. Other modules, such as
    an embedding or a downsampling, have the depth of the block that comes before them; what comes before
    all blocks has the depth of the first.
    """
    order = blocks(encoder)
    block_depths = {id(p): len(order) - i for i, block in enumerate(order) for p in block.parameters()}
    neck = {id(p) for p in encoder.neck.parameters()}
    depth = len(order)
    for parameter in encoder.parameters():  # in the order of the forward pass, apart from `pos_embed`
        depth = 0 if id(parameter) in neck else block_depths.get(id(parameter), depth)
        if parameter.requires_grad:
            yield depth, parameter
