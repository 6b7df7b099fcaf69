"""Visual tokens on their way into the language model: their order, and where each lies in the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_svp.heads.mask_head import MaskHead
from lavis_svp.models.frozen import FrozenInputs
from lavis_svp.projectors.structures import Grid, Superpixels, VisualTokens


def shuffled(visual: VisualTokens) -> VisualTokens:
    """Put each picture's real tokens in random order (torch's generator), padding stays at the end."""
    keys = torch.rand(visual.valid.shape, device=visual.valid.device) + (~visual.valid).float()
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


def token_positions(visual: VisualTokens, frozen: FrozenInputs, head: MaskHead) -> Tensor:
    """SAM's positional encoding of each token's place: the mean over its patches' centres.

    Args:
        visual: tokens with their ``assignment`` to patches.
        frozen: grids, extents and frames of the pictures.
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
    """The area of the picture that each token stands for.

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
        return areas * visual.valid[..., None, None]
    if visual.assignment is None or len(set(grids)) != 1:
        raise ValueError("This projector does not say which patches its tokens come from; turn pointer_mask off.")
    member = visual.assignment.float()
    member = member / member.amax(-1, keepdim=True).clamp_min(1e-6)
    return member.reshape(*member.shape[:2], *grids[0])  # (B, T, h, w)
