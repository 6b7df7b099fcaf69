"""What `svp_ris` learns from: cross-entropy of its words, BCE and Dice of its masks, and the aids that are on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.heads.losses import mask_bce, mask_dice, mean_over_masks
from lavis_svp.heads.mask_head import Frame, SegMaskDecoder, frame_share, mask_to_sam_input, to_original
from lavis_svp.heads.readout import SegPrompts
from lavis_svp.language.causal_lm import LanguageModel
from lavis_svp.language.prompts import PromptBuilder
from lavis_svp.language.splice import splice
from lavis_svp.models.aids import AuxiliaryInputs, AuxiliaryLosses
from lavis_svp.models.answering import training_turn
from lavis_svp.models.encoded import Encoded
from lavis_svp.models.options import ModelOptions
from lavis_svp.models.samples import first_per_image, step
from lavis_svp.models.texts import parse_targets


class TrainingLosses:
    """The losses of a model that encodes images, speaks, and decodes masks."""

    options: ModelOptions
    language: LanguageModel
    prompts: PromptBuilder
    mask_head: SegMaskDecoder
    aids: AuxiliaryLosses
    device: torch.device
    training: bool

    def read_prompts(self, encoded: Encoded, states: Tensor, image: Tensor) -> SegPrompts:
        """Prompts of the mask decoder, from the states that predict ``[SEG]``."""
        raise NotImplementedError

    def decode(self, encoded: Encoded, prompts: SegPrompts, image: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits and estimated IoU of the prompts that are kept."""
        raise NotImplementedError

    def losses(self, encoded: Encoded, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """``loss`` and its parts.

        Args:
            encoded: the batch's images.
            samples: their texts, masks and instances, see :meth:`SvpRis.forward`.

        Returns:
            ``loss``, the weighted sum, and each part unweighted; in the alignment stage those of the projector alone.

        Raises:
            ValueError: the texts hold more or fewer ``[SEG]`` than there are expressions with a target.
        """
        aligned = {
            "loss_word": self.aids.alignment_loss(encoded, samples, self.language, self.device),
            "loss_place": self.aids.place_loss(encoded, self.language),
        }
        if self.training and self.aids.in_alignment_stage(step(samples)):
            if aligned["loss_word"] is None:
                # a batch without named instances goes backward through the projector all the same, as _no_masks does
                aligned["loss_word"] = 0.0 * encoded.visual.tokens.sum()
            return self._total(aligned)
        said = parse_targets(samples)
        alone = self.options.layout != "conversation"
        turns = [
            [
                training_turn(self.prompts, text, answer, real, index, first=index == 0 or alone)
                for index, (text, answer, real) in enumerate(zip(*image, strict=True))
            ]
            for image in zip(said.texts, said.answers, said.has_target, strict=True)
        ]
        plan = splice(
            self.prompts.prefix_ids(),
            encoded.counts,
            turns,
            self.options.layout,
            self.language.max_length,
            self.device,
            encoded.positions,
        )
        embeddings = plan.embeddings(self.language.embed(plan.ids), encoded.visual.tokens)
        states = self.language(embeddings, plan.attention_mask(embeddings.dtype), plan.positions)
        losses = {"loss_ce": self.language.loss(states, plan.labels)}
        rows, columns, image, expression = plan.before_token(self.language.seg_id)
        wanted = sum(sum(reals) for reals in said.has_target)
        if len(rows) != wanted:
            raise ValueError(f"{wanted} expressions have a target but the text holds {len(rows)} [SEG] tokens.")
        losses.update(self._mask_losses(encoded, states[rows, columns], image, expression, said.masks))
        return self._total({**losses, **aligned})

    def _mask_losses(
        self, encoded: Encoded, states: Tensor, image: Tensor, expression: Tensor, masks: list[list[Any]]
    ) -> dict[str, Tensor]:
        if len(states) == 0:
            return self._no_masks(encoded, states)
        prompts = self.read_prompts(encoded, states, image)
        targets = [masks[p][e] for p, e in zip(image.tolist(), expression.tolist(), strict=True)]
        inputs = AuxiliaryInputs(encoded, prompts, image, targets, self.mask_head)
        losses = self.aids.prompt_losses(inputs)
        kept = first_per_image(image, self.options.sam.max_masks_per_image)
        logits, _ = self.decode(encoded, prompts, image, kept)
        bce, dice = [], []
        for row, index in enumerate(kept.tolist()):
            frame = encoded.frozen.frames[int(image[index])]
            scores, target = self._comparable(logits[row], targets[index], frame)
            bce.append(mask_bce(scores, target))
            dice.append(mask_dice(scores, target))
        return {**losses, "loss_bce": mean_over_masks(bce), "loss_dice": mean_over_masks(dice)}

    def _no_masks(self, encoded: Encoded, states: Tensor) -> dict[str, Tensor]:
        """Losses of zero for a batch without any target.

        Every part runs all the same, on a state of zeros: processes that train together exchange the gradients of (and
        under ZeRO-3 gather) the same parts in every batch.
        """
        image = torch.zeros(1, dtype=torch.long, device=self.device)
        prompts = self.read_prompts(encoded, states.new_zeros(1, states.shape[-1]), image)
        logits, _ = self.decode(encoded, prompts, image, image)
        nothing = 0.0 * (logits.sum() + prompts.sparse.sum())
        return {"loss_bce": nothing, "loss_dice": nothing}

    def _comparable(self, logits: Tensor, target: np.ndarray, frame: Frame) -> tuple[Tensor, Tensor]:
        """Logits and target of one mask at the resolution the loss is taken at, padding excluded."""
        if tuple(target.shape) != frame.original_size:
            raise ValueError(f"A mask of {target.shape} belongs to an image of {frame.original_size}.")
        truth = torch.as_tensor(target, device=logits.device).float()
        if self.options.losses.resolution == "original":
            return to_original(logits[None], frame)[0], truth
        size = (int(logits.shape[0]), int(logits.shape[1]))
        inside = frame_share(frame, size, logits.device) > 0  # (4h, 4w)
        rows, columns = int(inside[:, 0].sum()), int(inside[0].sum())
        return logits[:rows, :columns], mask_to_sam_input(truth[None], frame, size)[0, :rows, :columns]

    def _total(self, losses: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        weights = {
            "loss_ce": self.options.losses.ce,
            "loss_bce": self.options.losses.bce,
            "loss_dice": self.options.losses.dice,
            **self.aids.weights(),
        }
        present = {name: value for name, value in losses.items() if value is not None}
        total = sum((weights[name] * value for name, value in present.items()), torch.zeros((), device=self.device))
        return {"loss": total, **present}
