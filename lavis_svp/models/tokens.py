"""Visual tokens on their way into the language model: their order, and where each lies in the image."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.heads.mask_head import Frame, SegMaskDecoder, mask_to_sam_input
from lavis_svp.language.splice import VisualPositions
from lavis_svp.models.frozen import VisionFeatures
from lavis_svp.projectors.order import centroids
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens


def shuffled(visual: VisualTokens) -> VisualTokens:
    """Put each image's real tokens in random order (torch's generator).

    Padding stays at the end, and a token of the whole image (``order`` -1) at the front.
    """
    keys = torch.rand(visual.valid.shape, device=visual.valid.device) + (~visual.valid).float()
    if visual.order is not None:
        keys = keys.masked_fill((visual.order < 0) & visual.valid, -1.0)
    order = keys.argsort(1)  # (B, T)

    def pick(rows: Tensor) -> Tensor:
        index = order.reshape(order.shape + (1,) * (rows.ndim - 2)).expand(-1, -1, *rows.shape[2:])
        return rows.gather(1, index)

    return VisualTokens(
        tokens=pick(visual.tokens),
        valid=visual.valid,
        assignment=None if visual.assignment is None else pick(visual.assignment),
        order=None if visual.order is None else pick(visual.order),
    )


def centroid_positions(visual: VisualTokens, features: PatchFeatures) -> list[VisualPositions]:
    """Positions for the rotary embedding as if all valid patches of an image stood in the text, in raster order.

    A token stands where the patch under its centroid would. An image that fills its grid takes h * w positions, and
    a token whose centroid lies in row i and column j has position i * w + j; patches of letter-box padding do not
    count. A token of the whole image stands in its middle. With `mlp` nothing changes: its tokens are the patches.

    Args:
        visual: tokens with their ``assignment`` to patches.
        features: the patches they were made of.

    Returns:
        the positions of each image.

    Raises:
        ValueError: the projector does not say which patches its tokens come from.
    """
    if visual.assignment is None:
        raise ValueError(
            "This projector does not say which patches its tokens come from: set language.visual_positions to index."
        )
    places = centroids(visual.assignment, *features.coordinates()).floor().long()  # (B, T, 2)
    grids = torch.tensor(features.grids, device=places.device)  # (B, 2) h, w
    places = torch.minimum(places, grids[:, None] - 1)
    patch = places[..., 0] * grids[:, 1:] + places[..., 1]  # (B, T)
    rank = (features.valid.long().cumsum(1) - 1).clamp_min(0)  # (B, N) of each patch among the valid ones
    offsets = rank.gather(1, patch).tolist()
    counts, spans = visual.valid.sum(1).tolist(), features.valid.sum(1).tolist()
    return [VisualPositions(row[:count], span) for row, count, span in zip(offsets, counts, spans, strict=True)]


def token_places(visual: VisualTokens, frozen: VisionFeatures) -> Tensor:
    """Where each token's centroid lies in its image: (B, T, 2) y and x, from 0 to 1.

    Args:
        visual: tokens with their ``assignment`` to patches.
        frozen: grids and extents of the images.

    Raises:
        ValueError: the projector does not say which patches its tokens come from.
    """
    if visual.assignment is None:
        raise ValueError("This projector does not say which patches its tokens come from; turn place_alignment off.")
    device = visual.tokens.device
    patches = centroids(visual.assignment.detach(), *frozen.features.coordinates())  # (B, T, 2)
    spans = torch.tensor(frozen.features.grids, device=device) * torch.tensor(frozen.extents, device=device)  # (B, 2)
    return (patches / spans[:, None]).clamp(0.0, 1.0).float()  # (B, T, 2)


def token_positions(visual: VisualTokens, frozen: VisionFeatures, head: SegMaskDecoder) -> Tensor:
    """SAM's positional encoding of each token's place: the mean over its patches' centres.

    Args:
        visual: tokens with their ``assignment`` to patches.
        frozen: grids, extents and frames of the images.
        head: gives SAM's encoding.

    Returns:
        (B, T, 256).
    """
    if visual.assignment is None:
        raise ValueError("This projector does not say which patches its tokens come from; turn pointer_position off.")
    row, column = frozen.features.coordinates()  # (B, N) each
    device = visual.tokens.device
    grids = torch.tensor(frozen.features.grids, device=device).float()  # (B, 2) h, w
    extents = torch.tensor(frozen.extents, device=device)
    covered = torch.tensor([[f.input_size[0] / f.side, f.input_size[1] / f.side] for f in frozen.frames], device=device)
    scale = covered / extents / grids  # (B, 2): one patch step in SAM's frame, as a share of its side
    y = (row.to(device) + 0.5) * scale[:, :1]  # (B, N)
    x = (column.to(device) + 0.5) * scale[:, 1:]  # (B, N)
    encoded = head.position_of(x, y).float()  # (B, N, 256)
    return torch.einsum("btn,bnc->btc", visual.assignment.float(), encoded)  # (B, T, 256)


def token_areas(visual: VisualTokens, superpixels: Superpixels | None, grids: list[Grid]) -> Tensor:
    """The area of the image that each token stands for.

    Args:
        visual: the tokens.
        superpixels: masks of the superpixels, when the tokens are superpixels.
        grids: patch grids, when they are not.

    Returns:
        (B, T, Hm, Wm) in [0, 1], over the patch grid's field of view.
    """
    if superpixels is not None and superpixels.masks is not None and visual.order is not None:
        index = visual.order.clamp_min(0)[..., None, None].expand(-1, -1, *superpixels.masks.shape[2:])
        areas = superpixels.masks.gather(1, index)  # (B, T, Hm, Wm)
        areas = areas.masked_fill((visual.order < 0)[..., None, None], 1.0)  # of the whole image
        return areas * visual.valid[..., None, None]
    if visual.assignment is None or len(set(grids)) != 1:
        raise ValueError("This projector does not say which patches its tokens come from; turn pointer_mask off.")
    member = visual.assignment.float()
    member = member / member.amax(-1, keepdim=True).clamp_min(1e-6)
    return member.reshape(*member.shape[:2], *grids[0])  # (B, T, h, w)


def framed_areas(areas: Tensor, frozen: VisionFeatures, image: Tensor) -> Tensor:
    """Areas over the patch grid's field of view, as SAM's mask decoder takes a mask: over its own frame.

    Args:
        areas: (K, Hm, Wm) in [0, 1], see :func:`token_areas`.
        frozen: frames and extents of the images, and SAM's embeddings (B, 256, h, w).
        image: (K,) whose each is.

    Returns:
        (K, 4h, 4w).
    """
    rows, columns = frozen.sam.shape[-2:]
    framed = []
    for area, index in zip(areas, image.tolist(), strict=True):
        frame = frozen.frames[index]
        if frozen.extents[index] != (1.0, 1.0):  # a padded grid has SAM's field of view, not the image's
            frame = Frame(frame.side, (frame.side, frame.side), frame.original_size)
        framed.append(mask_to_sam_input(area[None], frame, (4 * rows, 4 * columns)))  # (1, 4h, 4w)
    return torch.cat(framed)  # (K, 4h, 4w)
