"""The frozen vision transformer that makes patch features out of images.

:func:`encode_patches` also serves the vision tower of a host model: it freezes nothing, and gradients flow.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from lavis_svp.common.options import check_keys
from lavis_svp.common.transfer import to_device
from lavis_svp.vision.families import VisionFamily, family_of, with_published_colors
from lavis_svp.vision.types import ENCODER_OUTPUTS, Grid, PatchFeatures
from lavis_svp.zoo import Weights, load_published, model_config, read_published, resolve

Fit = Literal["stretch", "pad"]
AttentionName = Literal["auto", "sdpa", "eager", "flash_attention_2"]
PixelSize = tuple[int, int]
Side = int | Sequence[int]


class FrozenModule(nn.Module):
    """A module that never trains: no gradients, and always in evaluation mode.

    ``train()`` on a model that holds one leaves it in evaluation mode: MobileSAM's batch norms would otherwise
    drift, and drop-out would make cached features differ from fresh ones.
    """

    def freeze(self) -> Self:
        """Turn off gradients and drop-out, for good."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)


class PixelNorm(nn.Module):
    """``(x - mean) / std`` of RGB images, always in float32, also where the model was cast to another dtype.

    Args:
        mean: of red, green and blue, for pixels in [0, 1].
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.values = {"mean": tuple(mean), "std": tuple(std)}
        for name, value in self.values.items():
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, value in self.values.items():  # a cast buffer would have lost its last digits
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32:
                setattr(self, name, torch.tensor(value).view(3, 1, 1).to(buffer.device))
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise images (..., 3, H, W) in [0, 1]."""
        return (pixels.float() - self.mean) / self.std


