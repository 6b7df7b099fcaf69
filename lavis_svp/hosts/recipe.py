"""What a swap puts into a host's configuration: the projector, its grid, and where its superpixels come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from lavis_svp.common.options import build_options
from lavis_svp.projectors import Projector, build_projector
from lavis_svp.projectors.base import ENCODER_OUTPUTS
from lavis_svp.projectors.structures import Grid

C = TypeVar("C", bound=PretrainedConfig)
CONFIG_KEY = "svp"
"""Where the recipe stands in the host's ``config.json`` and in its processor's."""
POSITION_RULES = ("centroid", "sequential")


@dataclass(frozen=True)
class SwapConfig:
    """A swapped projector, as the host's configuration keeps it.

    Args:
        name: a registered projector.
        vision_dim: C, width of the host's patch features.
        llm_dim: D, width of the host's language model.
        grid: the usual (h, w) patch grid.
        options: the projector's own choices.
        superpixels: ``name`` of a superpixel generator and its options; ``sam`` takes ``sam`` (zoo name or path of a
            checkpoint) and ``side`` besides. Unread where the projector needs none.
        levels: hidden states of the vision tower given to projectors that fuse several.
        positions: where visual tokens stand for a language model with M-RoPE (:mod:`lavis_svp.hosts.mrope`):
            ``centroid``, in the plane of the image, or ``sequential``, like text. Unread by other hosts.

    Raises:
        ValueError: another rule of positions.
    """

    name: str
    vision_dim: int
    llm_dim: int
    grid: Grid
    options: Mapping[str, Any] = field(default_factory=dict)
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "sam"})
    levels: tuple[int, ...] = ()
    positions: str = "centroid"

    def __post_init__(self) -> None:
        if self.positions not in POSITION_RULES:
            raise ValueError(f"positions must be one of {', '.join(POSITION_RULES)}; got {self.positions!r}.")

    @classmethod
    def of(cls, config: Any) -> SwapConfig:
        """Read the recipe that a configuration (or a mapping) carries under ``svp``.

        Raises:
            ValueError: there is none, or it has keys that nothing reads.
        """
        found = config.get(CONFIG_KEY) if isinstance(config, Mapping) else getattr(config, CONFIG_KEY, None)
        if found is None:
            raise ValueError(
                f"This configuration has no '{CONFIG_KEY}' entry, so no projector was swapped in. "
                "Call lavis_svp.hosts.swap_projector(model, processor, projector=...) on the original model."
            )
        recipe = found if isinstance(found, SwapConfig) else build_options(cls, found, CONFIG_KEY)
        return cls(**{**vars(recipe), "grid": tuple(recipe.grid), "levels": tuple(recipe.levels)})

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {**asdict(self), "grid": list(self.grid), "levels": list(self.levels)}

    def build(self) -> Projector:
        """Build the projector, with fresh weights.

        Raises:
            UnknownNameError, ValueError: see :func:`build_projector`.
            ValueError: it needs levels, and none are named.
        """
        projector = build_projector(
            self.name, vision_dim=self.vision_dim, llm_dim=self.llm_dim, grid=self.grid, **self.options
        )
        if "levels" in projector.requires and not self.levels:
            raise ValueError(f"Projector '{self.name}' fuses several layers of the vision tower: pass levels=[...].")
        return projector

    def outline(self) -> Projector:
        """The projector without weights, to ask it for counts and needs."""
        with torch.device("meta"):
            return self.build()

    @property
    def wants(self) -> frozenset[str]:
        """What the projector needs of the vision tower besides the patches."""
        return self.outline().requires & ENCODER_OUTPUTS


def swapped_config(cls: type[C], original: PretrainedConfig, recipe: SwapConfig) -> C:
    """A host's configuration with a recipe; the parts' configurations are the same objects, as the parts are.

    Args:
        cls: the host's class that knows ``svp``.
        original: of the host.
        recipe: of the swap.
    """
    settings = {key: value for key, value in original.to_dict().items() if key != "model_type"}
    parts = {key: getattr(original, key) for key in original.sub_configs}
    return cls(**{**settings, **parts, CONFIG_KEY: recipe.to_dict()})
