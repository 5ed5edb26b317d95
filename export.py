"""Convert a fine-tuned checkpoint for other tools: Hugging Face transformers, or ONNX.

    python export.py --checkpoint exp/NAME/checkpoints/best.pth --format hf --output exported
    python export.py --checkpoint exp/NAME/checkpoints/best.pth --format onnx --output cables.onnx

The tools of segment_anything load the checkpoint without conversion.
"""

import argparse
import sys
from pathlib import Path

from base.flag_types import answer_first, path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a checkpoint for other tools.")
    parser.add_argument(
        "--checkpoint",
        type=path,
        required=True,
        help="a checkpoint of this tool or of another one; the model type is detected",
    )
    parser.add_argument(
        "--format",
        choices=["hf", "onnx"],
        required=True,
        help="hf: a folder for transformers; onnx: an ONNX file",
    )
    parser.add_argument(
        "--output", type=path, required=True, help="folder or file to write; it must not exist yet"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_first(parse_args, ("checkpoint",))

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

import inference
import runtime
from base.errors import UserError
from checkpoint import hf_name
from sam import decoder, encoder
from sidecar import Sidecar, read_sidecar, write_sidecar

MEMORY_HINT = "export on a machine with more memory"
ONNX_OPSET = 18
ONNX_LIMIT = 1_500_000_000  # bytes of weights in one file; protobuf allows 2 GiB, and vit_h has 2.5 GB


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns an exit code of docs/export.md. If it is not 0, no output is left."""
    runtime.init()
    args = parse_args(argv)
    try:
        with runtime.interrupt_on_signals():
            run(args.checkpoint, args.format, args.output)
    except runtime.Interrupted as signal:
        print(f"interrupted by {signal.name}: nothing was written", file=sys.stderr)
        return signal.exit_code
    except Exception as error:
        message = runtime.user_message(error, MEMORY_HINT)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"written: {args.output}")
    return 0


def run(checkpoint: Path, output_format: str, output: Path) -> None:
    """Write the converted checkpoint to `output`, a new folder ("hf") or a new file ("onnx").

    Raises:
        UserError: the checkpoint cannot be read or converted, `output` exists or cannot be written.
    """
    for target in (output, external_data_path(output)) if output_format == "onnx" else (output,):
        if os.path.lexists(target):
            raise UserError(f"--output {target} already exists: choose a new path, or remove it first")
    require_writable(output)
    sam, model_type = inference.load_any(checkpoint)
    sidecar = read_sidecar(checkpoint, model_type)
    if output_format == "hf":
        export_hf(sam, model_type, output, sidecar)
        return
    if sidecar and sidecar.prompt in ("point", "box"):
        print(
            f"warning: {checkpoint} was trained with --prompt {sidecar.prompt}, and the ONNX file takes no "
            "prompts: its masks may be bad; use predict.py --prompt or --format hf",
            file=sys.stderr,
        )
    export_onnx(sam, model_type, output, onnx_metadata(sam, model_type, sidecar))


def require_writable(output: Path) -> None:
    """Raise UserError unless `output` can be created, in a folder that exists or can be created itself."""
    folder = output.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--output {output}: its folder cannot be created, because {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: no permission to write to {folder}; choose another folder")


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `output` if the block raises nothing.

    Raises UserError, which names `output` and not the temporary path, if the files cannot be written.
    """
    from safetensors import SafetensorError  # the error of transformers

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
            complete = Path(temporary) / output.name
            yield complete
            complete.rename(output)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"--output {output}: could not be written ({reason}); choose another path") from error


# --- Hugging Face -----------------------------------------------------------------------------


