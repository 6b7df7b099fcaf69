"""What ``blip2_opt_svp`` and ``blip2_t5_svp`` share: images to visual tokens, prompts, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from lavis.common.dist_utils import download_cached_file
from lavis.common.utils import is_url
from lavis.models.base_model import BaseModel
from lavis.models.blip2_models.blip2 import Blip2Base
from lavis.processors.blip_processors import BlipImageBaseProcessor
from torch import Tensor, nn

from lavis_svp.common.checkpoints import WrongCheckpointError, load_trained_state, shorten, trained_state
from lavis_svp.encoders.vision import VisionEncoder
from lavis_svp.hosts.blip2.parts import Vision, build_checked, vision_grid
from lavis_svp.hosts.images import build_generator
from lavis_svp.hosts.recipe import SwapConfig
from lavis_svp.models.pretrained import find_weights, read_weights
from lavis_svp.projectors import PatchFeatures, Projector, Superpixels, VisualTokens
from lavis_svp.superpixels import RegionMap, SuperpixelGenerator

QFORMER = ("Qformer.", "query_tokens")
"""Names in BLIP-2's checkpoints that a projector replaces."""


class ProjectedBlip2(Blip2Base):
    """A BLIP-2 without Q-Former, before its language model is attached.

    The vision encoder's patches, without CLS, go through a projector that stands under LAVIS's own name, so that
    checkpoints say ``opt_proj.…`` or ``t5_proj.…`` as BLIP-2's do.

    Superpixels are made from ``samples["image"]`` itself, un-normalised: whatever crop, flip or stretch LAVIS's
    processors applied, patches and superpixels show the same pixels.

    Args:
        vision: the encoder and its norm.
        recipe: of the projector.
        projector_name: attribute under which it stands.
    """

    def __init__(self, vision: Vision, recipe: SwapConfig, projector_name: str) -> None:
        BaseModel.__init__(self)  # not BLIP-2's, which would load a Q-Former
        self.visual_encoder, self.ln_vision = vision
        self.recipe = recipe
        self.projector_name = projector_name
        projector = build_checked(recipe, vision.visual_encoder)
        self.add_module(projector_name, projector)
        self.generator: SuperpixelGenerator | None = None
        if "superpixels" in projector.requires:
            self.generator = build_generator(recipe.superpixels)
        shown_by_lavis = BlipImageBaseProcessor().normalize
        self.register_buffer("mean", torch.tensor(shown_by_lavis.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(shown_by_lavis.std).view(3, 1, 1), persistent=False)

    @property
    def projector(self) -> Projector:
        """The projector, whatever its attribute is called."""
        found = getattr(self, self.projector_name)
        assert isinstance(found, Projector)
        return found

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a vision encoder without trainable weights stays in evaluation mode, as in LAVIS."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.visual_encoder.parameters()):
            self.visual_encoder.eval()
        return self

    # ---------------------------------------------------------------- images

    def pixels(self, image: Tensor) -> Tensor:
        """Undo the normalisation of LAVIS's processors: (B, 3, H, W) RGB in [0, 1]."""
        return (image.float() * self.std + self.mean).clamp(0.0, 1.0)

    def patch_features(self, image: Tensor) -> PatchFeatures:
        """Patches of processed images (B, 3, H, W)."""
        if isinstance(self.visual_encoder, VisionEncoder):
            return self.visual_encoder(self.pixels(image))
        with self.maybe_autocast():
            states = self.ln_vision(self.visual_encoder(image))  # (B, 1 + N, C)
        features = PatchFeatures.whole(states[:, 1:].float(), vision_grid(self.visual_encoder))
        return replace(features, summary=states[:, 0].float())

    def superpixels(
        self, image: Tensor, features: PatchFeatures, given: Sequence[RegionMap] | None
    ) -> Superpixels | None:
        """Superpixels of processed images; None for a projector without.

        Args:
            image: (B, 3, H, W).
            features: of the same images, for their grids.
            given: region maps of the processed images, where the caller has them.

        Raises:
            ValueError: another number of region maps than of images.
        """
        if self.generator is None:
            return None
        if given is None:
            given = self.generator(as_images(self.pixels(image)))
        mask_size = self.projector.mask_size
        return Superpixels.from_region_maps(given, features.grids, mask_size=mask_size, device=image.device)

    def visual_tokens(self, samples: Mapping[str, Any]) -> VisualTokens:
        """The visual tokens of ``samples["image"]``; ``samples["region_map"]`` may hold its superpixels.

        Args:
            samples: a batch as LAVIS's data sets give it.
        """
        image = samples["image"]
        features = self.patch_features(image)
        return self.projector(features, self.superpixels(image, features, samples.get("region_map")))

    # ---------------------------------------------------------------- text

    def prompts(self, samples: Mapping[str, Any], default: str) -> list[str]:
        """One prompt an image: ``samples["prompt"]`` (a text, or one for each), or the default.

        Raises:
            ValueError: another number of prompts than of images.
        """
        count = len(samples["image"])
        prompt = samples.get("prompt", default)
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{count} images need one prompt or {count}, got {len(prompts)}.")
        return prompts

    def questions(self, samples: Mapping[str, Any], prompt: str, inference_method: str) -> list[str]:
        """The questions of ``samples["text_input"]``, each within the prompt that holds ``{}``.

        Raises:
            ValueError: an inference method other than generating.
        """
        if inference_method != "generate":
            raise ValueError(
                f"inference_method '{inference_method}' is unknown to this model, which writes its answers: "
                "set run.inference_method: generate."
            )
        asked = samples["text_input"]
        asked = [asked] if isinstance(asked, str) else list(asked)
        return [prompt.format(question) for question in asked] if prompt else asked

    # ---------------------------------------------------------------- weights

    def load_from_pretrained(self, url_or_filename: str) -> None:
        """Start from a BLIP-2 of LAVIS, whose Q-Former and projection are left out, or from an earlier stage.

        Args:
            url_or_filename: a checkpoint, its folder, or a URL, which LAVIS downloads.

        Raises:
            FileNotFoundError: no such file.
            WrongCheckpointError: a tensor of another shape than the model's, or none that the model has.
        """
        state = self._read(url_or_filename)
        own = self.state_dict(keep_vars=True)
        fitting = {name: tensor for name, tensor in state.items() if name in own}
        shapes = [name for name, tensor in fitting.items() if own[name].shape != tensor.shape]
        if shapes or not fitting:
            problem = f"tensors of another shape: {shorten(shapes)}" if shapes else "nothing that this model has"
            raise WrongCheckpointError(f"model.pretrained: {url_or_filename} holds {problem}.")
        replaced = (*QFORMER, f"{self.projector_name}.")
        old = [name for name in state if name not in own and name.startswith(replaced)]
        others = [name for name in state if name not in own and not name.startswith(replaced)]
        with torch.no_grad():
            for name, tensor in fitting.items():
                own[name].copy_(tensor)
        new = [name for name in trained_state(self) if name not in fitting]
        logging.info(
            "Started from %s: %d tensors. Left out, replaced by the projector: %s. Left out, unknown: %s. Fresh: %s.",
            url_or_filename,
            len(fitting),
            shorten(old) or "none",
            shorten(others) or "none",
            shorten(new) or "none",
        )

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load what this model trained; frozen weights in the file are passed over.

        Raises:
            FileNotFoundError: no such file.
            WrongCheckpointError: a trained tensor is missing, or the file is another model's; the message lists them.
        """
        state, own, trained = self._read(url_or_filename), self.state_dict(), trained_state(self)
        load_trained_state(self, {n: t for n, t in state.items() if n in trained or n not in own}, url_or_filename)
        logging.info("Loaded trained weights from %s", url_or_filename)

    def load_checkpoint_from_config(self, cfg: Any, **kwargs: Any) -> None:
        """As LAVIS's, but loads only what the flags ask for.

        Raises:
            ValueError: a flag is set and its path is not.
        """
        for flag, key, load in (
            ("load_pretrained", "pretrained", self.load_from_pretrained),
            ("load_finetuned", "finetuned", self.load_checkpoint),
        ):
            if cfg.get(flag, False):
                if not cfg.get(key, ""):
                    raise ValueError(f"model.{flag} is True, but model.{key} names no checkpoint or folder.")
                load(cfg.get(key))

    @staticmethod
    def _read(url_or_filename: str) -> dict[str, Tensor]:
        if is_url(url_or_filename):
            url_or_filename = download_cached_file(url_or_filename, check_hash=False, progress=True)
        return read_weights(find_weights(url_or_filename))


def as_images(pixels: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) RGB in [0, 1] as the (H, W, 3) uint8 arrays that superpixel generators take."""
    levels = (pixels.detach().cpu() * np.iinfo(np.uint8).max).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).contiguous().numpy())  # B x (H, W, 3)


def embed(language: Any, ids: Tensor) -> Tensor:
    """Embeddings (B, W, D) of ids (B, W)."""
    table: nn.Module = language.get_input_embeddings()
    return table(ids)
