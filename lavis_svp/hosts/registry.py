"""Hosts by name: which multimodal language models a projector can be swapped into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lavis_svp.common.registry import Registry, unknown_name


@dataclass(frozen=True)
class SwapChoices:
    """What a user asks of a swap; the host adds the sizes.

    Args:
        projector: a registered projector.
        options: its own choices.
        superpixels: ``name`` of a superpixel generator and its options.
        levels: hidden states of the vision tower, for projectors that fuse several.
        positions: where the tokens stand for a language model with M-RoPE.
    """

    projector: str
    options: Mapping[str, Any]
    superpixels: Mapping[str, Any]
    levels: tuple[int, ...] = ()
    positions: str = "centroid"


class Host(Protocol):
    """Swaps a projector into one kind of model."""

    def __call__(self, model: Any, processor: Any, choices: SwapChoices) -> tuple[Any, Any]:
        """Return a new model and a new processor around the parts of the old ones, which keep working as they were."""


HOSTS: Registry[Host] = Registry("host")
"""By the ``model_type`` of the host's configuration; a LAVIS model, which has none, by the name of its class."""


def list_hosts() -> list[str]:
    """The kinds of models (``config.model_type``) that :func:`swap_projector` takes, sorted."""
    return HOSTS.names()


def swap_projector(
    model: nn.Module,
    processor: Any,
    projector: str = "svp",
    *,
    superpixels: str | Mapping[str, Any] = "sam",
    levels: Sequence[int] = (),
    positions: str = "centroid",
    **options: Any,
) -> tuple[Any, Any]:
    """Give a multimodal language model another visual projector.

    ::

        model, processor = swap_projector(model, processor, "svp")
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        model.generate(**inputs)

    The result shares vision tower and language model with the original, which is left as it was. The projector's head
    starts from the host's own where the layers coincide; everything else of it is untrained.

    Args:
        model: a host, see :func:`list_hosts`.
        processor: the host's processor.
        projector: a registered projector.
        superpixels: a superpixel generator's name, or ``{"name": ..., option: ...}``; unread by projectors that need
            none.
        levels: hidden states of the vision tower that projectors fusing several layers get.
        positions: ``centroid`` or ``sequential``, for Qwen's M-RoPE (:mod:`lavis_svp.hosts.mrope`); unread by others.
        options: the projector's own choices.

    Returns:
        the model and the processor; the processor makes the superpixels, and writes each image's placeholders.

    Raises:
        UnknownNameError: this kind of model is no known host, or there is no such projector.
        ValueError: an option the projector does not have, or a model whose projector was swapped already.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if kind not in HOSTS.names():
        raise unknown_name("host, by its config.model_type or class,", kind, HOSTS.names())
    section = {"name": superpixels} if isinstance(superpixels, str) else dict(superpixels)
    return HOSTS.get(kind)(model, processor, SwapChoices(projector, options, section, tuple(levels), positions))
