"""SwapConfig: what a swap writes into a host's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from transformers import PretrainedConfig

from lavis_svp.common.options import build_options
from lavis_svp.projectors import Projector, build_projector
from lavis_svp.vision.types import ENCODER_OUTPUTS, Grid

C = TypeVar("C", bound=PretrainedConfig)
CONFIG_KEY = "svp"
"""Key of the swap in the host's ``config.json`` and in its processor's JSON."""
PositionRule = Literal["centroid", "sequential"]


@dataclass(frozen=True)
class SwapConfig:
    """A swapped projector, as the host's configuration stores it. The field names are the keys of the JSON.

    Args:
        name: a registered projector.
        vision_dim: C, the width of the host's patch features.
        llm_dim: D, the width of the host's language model.
        grid: the usual (h, w) patch grid.
        options: the projector's own options.
        superpixels: ``name`` of a superpixel generator and its options. ``sam`` also takes ``sam`` (a zoo name or the
            path of a checkpoint) and ``side``. Projectors without superpixels ignore it.
        levels: hidden states of the vision tower, for projectors that fuse several.
        positions: M-RoPE positions of visual tokens (:mod:`lavis_svp.hosts.mrope`); other hosts ignore it.

    Raises:
        ValueError: ``positions`` is not a known rule.
    """

    name: str
    vision_dim: int
    llm_dim: int
    grid: Grid
    options: Mapping[str, Any] = field(default_factory=dict)
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "sam"})
    levels: tuple[int, ...] = ()
    positions: PositionRule = "centroid"

    def __post_init__(self) -> None:
        if self.positions not in get_args(PositionRule):
            raise ValueError(f"positions must be one of {', '.join(get_args(PositionRule))}; got {self.positions!r}.")

    @classmethod
    def of(cls, config: Any) -> SwapConfig:
        """Read the ``svp`` entry of a configuration or of a mapping.

        Raises:
            ValueError: the entry is missing or has unknown keys.
        """
        entry = config.get(CONFIG_KEY) if isinstance(config, Mapping) else getattr(config, CONFIG_KEY, None)
        if entry is None:
            raise ValueError(
                f"This configuration has no '{CONFIG_KEY}' entry, so no projector was swapped in. "
                "Call lavis_svp.hosts.swap_projector(model, processor, projector=...) on the original model."
            )
        swap = entry if isinstance(entry, SwapConfig) else build_options(cls, entry, CONFIG_KEY)
        return cls(**{**vars(swap), "grid": tuple(swap.grid), "levels": tuple(swap.levels)})

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON stores it."""
        return {**asdict(self), "grid": list(self.grid), "levels": list(self.levels)}

    def build(self) -> Projector:
        """Build the projector with newly initialised weights.

        Raises:
            UnknownNameError, ValueError: see :func:`build_projector`.
            ValueError: the projector needs levels and there are none.
        """
        projector = build_projector(
            self.name, vision_dim=self.vision_dim, llm_dim=self.llm_dim, grid=self.grid, **self.options
        )
        if "levels" in projector.requires and not self.levels:
            raise ValueError(f"Projector '{self.name}' fuses several layers of the vision tower: pass levels=[...].")
        return projector

    def on_meta(self) -> Projector:
        """Build the projector on the meta device, for its token counts and requirements."""
        with torch.device("meta"):
            return self.build()

    @property
    def encoder_outputs(self) -> frozenset[str]:
        """What the projector needs from the vision tower in addition to the patches."""
        return self.on_meta().requires & ENCODER_OUTPUTS


class SwappedConfig:
    """Base class in front of a host's configuration class: adds the ``svp`` entry.

    Args:
        svp: :meth:`SwapConfig.to_dict`.
        kwargs: the host's own settings.
    """

    def __init__(self, svp: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        parts = {name: part for name, part in kwargs.items() if isinstance(part, PretrainedConfig)}
        for name, part in parts.items():  # Qwen's class drops parts that are configurations already
            setattr(self, name, part)
        self.svp = svp


def swapped_config(cls: type[C], original: PretrainedConfig, swap: SwapConfig) -> C:
    """Copy a host's configuration and add a swap; both share the configurations of their parts.

    Args:
        cls: the configuration class with an ``svp`` entry.
        original: configuration of the host.
        swap: the swap to add.
    """
    settings = {key: value for key, value in original.to_dict().items() if key != "model_type"}
    parts = {key: getattr(original, key) for key in original.sub_configs}
    return cls(**{**settings, **parts, CONFIG_KEY: swap.to_dict()})
