"""The colours that published weights were trained with, where they are not their family's usual ones."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from lavis_svp.encoders.families import Colour, VisionFamily


def with_own_colours(family: VisionFamily, source: str | os.PathLike[str]) -> VisionFamily:
    """The family with the mean and deviation that the weights' ``preprocessor_config.json`` names.

    Within a family they differ: OpenCLIP's ViT-L/14 of LAION-2B was trained with (0.5, 0.5, 0.5), others with CLIP's.

    Args:
        family: of the weights.
        source: a local folder or a hub id; without that file the family's colours stay.

    Raises:
        ValueError: the file is damaged, or its colours are not three numbers.
    """
    try:
        file = cached_file(source, IMAGE_PROCESSOR_NAME)
    except OSError:  # there is none
        return family
    if file is None:
        return family
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        mean = _colour(settings.get("image_mean"), family.mean)
        std = _colour(settings.get("image_std"), family.std)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not say how to normalise images ({error}). Download it again.") from error
    return replace(family, mean=mean, std=std)


def _colour(given: Any, usual: Colour) -> Colour:
    if given is None:
        return usual
    red, green, blue = (float(value) for value in given)
    return red, green, blue