class VisionEncoder(FrozenModule):
    """Patch features of a plain ViT; frozen.

    Args:
        network: a transformers vision model with an embedding per patch.
        family: how this kind of model takes its input and gives its output.
        side: input side in pixels, divisible by the patch size; or [height, width], with "stretch".
        fit: "stretch" stretches the image over the whole grid; "pad" keeps its aspect ratio, the rest of the grid
            being invalid patches.
        layer: whose patches are returned, see :func:`encode_patches`; -2 is LLaVA's choice for CLIP.
        levels: indices, as for ``layer``, of further layers that ``PatchFeatures.levels`` returns.
        outputs: further outputs, see :meth:`request_outputs`.

    Raises:
        ValueError: a side that the patch size does not divide, or what :meth:`request_outputs` refuses.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        family: VisionFamily,
        side: Side = 224,
        fit: Fit = "stretch",
        layer: int = -1,
        levels: Sequence[int] = (),
        outputs: Collection[str] = (),
    ) -> None:
        super().__init__()
        config = network.config
        if fit not in get_args(Fit):
            raise ValueError(f"Unknown fit '{fit}'. Known: {', '.join(get_args(Fit))}.")
        self.size = checked_size(side, config.patch_size, fit)
        self.network = network
        self.family = family
        self.dim: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.grid = (self.size[0] // self.patch_size, self.size[1] // self.patch_size)
        self.fit = fit
        self.layer = layer
        self.request_outputs(outputs, levels)
        self.pixel_norm = PixelNorm(family.mean, family.std)
        self.freeze()

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the network, by ``torch.compile`` with these options; the names of its tensors stay."""
        self.network.compile(*args, **options)

    def request_outputs(self, names: Collection[str], levels: Sequence[int] = ()) -> None:
        """Return the outputs of these ``names``, of ``ENCODER_OUTPUTS``, and these further layers from now on.

        Raises:
            ValueError: an unknown output, or one that this encoder's layer and levels do not allow.
        """
        check_outputs(self.network.config.num_hidden_layers, self.layer, levels, names)
        self.levels, self.outputs = tuple(levels), frozenset(names)

    @torch.no_grad()
    def forward(self, pixels: Tensor, image_sizes: Sequence[PixelSize] | None = None) -> PatchFeatures:
        """Encode images.

        Args:
            pixels: (B, 3, H, W) RGB in [0, 1]; each image top-left, padding elsewhere.
            image_sizes: rows and columns of (H, W) that each image takes; None: all.

        Returns:
            Features of ``dim`` channels on the ``grid``, with the requested outputs, in float32 whatever the weights; a
            patch that shows nothing of the image is not valid.

        Raises:
            ValueError: sizes that do not fit the pixels.
        """
        sizes = checked_image_sizes(pixels, image_sizes)
        pixel_values = self.preprocess(pixels, sizes).to(next(self.network.parameters()).dtype)
        valid = self.valid_patches(self.image_shares(pixels, sizes), pixels.device)
        made = encode_patches(self.network, self.family, pixel_values, valid, self.layer, self.levels, self.outputs)
        made.patches = made.patches.float()
        for name in self.outputs:
            setattr(made, name, getattr(made, name).float())
        return made

    def preprocess(self, pixels: Tensor, image_sizes: Sequence[PixelSize]) -> Tensor:
        """Normalise images (B, 3, H, W) and resize them (bilinear, antialiased) to the encoder's input (B, 3, *size).

        Images of one size are resized together. Padding is 0, the mean colour. The result is float32.
        """
        by_size: dict[PixelSize, list[int]] = {}
        for index, size in enumerate(image_sizes):
            by_size.setdefault(size, []).append(index)
        prepared = [pixels] * len(image_sizes)
        for (height, width), group in by_size.items():
            images = torch.stack([pixels[index, :, :height, :width] for index in group])  # (G, 3, height, width)
            images = self.pixel_norm(images)
            if self.fit == "pad":
                edge = max(pixels.shape[2:])
                images = functional.pad(images, (0, edge - width, 0, edge - height))  # (G, 3, edge, edge)
            images = functional.interpolate(images, self.size, mode="bilinear", antialias=True)  # (G, 3, *size)
            for index, image in zip(group, images, strict=True):
                prepared[index] = image
        return torch.stack(prepared)  # (B, 3, *size)

    def image_shares(self, pixels: Tensor, image_sizes: Sequence[PixelSize] | None = None) -> list[tuple[float, float]]:
        """The share of the grid's height and width that each image covers, the extents of ``Superpixels``."""
        height, width = pixels.shape[2:]
        return image_shares(checked_image_sizes(pixels, image_sizes), (height, width), self.fit)

    def valid_patches(self, shares: Sequence[tuple[float, float]], device: torch.device | str) -> Tensor:
        """(B, N) bool, the patches that show something of images that cover these shares of the grid."""
        h, w = self.grid
        if all(share == (1.0, 1.0) for share in shares):
            return torch.ones(len(shares), h * w, dtype=torch.bool, device=device)
        with torch.device("cpu"):
            ends = torch.tensor(shares)
            rows, columns = torch.arange(h) < ends[:, :1] * h, torch.arange(w) < ends[:, 1:] * w  # (B, h), (B, w)
        return to_device((rows[:, :, None] & columns[:, None, :]).flatten(1), device)  # (B, N)


def image_shares(image_sizes: Sequence[PixelSize], frame: PixelSize, fit: Fit) -> list[tuple[float, float]]:
    """The share (of height, of width) of the patch grid that images cover which take ``image_sizes`` of a frame."""
    if fit == "stretch":
        return [(1.0, 1.0)] * len(image_sizes)
    return [(height / max(frame), width / max(frame)) for height, width in image_sizes]