def export_hf(sam: Sam, model_type: str, output: Path, sidecar: Sidecar | None) -> None:
    """Write a folder for `SamModel.from_pretrained` and `SamProcessor.from_pretrained`.

    It also holds the sidecar. The folder appears under its name only when it is complete.

    Raises:
        UserError: transformers has no model of this variant, or the folder cannot be written.
    """
    if not isinstance(sam.image_encoder, ImageEncoderViT):
        raise UserError(f"--format hf: transformers has no model of {model_type}; use --format onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    hf = SamModel(SamConfig(**hf_config(sam)))
    hf.load_state_dict(hf_weights(sam.state_dict()), strict=True)
    processor = SamProcessor(SamImageProcessor(**hf_sizes(sam)))
    with written_whole(output) as complete:
        hf.save_pretrained(complete)
        processor.save_pretrained(complete)
        if sidecar:
            write_sidecar(sidecar, complete)


def hf_sizes(sam: Sam) -> dict[str, Any]:
    """The arguments of transformers' SamImageProcessor: sizes of inputs and of low-resolution masks."""
    side, grid = sam.image_encoder.img_size, decoder.mask_grid(sam)
    return {
        "size": {"longest_edge": side},
        "mask_size": {"longest_edge": grid},
        "pad_size": {"height": side, "width": side},
        "mask_pad_size": {"height": grid, "width": grid},
    }


def hf_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an official `state_dict`, under the names that transformers' SamModel uses."""
    renamed = {hf_name(name): weight for name, weight in state_dict.items()}
    shared = renamed["prompt_encoder.shared_embedding.positional_embedding"]
    return renamed | {"shared_image_embedding.positional_embedding": shared}


def hf_config(sam: Sam) -> dict[str, Any]:
    """The arguments of transformers' SamConfig: the dimensions of a SAM with a ViT."""
    net, prompts, masks = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    patch = net.patch_embed.proj.kernel_size[0]
    windows = [block.window_size for block in net.blocks]
    layer = masks.transformer.layers[0]
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
        "hidden_size": masks.transformer_dim,
        "mlp_dim": layer.mlp.lin1.out_features,
        "num_attention_heads": layer.self_attn.num_heads,
        "iou_head_hidden_dim": masks.iou_prediction_head.layers[0].out_features,
    }
    return {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": mask}


# --- ONNX -------------------------------------------------------------------------------------


class WithoutPrompt(nn.Module):
    """Encoder and decoder as one module, without prompts; see `encoder.preprocess` and `decoder.decode`."""

    def __init__(self, sam: Sam, model_type: str) -> None:
        super().__init__()
        self.sam, self.model_type = sam, model_type

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Low-resolution logits of a batch of images.

        Args:
            images: (B, S, S, 3) uint8, RGB, padded at the bottom and on the right.
            sizes: (B, 2) int64, (h, w) of the images without padding.

        Returns:
            (B, 1, g, g) float32.
        """
        embeddings = self.sam.image_encoder(encoder.preprocess(images, sizes, self.model_type))
        no_points = images.new_zeros(images.shape[0], 0, 2, dtype=torch.float32)
        no_labels = images.new_zeros(images.shape[0], 0, dtype=torch.int64)
        return decoder.decode(self.sam, embeddings, no_points, no_labels)[0]


def onnx_metadata(sam: Sam, model_type: str, sidecar: Sidecar | None) -> dict[str, str]:
    """What a program that runs the ONNX file must know; strings, as `metadata_props` holds them."""
    metadata = {
        "model_type": model_type,
        "input_size": str(sam.image_encoder.img_size),
        "color_order": "RGB",
        "resize_filter": "Pillow BILINEAR (antialiased), longest side to input_size",
        "padding": "bottom and right",
        "normalization": "none: it is part of the graph, whose input is uint8",
        "threshold": repr(sidecar.threshold if sidecar else 0.0),
    }
    if sidecar and sidecar.cable_width:
        metadata["cable_width"] = repr(sidecar.cable_width)
    return metadata


def external_data_path(output: Path) -> Path:
    """The file with the weights of an ONNX file that is too large to hold them."""
    return output.with_name(f"{output.name}.data")


def export_onnx(sam: Sam, model_type: str, output: Path, metadata: Mapping[str, str]) -> None:
    """Write `WithoutPrompt` as ONNX, for batches of any size. Changes `sam` in place.

    Weights of more than ONNX_LIMIT bytes go to a second file, see `external_data_path`.
    Raises UserError if a file cannot be written.
    """
    is_large = sum(weight.numel() for weight in sam.parameters()) * 4 > ONNX_LIMIT
    onnx = to_onnx(sam, model_type)
    onnx.model.metadata_props.update(metadata)
    with written_whole(output) as complete:
        onnx.save(complete, external_data=is_large)
        if is_large:  # first: the other file needs it as soon as it appears
            external_data_path(complete).rename(external_data_path(output))


def to_onnx(sam: Sam, model_type: str) -> torch.onnx.ONNXProgram:
    """`WithoutPrompt` as an ONNX graph whose first axes are named "batch". Changes `sam` in place."""
    prepare_for_onnx(sam.image_encoder)
    side = sam.image_encoder.img_size
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8), torch.full((2, 2), side)
    batch = torch.export.Dim("batch")
    shapes = {"images": {0: batch}, "sizes": {0: batch}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = WithoutPrompt(sam, model_type).eval()
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=ONNX_OPSET,
            input_names=list(shapes),
            output_names=["logits"],
            verbose=False,
        )
    assert onnx is not None  # None only for the old exporter
    # The exporter names the axis after a symbol such as "s34", also in the shapes of all other values.
    graph = onnx.model.graph
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    known_shapes = [value.shape for value in values if value.shape is not None]
    symbol = known_shapes[0][0]
    for shape in known_shapes:
        for axis, length in enumerate(shape):
            if length == symbol:
                shape[axis] = "batch"
    return onnx


def prepare_for_onnx(net: nn.Module) -> None:
    """Fold TinyViT's BatchNorm, and keep its batch size dynamic. A ViT stays as it is.

    (`FusedAttention` would fix the batch size of a ViT: its code for a CPU depends on it.)
    """
    if isinstance(net, ImageEncoderViT):
        return
    encoder.accelerate(net)
    for module in net.modules():
        if hasattr(module, "input_resolution") and hasattr(module, "conv3"):  # TinyViT's PatchMerging
            module.register_forward_pre_hook(_tokens_to_image)


def _tokens_to_image(module: Any, args: tuple[Tensor]) -> Tensor:
    """Forward pre-hook of TinyViT's PatchMerging: reshapes tokens (B, h w, C) to an image (B, C, h, w).

    The module does the same itself, but with `len(x)`, which becomes a constant in the exported graph.
    """
    (x,) = args
    return x.unflatten(1, module.input_resolution).permute(0, 3, 1, 2) if x.ndim == 3 else x


if __name__ == "__main__":
    sys.exit(main())
