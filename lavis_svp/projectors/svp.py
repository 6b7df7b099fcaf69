"""`svp`: the semantic visual projector of arXiv 2509.13676, one token for each superpixel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lavis_svp.projectors.geometry import BoxEmbedding
from lavis_svp.projectors.mlp import token_mlp
from lavis_svp.projectors.registry import register_projector
from lavis_svp.projectors.ssa import SSA, shared_position
from lavis_svp.projectors.sspe import SSPE
from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels
from lavis_svp.projectors.superpixel_projector import SuperpixelOptions, SuperpixelProjector

SSA_CHOICES = ("full", "no_shared_sspe", "off")
SSPE_CHOICES = ("full", "bbox_mlp", "off")
START_CHOICES = ("random", "zero")
ADD_CHOICES = ("after_mlp", "before_mlp", "none")


@dataclass(frozen=True)
class SvpOptions(SuperpixelOptions):
    """Choices of `svp`. YAML reads a bare ``off`` as false, so true and false stand for "full" and "off"."""

    sspe: str | bool = "full"  # of the masks: "full"; "bbox_mlp", an MLP on their boxes in its place; "off"
    ssa: str | bool = "full"  # "full", "no_shared_sspe" (keys without it), "off": the second look at the patches
    add_to_tokens: str = "after_mlp"  # where SSPE joins the token: "after_mlp" at width D, "before_mlp" at C, "none"
    mask_size: int = 16  # cells a side at which SSPE sees the masks; soft shares, so small regions do not vanish
    sspe_width: int = 192  # inner width of SSPE and of the vector it hands to its two output heads; also of bbox_mlp
    sspe_queries: int = 4  # the paper's; this and the following up to sspe_merge are read by "full" only
    sspe_blocks: int = 3  # the paper's
    sspe_heads: int = 4
    sspe_ffn_ratio: int = 2
    sspe_self_attention: bool = False  # among the queries of one superpixel
    sspe_attend: str = "inside"  # "inside" the mask, or "all" positions
    sspe_merge: str = "concat"  # of the queries: "concat" or "mean"
    sspe_start: str = "random"  # its two output heads: "random", or "zero" (ours): a no-op at first, for later stages
    ssa_heads: int | None = None  # None: one for each 64 channels, 6 at C = 384
    ssa_blocks: int = 1
    ssa_ffn_ratio: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {
            "sspe": SSPE_CHOICES,
            "ssa": SSA_CHOICES,
            "add_to_tokens": ADD_CHOICES,
            "sspe_start": START_CHOICES,
        }
        for field, choices in allowed.items():
            value = getattr(self, field)
            if isinstance(value, bool) and field in ("sspe", "ssa"):
                value = "full" if value else "off"
                object.__setattr__(self, field, value)  # the way to settle a field of a frozen dataclass
            if value not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}; got {value!r}.")
        if self.mask_size < 1:
            raise ValueError(f"mask_size must be at least 1, got {self.mask_size}.")
        if self.sspe != "off" and self.ssa == "off" and self.add_to_tokens == "none":
            raise ValueError("SSPE is on, but neither SSA nor the tokens receive it: set sspe: off.")


def full_sspe(options: SvpOptions) -> SSPE:
    """The SSPE that the options ask for."""
    return SSPE(
        options.sspe_width,
        width=options.sspe_width,
        num_queries=options.sspe_queries,
        blocks=options.sspe_blocks,
        heads=options.sspe_heads,
        ffn_ratio=options.sspe_ffn_ratio,
        self_attention=options.sspe_self_attention,
        attend=options.sspe_attend,
        merge=options.sspe_merge,
    )


@register_projector("svp")
class SvpProjector(SuperpixelProjector):
    """Superpixels as visual words.

    ``coarse`` = area-weighted mean of the superpixel's patches; ``refined`` = SSA(coarse, patches), guided by SSPE;
    ``token`` = MLP(refined) + SSPE. SSPE makes one vector a superpixel, which two linear heads bring to the widths of
    its receivers: C for SSA (and ``before_mlp``), D for the tokens. Since SSA starts as the identity, training starts
    at `mask_pool` plus SSPE; with ``sspe_start: zero`` at `mask_pool` itself, so that SSPE can join a model that was
    trained without it and change nothing at first. Equivariant to the order of the superpixels.
    """

    options_class = SvpOptions
    options: SvpOptions

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: SvpOptions | None = None) -> None:
        super().__init__(vision_dim, llm_dim, grid, options)
        opt = self.options
        self.head = token_mlp(vision_dim, llm_dim)
        self.sspe: SSPE | BoxEmbedding | None = None
        self.sspe_to_vision = self.sspe_to_llm = self.ssa = None
        if opt.sspe != "off":
            self.requires = self.requires | {"masks"}
            self.mask_size = (opt.mask_size, opt.mask_size)
            self.sspe = BoxEmbedding(opt.sspe_width) if opt.sspe == "bbox_mlp" else full_sspe(opt)
            if opt.ssa != "off" or opt.add_to_tokens == "before_mlp":
                self.sspe_to_vision = nn.Linear(opt.sspe_width, vision_dim)
            if opt.add_to_tokens == "after_mlp":
                self.sspe_to_llm = nn.Linear(opt.sspe_width, llm_dim)
            for last in (self.sspe_to_vision, self.sspe_to_llm):
                if last is not None and opt.sspe_start == "zero":
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
        if opt.ssa != "off":
            self.ssa = SSA(vision_dim, heads=opt.ssa_heads, blocks=opt.ssa_blocks, ffn_ratio=opt.ssa_ffn_ratio)

    def embed(self, coarse: Tensor, features: PatchFeatures, superpixels: Superpixels) -> Tensor:
        """See :meth:`SuperpixelProjector.embed`."""
        shape = None if self.sspe is None else self.sspe(superpixels.masks)  # (B, S, sspe_width)
        sspe = None if shape is None or self.sspe_to_vision is None else self.sspe_to_vision(shape)  # (B, S, C)
        refined = coarse
        if self.ssa is not None:
            position = None
            if sspe is not None and self.options.ssa == "full":
                own = slice(self.leading, None)  # a global token must not change the others
                position = shared_position(superpixels.weights[:, own], sspe[:, own])  # (B, N, C)
            refined = self.ssa(coarse, features.patches, features.valid, sspe, position)  # (B, S, C)
        if sspe is not None and self.options.add_to_tokens == "before_mlp":
            refined = refined + sspe
        tokens = self.head(refined)  # (B, S, D)
        if shape is not None and self.sspe_to_llm is not None:
            tokens = tokens + self.sspe_to_llm(shape)
        return tokens