def build_vision_encoder(
    name_or_path: str | os.PathLike[str],
    side: Side = 224,
    fit: Fit = "stretch",
    layer: int = -1,
    levels: Sequence[int] = (),
    weights: Weights = "load",
    outputs: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    attn_implementation: AttentionName = "auto",
) -> VisionEncoder:
    """Build a frozen vision encoder.

    Images are normalised as the ``preprocessor_config.json`` next to the weights says, without one as the family's
    publisher does.

    Args:
        name_or_path: a name of the zoo, a local Hugging Face folder, or a hub id ("facebook/dinov2-large"). Of a
            model of images and text (CLIP, SigLIP) the vision tower is taken.
        side: as in :class:`VisionEncoder`, and likewise the following.
        fit: "stretch" or "pad".
        layer: whose patches are returned.
        levels: further layers to return.
        weights: "none" builds it on the meta device from its configuration alone.
        outputs: further outputs to return.
        dtype: of the weights; they are read in it, whatever the file has.
        attn_implementation: of transformers; "auto" is "sdpa".

    Raises:
        UnknownNameError: no such weights, or a kind of model that is not supported.
        ValueError: see :class:`VisionEncoder`.
        BadFileError: see :func:`~lavis_svp.zoo.published.load_published`.
        ImportError: "flash_attention_2" without the package flash-attn.
    """
    if weights == "none":
        config = model_config(name_or_path)
        config = getattr(config, "vision_config", config)
        family = family_of(config)
        with torch.device("meta"):
            return VisionEncoder(family.model(config).to(dtype), family, side, fit, layer, levels, outputs)
    source = resolve(name_or_path)
    family = with_published_colors(family_of(read_published(AutoConfig.from_pretrained, source)), source)
    attention = "sdpa" if attn_implementation == "auto" else attn_implementation
    network = load_published(family.model, source, attn_implementation=attention, dtype=dtype)
    return VisionEncoder(network, family, side, fit, layer, levels, outputs)


