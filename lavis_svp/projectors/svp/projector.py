"""`svp`: the semantic visual projector of arXiv 2509.13676, one visual token for each superpixel.

SSPE is its superpixel positional embedding, SSA its superpixel aggregator: cross-attention to the patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lavis_svp.common.options import PositiveInt
from lavis_svp.projectors.base import register_projector
from lavis_svp.projectors.layers import token_mlp
from lavis_svp.projectors.svp.geometry import BoxEmbedding
from lavis_svp.projectors.svp.pooling import SuperpixelOptions, SuperpixelProjector
from lavis_svp.projectors.svp.ssa import SSA, shared_position
from lavis_svp.projectors.svp.sspe import SSPE
from lavis_svp.projectors.types import Superpixels
from lavis_svp.vision.types import Grid, PatchFeatures


@dataclass(frozen=True)
class SspeOptions:
    """Options of the superpixel positional embedding, SSPE; those below ``sspe_width`` apply to ``sspe: full`` only."""

    sspe: Literal["full", "bbox_mlp", "none"] = "full"  # "bbox_mlp" puts an MLP on the masks' boxes in its place
    mask_size: PositiveInt = (
        16  # cells per side at which SSPE sees the masks; soft shares, so small regions do not vanish
    )
    sspe_width: PositiveInt = (
        192  # inner width, and width of the vector handed to the two output heads; also of bbox_mlp
    )
    sspe_queries: PositiveInt = 4  # the paper's
    sspe_blocks: PositiveInt = 3  # the paper's
    sspe_heads: PositiveInt = 4
    sspe_ffn_ratio: PositiveInt = 2
    sspe_start: Literal["random", "zero"] = "random"  # "zero" (not in the paper): SSPE adds nothing at first


@dataclass(frozen=True)
class SsaOptions:
    """Options of the superpixel aggregator, SSA, which lets each superpixel attend to all patches."""

    ssa: Literal["full", "no_shared_sspe", "none"] = "full"  # "no_shared_sspe": the patches' keys get no SSPE
    ssa_heads: PositiveInt | None = None  # None: one for each 64 channels, 6 at C = 384
    ssa_blocks: PositiveInt = 1
    ssa_ffn_ratio: PositiveInt = 2


@dataclass(frozen=True)
class SvpOptions(SspeOptions, SsaOptions, SuperpixelOptions):
    """Options of `svp`: those of SSPE, of SSA and of every projector of superpixels side by side.

    Raises:
        ValueError: an unknown choice, a size below 1, or an SSPE that nothing receives.
    """

    add_to_tokens: Literal["after_mlp", "before_mlp", "none"] = "after_mlp"  # SSPE joins the token at width D or C

    VALUE_SPELLINGS: ClassVar[dict[str, dict[Any, str]]] = {
        name: {"off": "none", False: "none", True: "full"} for name in ("sspe", "ssa")
    }
    REMOVED_KEYS: ClassVar[dict[str, Any]] = {
        **SuperpixelOptions.REMOVED_KEYS,
        "sspe_self_attention": False,
        "sspe_attend": "inside",
        "sspe_merge": "concat",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sspe != "none" and self.ssa == "none" and self.add_to_tokens == "none":
            raise ValueError("SSPE is on, but neither SSA nor the tokens receive it: set sspe: none.")


@register_projector("svp")
class SvpProjector(SuperpixelProjector):
    """Superpixels as visual words.

    ``coarse`` = area-weighted mean of the superpixel's patches; ``refined`` = SSA(coarse, patches), guided by SSPE;
    ``token`` = MLP(refined) + SSPE. SSPE makes one vector for each superpixel, which two linear heads bring to the
    widths of the modules that use it: C for SSA (and ``before_mlp``), D for the tokens. Since SSA starts as the
    identity, training starts at `mask_pool` plus SSPE. With ``sspe_start: zero`` it starts at `mask_pool` itself, so
    that SSPE can join a model that was trained without it and change nothing at first. The tokens do not depend on the
    order in which the superpixels are given.
    """

    options_class = SvpOptions
    options: SvpOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: SvpOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        opt = self.options
        self.head = token_mlp(vision_dim, llm_dim)
        self.sspe: SSPE | BoxEmbedding | None = None
        self.sspe_to_vision = self.sspe_to_llm = self.ssa = None
        if opt.sspe != "none":
            self.requires = self.requires | {"masks"}
            self.mask_size = (opt.mask_size, opt.mask_size)
            if opt.sspe == "bbox_mlp":
                self.sspe = BoxEmbedding(opt.sspe_width)
            else:
                sizes = {"num_queries": opt.sspe_queries, "blocks": opt.sspe_blocks, "heads": opt.sspe_heads}
                self.sspe = SSPE(opt.sspe_width, width=opt.sspe_width, ffn_ratio=opt.sspe_ffn_ratio, **sizes)
            if opt.ssa != "none" or opt.add_to_tokens == "before_mlp":
                self.sspe_to_vision = nn.Linear(opt.sspe_width, vision_dim)
            if opt.add_to_tokens == "after_mlp":
                self.sspe_to_llm = nn.Linear(opt.sspe_width, llm_dim)
            for last in (self.sspe_to_vision, self.sspe_to_llm):
                if last is not None and opt.sspe_start == "zero":
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
        if opt.ssa != "none":
            self.ssa = SSA(vision_dim, heads=opt.ssa_heads, blocks=opt.ssa_blocks, ffn_ratio=opt.ssa_ffn_ratio)

    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """See :meth:`SuperpixelProjector.embed`."""
        sspe_vector = None if self.sspe is None else self.sspe(superpixels.masks)  # (B, S, sspe_width)
        sspe_for_vision = None
        if sspe_vector is not None and self.sspe_to_vision is not None:
            sspe_for_vision = self.sspe_to_vision(sspe_vector)  # (B, S, C)
        refined = coarse
        if self.ssa is not None:
            patch_position = None
            if sspe_for_vision is not None and self.options.ssa == "full":
                patch_position = shared_position(superpixels.weights, sspe_for_vision)  # (B, N, C)
            refined = self.ssa(coarse, features.patches, features.valid, sspe_for_vision, patch_position)  # (B, S, C)
        if sspe_for_vision is not None and self.options.add_to_tokens == "before_mlp":
            refined = refined + sspe_for_vision
        tokens = self.head(refined)  # (B, S, D)
        if sspe_vector is not None and self.sspe_to_llm is not None:
            tokens = tokens + self.sspe_to_llm(sspe_vector)
        return tokens
