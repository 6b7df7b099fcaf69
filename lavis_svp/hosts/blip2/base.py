"""What ``blip2_opt_svp`` and ``blip2_t5_svp`` share: images to visual tokens, prompts, generation, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from lavis.common.dist_utils import download_cached_file
from lavis.common.utils import is_url
from lavis.models.base_model import BaseModel
from lavis.models.blip2_models.blip2 import Blip2Base
from lavis.processors.blip_processors import BlipImageBaseProcessor
from torch import Tensor, nn

from lavis_svp.common.checkpoints import WrongCheckpointError, load_trained_state, shorten, trained_state
from lavis_svp.hosts.blip2.parts import Vision, build_checked_projector, vision_grid
from lavis_svp.hosts.images import build_generator
from lavis_svp.hosts.swap import DEVICE_KEY, SwapConfig
from lavis_svp.models.checkpoint import find_weights, read_weights
from lavis_svp.projectors import PatchFeatures, Projector, Superpixels, VisualTokens
from lavis_svp.projectors.layers import patch_order
from lavis_svp.superpixels import RegionMap
from lavis_svp.vision.backbone import VisionEncoder

QFORMER = ("Qformer.", "query_tokens")
"""Names in BLIP-2's checkpoints of what a projector replaces."""
IGNORED = -100
"""Label of unsupervised positions, as in torch's cross entropy."""