def checked_size(side: Side, patch: int, fit: Fit) -> tuple[int, int]:
    """Height and width in pixels of an encoder's input; a ValueError unless they are whole patches and fit ``fit``."""
    sides = (side, side) if isinstance(side, int) else tuple(side)
    if len(sides) != 2 or not all(isinstance(length, int) for length in sides):
        raise ValueError(f"The vision encoder's side must be a number of pixels or [height, width], got {side!r}.")
    for length in sides:
        if length < patch or length % patch:
            lower = max(length // patch, 1) * patch
            raise ValueError(
                f"The vision encoder's side {length} is not a multiple of its patch size {patch}. "
                f"The nearest are {lower} and {lower + patch}."
            )
    if fit == "pad" and sides[0] != sides[1]:
        raise ValueError(f"fit: pad needs a square input, but side is {list(sides)}: give one number, or fit: stretch.")
    return sides[0], sides[1]


def checked_image_sizes(pixels: Tensor, image_sizes: Sequence[PixelSize] | None) -> list[PixelSize]:
    """The images' sizes, None meaning all of the pixels (B, 3, H, W); a ValueError if they do not fit these."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}.")
    batch, _, height, width = pixels.shape
    if image_sizes is None:
        return [(height, width)] * batch
    if len(image_sizes) != batch:
        raise ValueError(f"{batch} images need {batch} image sizes, got {len(image_sizes)}.")
    for rows, columns in image_sizes:
        if int(rows) != rows or int(columns) != columns or not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(f"An image size must be whole pixels within {(height, width)}, got {(rows, columns)}.")
    return [(int(rows), int(columns)) for rows, columns in image_sizes]


# ---------------------------------------------------------------- running a vision transformer


def check_outputs(layers: int, layer: int, levels: Sequence[int], outputs: Collection[str]) -> None:
    """Raise a ValueError unless an encoder of ``layers`` blocks can give what :func:`encode_patches` is to return."""
    check_keys(outputs, sorted(ENCODER_OUTPUTS), "the outputs of a vision encoder")
    for index in (layer, *levels):
        if not -layers - 1 <= index <= layers:
            raise ValueError(f"Layer {index} does not exist: the encoder has {layers} layers.")
    if "levels" in outputs and not levels:
        raise ValueError(
            "The projector needs levels, several layers of the vision encoder, but none are named: set "
            f"model.vision_encoder.levels, for example [{', '.join(str(layers * part // 4) for part in (1, 2, 3, 4))}]."
        )
    attention = sorted({"cls_attention", "keys"} & set(outputs))
    if attention and layer % (layers + 1) == 0:
        raise ValueError(
            f"The projector needs {' and '.join(attention)}, but layer {layer} is the embedding, which has no "
            "attention: set model.vision_encoder.layer to another one."
        )


def encode_patches(
    network: PreTrainedModel,
    family: VisionFamily,
    pixel_values: Tensor,
    valid: Tensor,
    layer: int = -1,
    levels: Sequence[int] = (),
    outputs: Collection[str] = (),
) -> PatchFeatures:
    """Run a vision transformer on images of one size.

    ``cls_attention`` and ``keys`` are those of the block that puts out the hidden state ``layer`` (-1: the last
    block), as VisionZip takes them (arXiv 2412.04467, section 3.2).

    Args:
        network: a model of the family, for example the vision tower of a host.
        family: of the network.
        pixel_values: (B, 3, H, W) normalised images. What does not fill a patch at the right and lower edge is not
            seen, as with SigLIP's patches of 14 at its published side 384.
        valid: (B, N) bool, patches that show the image; N = floor(H / patch) floor(W / patch).
        layer: which layer's patches: -1 what the model calls its last hidden state, with the final norm where the
            family has one for patches (CLIP has none); else the index of a hidden state, 0 the embedding, negative
            from the end, without the norm. The last block's output without the norm is ``num_hidden_layers``.
        levels: indices, as for ``layer``, of further layers to return.
        outputs: further outputs, of ``ENCODER_OUTPUTS``.

    Returns:
        The patches and ``outputs``; levels are returned if there are any. Attention of invalid patches is 0.

    Raises:
        ValueError: what :func:`check_outputs` refuses, or ``valid`` of another size.
    """
    layers: int = network.config.num_hidden_layers
    check_outputs(layers, layer, levels, outputs)
    patch = network.config.patch_size
    grid: Grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
    if tuple(valid.shape) != (len(pixel_values), grid[0] * grid[1]):
        raise ValueError(
            f"Images {tuple(pixel_values.shape)} have {grid[0]}x{grid[1]} patches, valid is {tuple(valid.shape)}."
        )
    if pixel_values.is_meta and family.names.rotary is not None:
        raise NotImplementedError(
            f"transformers runs {type(network).__name__} on no meta device (its rotation needs autocast there), so "
            "its operations cannot be counted without weights. Training and prediction work."
        )
    needs_attention = not {"cls_attention", "keys"}.isdisjoint(outputs)
    result = network(
        **family.inputs(pixel_values, valid, patch),
        output_hidden_states=needs_attention or any(index != -1 for index in (layer, *levels)),
    )
    prefix = family.prefix_tokens(network.config)

    def patches_of(index: int) -> Tensor:
        states = result.last_hidden_state if index == -1 else result.hidden_states[index]  # (B, T, C)
        return states[:, prefix:]  # (B, N, C)

    features = PatchFeatures(patches_of(layer), [grid] * len(pixel_values), valid)
    if levels:
        features.levels = torch.stack([patches_of(index) for index in levels], dim=1)  # (B, L, N, C)
    if needs_attention:
        block = layer % (layers + 1) - 1
        heads = block_attention(network, family, result.hidden_states[block], block, pixel_values)
        if "cls_attention" in outputs:
            visible = valid if family.masked else torch.ones_like(valid)
            visible = torch.cat([visible.new_ones(len(visible), prefix), visible], dim=1)  # (B, T)
            weights = heads.to_patches(visible, valid).masked_fill(~valid, 0.0)
            features.cls_attention = weights.to(features.patches.dtype)  # (B, N)
        if "keys" in outputs:
            features.keys = heads.patch_keys()  # (B, N, K)
    return features


# ---------------------------------------------------------------- attention and keys of one block


@dataclass(frozen=True)
class BlockAttention:
    """Queries and keys of a block.

    Args:
        queries: (B, H, T, d) of all tokens, prefix first, rotated where the model rotates.
        keys: (B, H, T, d), likewise.
        plain_keys: (B, H, T, d) before the rotation.
        prefix: number of tokens before the N patches; T = prefix + N.
    """

    queries: Tensor
    keys: Tensor
    plain_keys: Tensor
    prefix: int

    def to_patches(self, visible: Tensor, counted: Tensor) -> Tensor:
        """The attention that each patch gets, mean over heads.

        From CLS, the first token; without prefix tokens, the mean over the valid patches. Each head's weights are the
        softmax of q k^T / sqrt(d) over all tokens (arXiv 1706.03762, equation 1).

        Args:
            visible: (B, T) bool, the tokens that the model attends to.
            counted: (B, N) bool, the patches whose attention is averaged where there is no CLS.

        Returns:
            (B, N) float32.
        """
        heads = self.queries.shape[1]
        queries = self.queries[:, :, :1] if self.prefix else self.queries  # (B, H, Q, d)
        share = self.queries.new_ones(len(counted), 1) if self.prefix else counted.to(self.queries.dtype)  # (B, Q)
        share = (share / share.sum(1, keepdim=True).clamp_min(1)).float()
        total = torch.zeros(visible.shape, device=visible.device)  # (B, T)
        for head in range(heads):  # one at a time: without CLS there are N x N weights
            scores = queries[:, head] @ self.keys[:, head].mT * self.queries.shape[-1] ** -0.5  # (B, Q, T)
            weights = scores.float().masked_fill(~visible[:, None], float("-inf")).softmax(-1)
            total = total + torch.einsum("bq,bqt->bt", share, weights)
        return total[:, self.prefix :] / heads  # (B, N)

    def patch_keys(self) -> Tensor:
        """Keys of the patches, mean over heads: (B, N, d). Without the rotation, which says where, not what."""
        return self.plain_keys[:, :, self.prefix :].mean(1)  # (B, N, d)


def block_attention(
    network: PreTrainedModel, family: VisionFamily, states: Tensor, block: int, pixels: Tensor
) -> BlockAttention:
    """Compute the queries and keys of a block from the hidden state that enters it.

    The network's fused attention does not return its weights. One row of them is cheap to compute again, so the
    network need not run its slow, "eager" form, and nothing in it is replaced.

    Args:
        network: a vision model of the family.
        family: says what its modules are called.
        states: (B, T, C), the hidden state that enters the block.
        block: index of the block, from 0.
        pixels: (B, 3, H, W) normalised images, for models that rotate.
    """
    names, heads = family.names, network.config.num_attention_heads
    module = network.get_submodule(names.blocks).get_submodule(str(block))
    normed = module.get_submodule(names.norm)(states)  # (B, T, C)
    projected = (module.get_submodule(name)(normed) for name in (names.query, names.key))
    queries, plain = (vectors.unflatten(2, (heads, -1)).transpose(1, 2) for vectors in projected)  # (B, H, T, d)
    prefix, keys = family.prefix_tokens(network.config), plain
    if names.rotary is not None:
        cos, sin = network.get_submodule(names.rotary)(pixels)
        queries, keys = (_rotated(vectors, cos, sin, prefix) for vectors in (queries, plain))
    return BlockAttention(queries, keys, plain, prefix)


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the patches (B, H, T, d); the prefix tokens have no place."""
    patches = vectors[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos.to(vectors) + torch.cat([-second, first], dim=-1) * sin.to(vectors)  # (B, H, N, d)
    return torch.cat([vectors[:, :, :prefix], turned], dim=2)  # (B, H, T, d)
