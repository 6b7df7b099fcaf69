"""MobileSAM's image encoder: timm's TinyViT at stride 16 with SAM's neck."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

OUT_CHANNELS = 256
# MobileSAM's names -> timm's. A down-sampling begins its stage in timm; in MobileSAM it ends the stage before.
RENAMES = (
    (re.compile(r"^patch_embed\.seq\.0\."), "trunk.patch_embed.conv1."),
    (re.compile(r"^patch_embed\.seq\.2\."), "trunk.patch_embed.conv2."),
    (re.compile(r"^layers\.(\d+)\.downsample\."), lambda match: f"trunk.stages.{int(match[1]) + 1}.downsample."),
    (re.compile(r"^layers\.(\d+)\.blocks\."), r"trunk.stages.\1.blocks."),
    (re.compile(r"\.c\.weight$"), ".conv.weight"),
)
UNUSED = re.compile(r"^(norm_head|head)\.|\.attention_bias_idxs$")


class TinyViTEncoder(nn.Module):
    """TinyViT-5M as MobileSAM uses it (arXiv 2306.14289).

    Its attention works in windows with relative biases, so that one set of weights serves every side that 16 divides.
    The last down-sampling keeps its resolution, as in MobileSAM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = TinyVit(
            embed_dims=(64, 128, 160, 320),
            depths=(2, 2, 6, 2),
            num_heads=(2, 4, 5, 10),
            window_sizes=(7, 7, 14, 7),
            drop_path_rate=0.0,
            num_classes=0,
        )
        self.trunk.head = nn.Identity()
        self.trunk.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(self.trunk.num_features, OUT_CHANNELS, kernel_size=1, bias=False),
            LayerNorm2d(OUT_CHANNELS),
            nn.Conv2d(OUT_CHANNELS, OUT_CHANNELS, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(OUT_CHANNELS),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised images: (B, 3, S, S) to (B, 256, S/16, S/16)."""
        return self.neck(self.trunk.forward_features(pixels))


def from_mobile_sam(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of MobileSAM's image encoder for :class:`TinyViTEncoder`; the classifier is left out."""
    renamed = {}
    for name, value in state.items():
        if UNUSED.search(name):
            continue
        for pattern, replacement in RENAMES:
            name = pattern.sub(replacement, name)
        renamed[name] = value
        if name.endswith("running_var"):  # a count that only training reads; converted files leave it out
            renamed.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return renamed
