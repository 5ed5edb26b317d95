"""Bring a fine-tuned checkpoint into other tools: Hugging Face transformers, or ONNX.

    python export.py --checkpoint exp/NAME/checkpoints/best.pth --format hf --output exported
    python export.py --checkpoint exp/NAME/checkpoints/best.pth --format onnx --output cables.onnx

(segment_anything's own tools take the checkpoint as it is.)
"""

import argparse
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

import inference
import runtime
from base import atomic
from base.errors import UserError
from sam import decoder, encoder

ONNX_OPSET = 18
ONNX_LIMIT = 2_000_000_000  # bytes of one file of protobuf


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bring a checkpoint into other tools.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights, of any --train")
    parser.add_argument(
        "--format", choices=["hf", "onnx"], required=True, help="a folder for transformers, or an ONNX file"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder or file, which must be new")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a failure, which leaves nothing behind."""
    runtime.init()
    args = parse_args(argv)
    try:
        if args.output.exists():
            raise UserError(f"--output {args.output}: is there already")
        sam, model_type = inference.load_any(args.checkpoint)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        {"hf": export_hf, "onnx": export_onnx}[args.format](sam, model_type, args.output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.output}")
    return 0


# --- Hugging Face -----------------------------------------------------------------------------

# Official names of weights, as patterns, and what transformers calls them.
HF_NAMES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
)


def export_hf(sam: Sam, model_type: str, output: Path) -> None:
    """Write a folder for `SamModel.from_pretrained` and `SamProcessor.from_pretrained`.

    Raises UserError for a variant that transformers has no model of.
    """
    if not isinstance(sam.image_encoder, ImageEncoderViT):
        raise UserError(f"--format hf: transformers has no model of {model_type}; --format onnx takes it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    hf = SamModel(SamConfig(**hf_config(sam)))
    hf.load_state_dict(hf_weights(sam.state_dict()), strict=True)
    side, grid = sam.image_encoder.img_size, decoder.mask_grid(sam)
    sides = {"size": {"longest_edge": side}, "mask_size": {"longest_edge": grid}}
    pads = {"pad_size": {"height": side, "width": side}, "mask_pad_size": {"height": grid, "width": grid}}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        whole = Path(folder) / output.name
        hf.save_pretrained(whole)
        SamProcessor(SamImageProcessor(**sides, **pads)).save_pretrained(whole)
        whole.rename(output)


def hf_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official `state_dict` under the names that transformers' SamModel has."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in HF_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    shared = renamed["prompt_encoder.shared_embedding.positional_embedding"]
    return renamed | {"shared_image_embedding.positional_embedding": shared}


def hf_config(sam: Sam) -> dict[str, dict]:
    """What transformers' SamConfig takes of a SAM with a ViT: its sizes."""
    net, prompts, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    patch = net.patch_embed.proj.kernel_size[0]
    windows = [block.window_size for block in net.blocks]
    attention = decoder.transformer.layers[0].self_attn
    shared = {"image_size": net.img_size, "patch_size": patch}
    vision = shared | {
        "hidden_size": net.patch_embed.proj.out_channels,
        "output_channels": net.neck[0].out_channels,
        "num_hidden_layers": len(windows),
        "num_attention_heads": net.blocks[0].attn.num_heads,
        "mlp_dim": net.blocks[0].mlp.lin1.out_features,
        "window_size": max(windows),
        "global_attn_indexes": [index for index, window in enumerate(windows) if window == 0],
        "num_pos_feats": prompts.embed_dim // 2,
    }
    prompt = shared | {
        "hidden_size": prompts.embed_dim,
        "mask_input_channels": prompts.mask_downscaling[3].out_channels,
        "image_embedding_size": prompts.image_embedding_size[0],
    }
    mask = {
        "hidden_size": decoder.transformer_dim,
        "mlp_dim": decoder.transformer.layers[0].mlp.lin1.out_features,
        "num_attention_heads": attention.num_heads,
        "iou_head_hidden_dim": decoder.iou_prediction_head.layers[0].out_features,
    }
    return {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": mask}


# --- ONNX -------------------------------------------------------------------------------------


class WithoutPrompt(nn.Module):
    """Encoder and decoder as one: pictures in, low-resolution logits out; see `decoder.decode`.

    `images` uint8 (B, S, S, 3), RGB, padded bottom and right, and `sizes` int64 (B, 2), (h, w) of the
    pictures in it, give logits float32 (B, 1, g, g).
    """

    def __init__(self, sam: Sam, model_type: str) -> None:
        super().__init__()
        self.sam, self.model_type = sam, model_type

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        embeddings = self.sam.image_encoder(encoder.preprocess(images, sizes, self.model_type))
        no_points = images.new_zeros(images.shape[0], 0, 2, dtype=torch.float32)
        no_labels = images.new_zeros(images.shape[0], 0, dtype=torch.int64)
        return decoder.decode(self.sam, embeddings, no_points, no_labels)[0]


def export_onnx(sam: Sam, model_type: str, output: Path) -> None:
    """Write one ONNX file that takes any number of pictures at once.

    Raises UserError if its weights are more than one file can hold.
    """
    if sum(weight.numel() for weight in sam.parameters()) * 4 > ONNX_LIMIT:
        raise UserError(f"--format onnx: {model_type} is more than the 2 GB that an ONNX file holds")
    side = sam.image_encoder.img_size
    if not isinstance(sam.image_encoder, ImageEncoderViT):  # whose fast attention depends on the batch
        encoder.accelerate(sam.image_encoder)
    for module in sam.image_encoder.modules():
        if hasattr(module, "input_resolution") and hasattr(module, "conv3"):
            module.register_forward_pre_hook(_as_picture)
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8), torch.full((2, 2), side)
    batch = torch.export.Dim("batch")
    shapes = {"images": {0: batch}, "sizes": {0: batch}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        whole = WithoutPrompt(sam, model_type).eval()
        program = torch.export.export(whole, example, dynamic_shapes=shapes, strict=False)
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=list(shapes),
            output_names=["logits"],
            verbose=False,
        )
    atomic.write_atomically(output, lambda file: file.write(onnx.model_proto.SerializeToString()))


def _as_picture(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Pixels (B, h w, C) as (B, C, h, w): of a row of them TinyViT's downsampling would fix the B."""
    (x,) = args
    return x.unflatten(1, module.input_resolution).permute(0, 3, 1, 2) if x.ndim == 3 else x


if __name__ == "__main__":
    sys.exit(main())
