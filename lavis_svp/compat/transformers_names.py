"""What LAVIS 1.0.2 still expects of transformers 4.26, for transformers 4.50 to 4.57."""

from __future__ import annotations

import importlib.metadata

INSTALL_TRANSFORMERS = "pip install transformers==4.57.6"


def restore_moved_names() -> None:
    """Put back the three functions that transformers 4.56 moved and that LAVIS imports.

    Raises:
        ImportError: transformers 5 or newer, which dropped what LAVIS's models are made of, or none at all.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"LAVIS needs transformers, which is not installed: {INSTALL_TRANSFORMERS}") from None
    if int(version.split(".")[0]) >= 5:
        raise ImportError(
            f"transformers {version} is installed, but LAVIS's models break with version 5 and newer. "
            f"lavis-svp is tested with 4.57.6: {INSTALL_TRANSFORMERS}"
        )
    from transformers import modeling_utils, pytorch_utils

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name))


def restore_generate() -> None:
    """Give LAVIS's text models ``generate`` back: since transformers 4.52 a PreTrainedModel has none."""
    from lavis.models import med
    from lavis.models.blip2_models import Qformer, modeling_opt, modeling_t5
    from transformers.generation import GenerationMixin

    for cls in (
        med.BertLMHeadModel,
        Qformer.BertLMHeadModel,
        modeling_opt.OPTForCausalLM,
        modeling_t5.T5ForConditionalGeneration,
    ):
        if not issubclass(cls, GenerationMixin):
            cls.__bases__ = (*cls.__bases__, GenerationMixin)