class ProjectedBlip2(Blip2Base):
    """A BLIP-2 without Q-Former. Subclasses add the language model and :meth:`write`.

    The vision encoder's patches, without CLS, go through a projector under LAVIS's own name, so that checkpoints have
    ``opt_proj.…`` or ``t5_proj.…`` as BLIP-2's do. The superpixels are computed from ``samples["image"]``,
    un-normalised: whatever crop, flip or stretch LAVIS's processors applied, patches and superpixels show the same
    pixels.

    Args:
        vision: the encoder and its norm.
        swap: the projector.
        projector_name: attribute of the projector.
    """

    answer_length_penalty: ClassVar[float]
    """LAVIS's length penalty of answers."""
    write: Any
    """A method, (visual, prompts, min_tokens, **decoding) -> texts: generate a text of at least ``min_tokens`` tokens
    after each image and prompt, with arguments of transformers' ``generate``."""
    prompt: str
    _apply_lemmatizer: bool = False  # LAVIS's name

    def __init__(self, vision: Vision, swap: SwapConfig, projector_name: str) -> None:
        BaseModel.__init__(self)  # not BLIP-2's, which would load a Q-Former
        self.visual_encoder, self.ln_vision = vision
        self.swap = swap
        self.projector_name = projector_name
        projector = build_checked_projector(swap, vision.visual_encoder)
        self.add_module(projector_name, projector)
        if "superpixels" in projector.requires:
            build_generator(swap.superpixels)  # raises now if the options are wrong; SAM's weights are loaded later
        normalize = BlipImageBaseProcessor().normalize
        self.register_buffer("mean", torch.tensor(normalize.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalize.std).view(3, 1, 1), persistent=False)

    @property
    def projector(self) -> Projector:
        """The projector, whatever the name of its attribute."""
        projector = getattr(self, self.projector_name)
        assert isinstance(projector, Projector)
        return projector

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
        """Encode processed images (B, 3, H, W)."""
        if isinstance(self.visual_encoder, VisionEncoder):
            return self.visual_encoder(self.pixels(image))
        with self.maybe_autocast():
            states = self.ln_vision(self.visual_encoder(image))  # (B, 1 + N, C)
        return PatchFeatures.whole(states[:, 1:].float(), vision_grid(self.visual_encoder))

    def superpixels(
        self, image: Tensor, features: PatchFeatures, region_maps: Sequence[RegionMap] | None
    ) -> Superpixels | None:
        """Compute the superpixels of processed images (B, 3, H, W), where there are no region maps of them yet.

        SAM runs where the images are, unless the option ``device`` of the superpixels names another place.

        Returns:
            None for a projector without superpixels.
        """
        if "superpixels" not in self.projector.requires:
            return None
        if region_maps is None:
            generator = build_generator(self.swap.superpixels, self.swap.superpixels.get(DEVICE_KEY, image.device))
            region_maps = generator(to_uint8_arrays(self.pixels(image)))
        mask_size = self.projector.mask_size
        return Superpixels.from_region_maps(region_maps, features.grids, mask_size=mask_size, device=image.device)

    def visual_tokens(self, samples: Mapping[str, Any]) -> VisualTokens:
        """Project ``samples["image"]``, with the superpixels of ``samples["region_map"]`` if there are any."""
        image = samples["image"]
        features = self.patch_features(image)
        return self.projector(features, self.superpixels(image, features, samples.get("region_map")))

    # ---------------------------------------------------------------- text

    @torch.no_grad()
    def generate(
        self,
        samples: dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
    ) -> list[str]:
        """Write captions, ``num_captions`` per image.

        The arguments are LAVIS's. ``samples`` has ``image`` (B, 3, H, W) and optionally ``prompt``, a text or B of
        them, and ``region_map``. With ``use_nucleus_sampling`` T5 also samples within beams. T5's start token counts
        in ``min_length``, as in LAVIS; OPT's prompt does not, unlike in LAVIS.
        """
        sampling = {"do_sample": True, "top_p": top_p, "temperature": temperature} if use_nucleus_sampling else {}
        return self.write(
            self.visual_tokens(samples),
            self.prompts(samples, self.prompt),
            min_length,
            num_beams=num_beams,
            max_new_tokens=max_length,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_return_sequences=num_captions,
            **sampling,
        )

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: list[str] | None = None,
        prompt: str = "",
        length_penalty: float | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Answer questions, as LAVIS's VQA task calls it (LAVIS 1.0.2's OPT has no such method).

        ``samples`` has ``image`` (B, 3, H, W), ``text_input``, B questions, and optionally ``region_map``; ``prompt``
        is a text with ``{}`` in place of the question, "" the question alone. ``length_penalty`` is by default LAVIS's,
        0 for OPT and -1 for T5. ``num_ans_candidates`` and ``answer_list``, for ranking models, are not used.

        Raises:
            ValueError: an inference method other than "generate".
        """
        answers = self.write(
            self.visual_tokens(samples),
            self.questions(samples, prompt, inference_method),
            min_len,
            num_beams=num_beams,
            max_new_tokens=max_len,
            length_penalty=self.answer_length_penalty if length_penalty is None else length_penalty,
        )
        return self._lemmatize(answers) if self._apply_lemmatizer else answers

    def prompts(self, samples: Mapping[str, Any], default: str) -> list[str]:
        """Return one prompt per image: ``samples["prompt"]`` (a text, or one for each), or the default.

        Raises:
            ValueError: the number of prompts differs from the number of images.
        """
        count = len(samples["image"])
        prompt = samples.get("prompt", default)
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{count} images need one prompt or {count}, got {len(prompts)}.")
        return prompts

    def questions(self, samples: Mapping[str, Any], prompt: str, inference_method: str) -> list[str]:
        """Put the questions ``samples["text_input"]`` into the prompt, in place of its ``{}``.

        Raises:
            ValueError: an inference method other than generating.
        """
        if inference_method != "generate":
            raise ValueError(
                f"inference_method '{inference_method}' is unknown to this model, which writes its answers: "
                "set run.inference_method: generate."
            )
        questions = samples["text_input"]
        questions = [questions] if isinstance(questions, str) else list(questions)
        return [prompt.format(question) for question in questions] if prompt else questions

    # ---------------------------------------------------------------- weights

    def load_from_pretrained(self, url_or_filename: str) -> None:
        """Start from a BLIP-2 of LAVIS (file, folder or URL), without its Q-Former and projection, or an earlier stage.

        Raises:
            FileNotFoundError: the file does not exist.
            WrongCheckpointError: a tensor has another shape than the model's, or the model has none of them.
        """
        state = self._read(url_or_filename)
        model = self.state_dict(keep_vars=True)
        fitting = {name: tensor for name, tensor in state.items() if name in model}
        shapes = [name for name, tensor in fitting.items() if model[name].shape != tensor.shape]
        if shapes or not fitting:
            problem = f"tensors of another shape: {shorten(shapes)}" if shapes else "nothing that this model has"
            raise WrongCheckpointError(f"model.pretrained: {url_or_filename} holds {problem}.")
        replaced = (*QFORMER, f"{self.projector_name}.")
        left_out = [name for name in state if name not in model]
        with torch.no_grad():
            for name, tensor in fitting.items():
                model[name].copy_(tensor)
        logging.info(
            "Started from %s: %d tensors. Left out, replaced by the projector: %s. Left out, unknown: %s. "
            "Randomly initialised: %s.",
            url_or_filename,
            len(fitting),
            shorten([name for name in left_out if name.startswith(replaced)]) or "none",
            shorten([name for name in left_out if not name.startswith(replaced)]) or "none",
            shorten([name for name in trained_state(self) if name not in fitting]) or "none",
        )

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load the trained weights of this model; frozen weights in the file are ignored.

        Raises:
            FileNotFoundError: the file does not exist.
            WrongCheckpointError: a trained tensor is missing, or the file is another model's; the message lists them.
        """
        state, model, trained = self._read(url_or_filename), self.state_dict(), trained_state(self)
        load_trained_state(self, {n: t for n, t in state.items() if n in trained or n not in model}, url_or_filename)
        logging.info("Loaded trained weights from %s", url_or_filename)

    def load_checkpoint_from_config(self, cfg: Any, **kwargs: Any) -> None:
        """Load the checkpoints whose flags are set in a ``model:`` section; each needs a path."""
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


