"""Swap a projector: what a host's ``config.json`` says about it, the registry of hosts, and the initial weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import nn
from transformers import PretrainedConfig

from lavis_svp.common.options import build_options
from lavis_svp.common.registry import Registry, unknown_name
from lavis_svp.projectors import Projector, build_projector
from lavis_svp.vision.types import ENCODER_OUTPUTS, Grid

C = TypeVar("C", bound=PretrainedConfig)
CONFIG_KEY = "svp"
"""Key of the swap in the host's ``config.json`` and in its processor's JSON."""
DEVICE_KEY = "device"
"""Option of the superpixels that says where SAM runs."""
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
        superpixels: ``name`` of a superpixel generator and its options. ``one_pass`` and ``sam`` also take ``sam`` (a
            zoo name or the path of a checkpoint) and ``side``. Projectors without superpixels ignore it.
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
    superpixels: Mapping[str, Any] = field(default_factory=lambda: {"name": "one_pass"})
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
        """Return the entry as JSON stores it: without the device of the superpixels, which is this machine's."""
        superpixels = {key: value for key, value in self.superpixels.items() if key != DEVICE_KEY}
        lists = {"grid": list(self.grid), "levels": list(self.levels)}
        return {**asdict(self), "superpixels": superpixels, **lists}

    def build(self) -> Projector:
        """Build the projector with newly initialised weights.

        Raises:
            UnknownNameError, ValueError: see :func:`build_projector`; or the projector needs levels and there are none.
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
    """Base class in front of a host's configuration class: adds the entry ``svp``, :meth:`SwapConfig.to_dict`."""

    def __init__(self, svp: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, part in kwargs.items():
            if isinstance(part, PretrainedConfig):  # Qwen's class drops parts that are configurations already
                setattr(self, name, part)
        self.svp = svp


def swapped_config(cls: type[C], original: PretrainedConfig, swap: SwapConfig) -> C:
    """Copy a host's configuration into the class ``cls`` and add a swap; both share the parts' configurations."""
    settings = {key: value for key, value in original.to_dict().items() if key != "model_type"}
    parts = {key: getattr(original, key) for key in original.sub_configs}
    return cls(**{**settings, **parts, CONFIG_KEY: swap.to_dict()})


# ---------------------------------------------------------------- the hosts


@dataclass(frozen=True)
class SwapOptions:
    """The user's part of a swap: see :class:`SwapConfig`; the host adds the sizes."""

    projector: str
    projector_options: Mapping[str, Any]
    superpixels: Mapping[str, Any]
    levels: tuple[int, ...] = ()
    positions: PositionRule = "centroid"

    def to_config(self, vision_dim: int, llm_dim: int, grid: Grid) -> SwapConfig:
        """Add the widths of patch features and language model, and the usual (h, w) patch grid."""
        own = (self.projector_options, self.superpixels, self.levels, self.positions)
        return SwapConfig(self.projector, vision_dim, llm_dim, grid, *own)


class SwappedClasses(NamedTuple):
    """Our classes for a host: configuration, ``…ForConditionalGeneration`` and processor."""

    config: type[Any]
    model: type[Any]
    processor: type[Any]


HOSTS: Registry[Callable[[Any, Any, SwapOptions], tuple[Any, Any]]] = Registry("host")
"""Hosts by the ``model_type`` of their configuration; LAVIS models, which have none, by the name of their class.

A host is a function that takes a model, its processor and the options, and returns a new model and a new processor,
which share the parts of the old ones; the old ones keep working.
"""


def list_hosts() -> list[str]:
    """List the model types (``config.model_type``) that :func:`swap_projector` accepts, sorted."""
    return HOSTS.names()


def swap_projector(
    model: nn.Module,
    processor: Any,
    projector: str = "svp",
    *,
    superpixels: str | Mapping[str, Any] = "one_pass",
    levels: Sequence[int] = (),
    positions: PositionRule = "centroid",
    **options: Any,
) -> tuple[Any, Any]:
    """Give a multimodal language model another visual projector.

    ::

        model, processor = swap_projector(model, processor, "svp")
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        model.generate(**inputs)

    The new model shares vision tower and language model with the original, which does not change. The projector's
    head starts from the host's where the layers have the same shape; its other weights are untrained.

    Args:
        model: a host, see :func:`list_hosts`.
        processor: the host's processor.
        projector: a registered projector.
        superpixels: name of a superpixel generator, or ``{"name": ..., option: ...}``. Projectors without superpixels
            ignore it. ``one_pass`` and ``sam`` run SAM (MobileSAM by default) on the CPU, for seconds an image, unless
            ``processor.to("cuda")`` or an option ``device`` says otherwise; neither is saved.
        levels: hidden states of the vision tower, for projectors that fuse several.
        positions: ``centroid`` or ``sequential``, for Qwen's M-RoPE (:mod:`lavis_svp.hosts.mrope`); other hosts ignore
            it.
        options: the projector's own options.

    Returns:
        the model, and the processor, which makes the superpixels and repeats each image's placeholder.

    Raises:
        UnknownNameError: the model is no known host or was swapped already, or the projector is unknown.
        ValueError: the projector has no such option.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if kind not in HOSTS.names():
        raise unknown_name("host, by its config.model_type or class,", kind, HOSTS.names())
    section = {"name": superpixels} if isinstance(superpixels, str) else dict(superpixels)
    return HOSTS.get(kind)(model, processor, SwapOptions(projector, options, section, tuple(levels), positions))


def copy_head(projector: Projector, linears: Sequence[nn.Linear]) -> list[str]:
    """Copy the host's linear layers into the projector's head, if the head has the same layers.

    With ``mlp`` the swapped model then computes what it did before. `mask_pool`, `svp` and others start from a head
    that maps into the language model's embedding space already.

    Args:
        projector: newly initialised.
        linears: linear layers of the host's projector, in order.

    Returns:
        names of the untrained parameters, which the host does not have.
    """
    head = getattr(projector, "head", None)
    layers = [layer for layer in head if isinstance(layer, nn.Linear)] if isinstance(head, nn.Sequential) else []
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers]
    if not layers or shapes != [[tuple(p.shape) for p in layer.parameters()] for layer in linears]:
        return [name for name, _ in projector.named_parameters()]
    for target, source in zip(layers, linears, strict=True):
        target.load_state_dict(source.state_dict())
    copied = {id(p) for layer in layers for p in layer.parameters()}
    return [name for name, p in projector.named_parameters() if id(p) not in copied]


def copy_projector(projector: Projector, original: nn.Module) -> list[str]:
    """Copy the host's whole projector, if the new one has the same parameters under the same names.

    Returns:
        names of the untrained parameters: none or all.
    """
    targets, sources = dict(projector.named_parameters()), dict(original.named_parameters())
    if {k: p.shape for k, p in targets.items()} != {k: p.shape for k, p in sources.items()}:
        return list(targets)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])
    return []


def finish_swap(swapped: Any, model: Any, projector: Projector, untrained: Sequence[str]) -> None:
    """Share the output layer and generation settings, set the mode, and log the untrained parameters."""
    swapped.lm_head = model.lm_head
    swapped.generation_config = model.generation_config
    swapped.train(model.training)
    log_untrained(model.config.model_type, projector, untrained)


def log_untrained(host: str, projector: Projector, untrained: Sequence[str]) -> None:
    """Log which parameters of the swapped projector are untrained."""
    names = set(untrained)
    logging.info(
        "%s: projector '%s' has %d parameters, %d of them new and untrained: %s",
        host,
        projector.name,
        sum(p.numel() for p in projector.parameters()),
        sum(p.numel() for name, p in projector.named_parameters() if name in names),
        ", ".join(untrained) or "none",
    )
