"""The interface of every projector, what all of them share, and the registry that finds them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from lavis_svp.common.options import build_options, check_fields
from lavis_svp.common.registry import Registry
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.vision.types import ENCODER_OUTPUTS, Grid, PatchFeatures

P = TypeVar("P", bound="type[Projector]")


@dataclass(frozen=True)
class ProjectorOptions:
    """Options that every projector has; each projector's own options extend these.

    Raises:
        ValueError: a value that its field's type excludes, or a ``token_std`` that is not positive.
    """

    patch_norm: bool = False  # LayerNorm on the patches first; for encoders whose features do not end in one (CLIP)
    token_std: float | None = None  # a last LayerNorm whose gain starts here, e.g. the std of the LM's embeddings

    def __post_init__(self) -> None:
        check_fields(self)
        if self.token_std is not None and self.token_std <= 0:
            raise ValueError(f"token_std must be positive or null, got {self.token_std}.")

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
        options: an instance of the class's ``options_class``; None means its defaults.

    Raises:
        ValueError: a size below 1, a grid that the options cannot divide, or options of another projector.
    """

    name: ClassVar[str] = ""
    """The name in the registry, which :func:`register_projector` sets."""
    options_class: ClassVar[type[ProjectorOptions]] = ProjectorOptions
    requires: frozenset[str] = frozenset()
    """The inputs that the projector cannot do without: "superpixels", "masks", and names of ENCODER_OUTPUTS."""
    mask_size: tuple[int, int] | None = None
    """The resolution (Hm, Wm) at which the projector reads Superpixels.masks; None: it reads no masks."""

    def __init__(self, vision_dim: int, llm_dim: int, grid: Grid, options: ProjectorOptions | None = None) -> None:
        super().__init__()
        if min(vision_dim, llm_dim, *grid) < 1:
            raise ValueError(f"Sizes must be positive: vision_dim {vision_dim}, llm_dim {llm_dim}, grid {grid}.")
        options = self.options_class() if options is None else options
        if type(options) is not self.options_class:
            raise ValueError(f"{type(self).__name__} takes {self.options_class.__name__}, got {options!r}.")
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
            superpixels: those of :meth:`forward`; never None for a projector that requires them.
        """

    @abstractmethod
    def num_tokens(self, grid: Grid) -> int | None:
        """Return how many tokens an image that fills ``grid`` gives; None if that depends on the image."""

    def image_tokens(self, grid: Grid, superpixels: int) -> int | None:
        """Return how many tokens :meth:`forward` will make of one image; None if that depends on its features.

        Args:
            grid: (h, w) of the image's valid patches.
            superpixels: their number.
        """
        return self.num_tokens(grid)

    def forward(self, features: PatchFeatures, superpixels: Superpixels | None = None) -> VisualTokens:
        """Project a batch; padding of the result is exact zeros.

        Args:
            features: the patches of B images.
            superpixels: their superpixels, built for the same grids; unused if the projector does not require them.

        Raises:
            ValueError: a required input is missing, or sizes do not fit.
        """
        self._check(features, superpixels)
        parameter = next(self.parameters())
        features = replace(features, patches=self.patch_norm(features.patches.to(parameter.dtype)))
        result = self.project(features, superpixels)
        return result.with_tokens(self.token_norm(result.tokens))

    def check_grid(self, grid: Grid) -> None:
        """Refuse a grid whose sides, letter-box padding included, are no multiples of the options' ``grid_multiple``.

        Raises:
            ValueError: names the nearest grids that fit.
        """
        cell = self.options.grid_multiple
        if grid[0] % cell == 0 and grid[1] % cell == 0:
            return
        below = "x".join(str(max(side // cell, 1) * cell) for side in grid)
        above = "x".join(str(-(-side // cell) * cell) for side in grid)
        fitting = below if below == above else f"{below} and {above}"
        message = (
            f"Projector '{self.name}' joins cells of {cell}x{cell} patches, and a {grid[0]}x{grid[1]} patch grid does "
            f"not divide into them. Nearest grids that do: {fitting}; change the encoder's side or the cell."
        )
        if 37 in grid:
            message += (
                " 37 is prime, so nothing divides DINOv2's own 518 px = 37x37 patches of 14 px; 336 px = 24x24 and "
                "504 px = 36x36 do fit many."
            )
        raise ValueError(message)

    def _check(self, features: PatchFeatures, superpixels: Superpixels | None) -> None:
        for grid in set(features.grids):
            self.check_grid(grid)
        if features.patches.shape[2] != self.vision_dim:
            raise ValueError(
                f"Projector '{self.name}' was built for patches of width {self.vision_dim}, "
                f"got {features.patches.shape[2]}: build it with the vision encoder's dim."
            )
        inputs = {"superpixels": superpixels, "masks": None if superpixels is None else superpixels.masks}
        inputs |= {name: getattr(features, name) for name in ENCODER_OUTPUTS}
        if missing := [need for need in sorted(self.requires, reverse=True) if inputs.get(need) is None]:
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
    """Count the parameters of ``module``."""
    return sum(p.numel() for p in module.parameters())


PROJECTORS: Registry[type[Projector]] = Registry("projector")


def register_projector(name: str) -> Callable[[P], P]:
    """Return a class decorator that registers a projector as ``name``, the YAML's ``model.projector.name``."""

    def decorate(cls: P) -> P:
        PROJECTORS.register(name)(cls)
        cls.name = name
        return cls

    return decorate


def list_projectors() -> list[str]:
    """List the names of all projectors, sorted."""
    return PROJECTORS.names()


def build_projector(name: str, *, vision_dim: int, llm_dim: int, grid: Grid, **options: Any) -> Projector:
    """Build a projector.

    Args:
        name: one of :func:`list_projectors`.
        vision_dim: C, width of the patch features.
        llm_dim: D, width of the language model.
        grid: the usual (h, w) patch grid.
        options: the projector's own options, as they stand under ``model.projector`` in the YAML.

    Raises:
        UnknownNameError: no such projector; lists the known ones.
        ValueError: an option that the projector does not have, or a value that it cannot use.
    """
    cls = PROJECTORS.get(name)
    checked = build_options(cls.options_class, options, where=f"model.projector ('{name}')")
    return cls(vision_dim, llm_dim, grid, checked)
