"""The interface every projector keeps, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lavis_svp.projectors.structures import Grid, PatchFeatures, Superpixels, VisualTokens

ENCODER_OUTPUTS = frozenset({"levels", "cls_attention", "keys", "summary"})  # optional fields of PatchFeatures
REQUIREMENTS = ENCODER_OUTPUTS | {"superpixels", "masks"}


@dataclass(frozen=True)
class ProjectorOptions:
    """Choices that every projector has; each projector's options extend these."""

    patch_norm: bool = False  # LayerNorm on the patches first; for encoders whose features do not end in one (CLIP)
    token_std: float | None = None  # a last LayerNorm whose gain starts here, e.g. the std of the LM's embeddings

    @property
    def grid_multiple(self) -> int:
        """The sides of every patch grid must be multiples of this."""
        return 1


class Projector(nn.Module, ABC):
    """Turns patch features, and superpixels where it needs them, into visual tokens.

    An image's tokens depend on nothing but that image: not on its batch mates, not on padding. An image without
    superpixels is treated as one superpixel that covers it all. Inputs are never changed.

    Args:
        vision_dim: C, width of the patch features.
        llm_dim: D, width of the language model.
        grid: the usual (h, w) patch grid; an image's own grid, given with its features, may differ.
        options: the choices, an instance of the class's ``options_class``; None: its defaults.

    Raises:
        ValueError: a size below 1, a grid that the options cannot divide, or options of another projector.
    """

    name: ClassVar[str] = ""  # set by register_projector
    options_class: ClassVar[type[ProjectorOptions]] = ProjectorOptions
    requires: frozenset[str] = frozenset()  # the optional inputs it cannot do without, of REQUIREMENTS
    mask_size: tuple[int, int] | None = None  # resolution at which it wants Superpixels.masks; None: it wants none

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: ProjectorOptions | None = None) -> None:
        super().__init__()
        if min(vision_dim, llm_dim, *grid) < 1:
            raise ValueError(f"Sizes must be positive: vision_dim {vision_dim}, llm_dim {llm_dim}, grid {grid}.")
        options = self.options_class() if options is None else options
        if type(options) is not self.options_class:
            raise ValueError(f"{type(self).__name__} takes {self.options_class.__name__}, got {options!r}.")
        if options.token_std is not None and options.token_std <= 0:
            raise ValueError(f"token_std must be positive or null, got {options.token_std}.")
        self.vision_dim, self.llm_dim, self.grid = vision_dim, llm_dim, (int(grid[0]), int(grid[1]))
        self.options = options
        self.check_grid(self.grid)
        self.patch_norm = nn.LayerNorm(vision_dim) if options.patch_norm else nn.Identity()
        self.token_norm: nn.Module = nn.Identity()
        if options.token_std is not None:
            self.token_norm = nn.LayerNorm(llm_dim)
            nn.init.constant_(self.token_norm.weight, options.token_std)

    @abstractmethod
    def project(self, features: PatchFeatures, superpixels: Superpixels | None) -> VisualTokens:
        """Make the tokens; :meth:`forward` has checked the inputs and zeroes the padding afterwards.

        Args:
            features: patches normalised, in the dtype of the parameters.
            superpixels: as given to :meth:`forward`; a projector that requires them gets them.
        """

    @abstractmethod
    def num_tokens(self, grid: Grid) -> int | None:
        """Tokens of an image that fills ``grid``; None if that depends on the image."""

    def image_tokens(self, grid: Grid, superpixels: int) -> int | None:
        """Tokens of one image, known before its features are.

        Args:
            grid: (h, w) of the image's valid patches.
            superpixels: how many it has.

        Returns:
            the count that :meth:`forward` will give, or None if only the features tell.
        """
        return self.num_tokens(grid)

    def forward(self, features: PatchFeatures, superpixels: Superpixels | None = None) -> VisualTokens:
        """Project a batch.

        Args:
            features: the patches of B images.
            superpixels: their superpixels, built for the same grids; unused if the projector does not require them.

        Returns:
            Visual tokens, right-padded with exact zeros.

        Raises:
            ValueError: a required input is missing, or sizes do not fit.
        """
        self._check(features, superpixels)
        parameter = next(self.parameters())
        features = replace(features, patches=self.patch_norm(features.patches.to(parameter.dtype)))
        result = self.project(features, superpixels)
        padding = ~result.valid
        tokens = self.token_norm(result.tokens).masked_fill(padding[..., None], 0.0)  # (B, T, D)
        assignment, order = result.assignment, result.order
        if assignment is not None:
            assignment = assignment.masked_fill(padding[..., None], 0.0)  # (B, T, N)
        if order is not None:
            order = order.masked_fill(padding, -1)  # (B, T)
        return VisualTokens(tokens, result.valid, assignment, order)

    def check_grid(self, grid: Grid) -> None:
        """Refuse a grid whose sides are no multiples of the options' ``grid_multiple``.

        Args:
            grid: (h, w), letter-box padding included.

        Raises:
            ValueError: tells the nearest grids that fit.
        """
        cell = self.options.grid_multiple
        if grid[0] % cell == 0 and grid[1] % cell == 0:
            return
        below = "x".join(str(max(side // cell, 1) * cell) for side in grid)
        above = "x".join(str(-(-side // cell) * cell) for side in grid)
        fitting = below if below == above else f"{below} and {above}"
        trap = (
            " 37 is prime, so nothing divides DINOv2's own 518 px = 37x37 patches of 14 px; 336 px = 24x24 and "
            "504 px = 36x36 do fit many."
            if 37 in grid and cell != 37
            else ""
        )
        raise ValueError(
            f"Projector '{self.name}' joins cells of {cell}x{cell} patches, and a {grid[0]}x{grid[1]} patch grid does "
            f"not divide into them. Nearest grids that do: {fitting}; change the encoder's side or the cell.{trap}"
        )

    def _check(self, features: PatchFeatures, superpixels: Superpixels | None) -> None:
        for grid in set(features.grids):
            self.check_grid(grid)
        if features.patches.shape[2] != self.vision_dim:
            raise ValueError(
                f"Projector '{self.name}' was built for patches of width {self.vision_dim}, "
                f"got {features.patches.shape[2]}: build it with the vision encoder's dim."
            )
        given = {
            "superpixels": superpixels is not None,
            "masks": superpixels is not None and superpixels.masks is not None,
            "levels": features.levels is not None,
            "cls_attention": features.cls_attention is not None,
            "keys": features.keys is not None,
            "summary": features.summary is not None,
        }
        missing = [need for need in sorted(self.requires, reverse=True) if not given[need]]
        if missing:
            raise ValueError(
                f"Projector '{self.name}' needs {' and '.join(missing)}. Superpixels come from "
                f"Superpixels.from_region_maps(maps, grids, mask_size={self.mask_size}); "
                f"{', '.join(sorted(ENCODER_OUTPUTS))} from the vision encoder."
            )
        if "superpixels" not in self.requires or superpixels is None:
            return
        batch, count = features.valid.shape
        if (superpixels.weights.shape[0], superpixels.weights.shape[2]) != (batch, count):
            raise ValueError(
                f"Superpixels and patches do not fit: weights are {tuple(superpixels.weights.shape)} = (B, S, N), "
                f"patches have B = {batch}, N = {count}. Build the superpixels with the grids of the features."
            )


def parameter_count(module: nn.Module) -> int:
    """Number of parameters of ``module``."""
    return sum(p.numel() for p in module.parameters())


def patch_order(valid: Tensor) -> Tensor:
    """Indices that bring the real entries of each row to the front and keep their order: (B, N) int64."""
    return torch.argsort((~valid).long(), dim=1, stable=True)  # (B, N)