def to_uint8_arrays(pixels: Tensor) -> list[np.ndarray]:
    """Convert (B, 3, H, W) RGB in [0, 1] to (H, W, 3) uint8 arrays for superpixel generators."""
    levels = (pixels.detach() * np.iinfo(np.uint8).max).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())  # B x (H, W, 3)


def embed(language: Any, ids: Tensor) -> Tensor:
    """Look up the embeddings (B, W, D) of ids (B, W)."""
    table: nn.Module = language.get_input_embeddings()
    return table(ids)


# ---------------------------------------------------------------- the sequence


@dataclass
class JoinedSequence:
    """Input of the language model.

    Args:
        embeddings: (B, L, D), zero at padding.
        mask: (B, L) int64, 1 at real positions.
        labels: (B, L) int64, IGNORED at visual tokens and padding; None without labels.
    """

    embeddings: Tensor
    mask: Tensor
    labels: Tensor | None = None


def join(
    visual: VisualTokens,
    text: Tensor,
    text_mask: Tensor,
    labels: Tensor | None = None,
    padding: Literal["left", "right"] = "right",
) -> JoinedSequence:
    """Put each row's visual tokens directly before its text, and all its padding at one end.

    BLIP-2 concatenates two full blocks, because its 32 queries are never padded. With ragged images that would leave
    gaps between image and text. OPT counts positions along the mask and would ignore them, but T5's relative positions
    include the gaps, so a caption would depend on the other images of its batch.

    Args:
        visual: visual tokens of B images.
        text: (B, W, D) embeddings; they determine the dtype.
        text_mask: (B, W), 1 at real tokens; padding may be on either side.
        labels: (B, W).
        padding: "right" for training and encoders, "left" where a decoder continues from the last position.
    """
    batch, count = visual.valid.shape
    embeddings = torch.cat([visual.tokens.to(text.dtype), text], dim=1)  # (B, T + W, D)
    real = torch.cat([visual.valid, text_mask.bool()], dim=1)  # (B, T + W)
    order = patch_order(real) if padding == "right" else patch_order(~real)  # (B, T + W)
    longest = int(real.sum(dim=1).max())
    order = order[:, :longest] if padding == "right" else order[:, -longest:]  # (B, L)
    rows = torch.arange(batch, device=order.device)[:, None]
    mask = real[rows, order]  # (B, L)
    joined = JoinedSequence(embeddings[rows, order] * mask[..., None].to(text.dtype), mask.long())
    if labels is not None:
        all_labels = torch.cat([labels.new_full((batch, count), IGNORED), labels], dim=1)  # (B, T + W)
        joined.labels = all_labels[rows, order].masked_fill(~mask, IGNORED)  # (B, L)
    return joined
