"""The data set of questions and captions: one item = one image with some of its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_svp.datasets.augment import mirror_text
from lavis_svp.datasets.placement import Placement
from lavis_svp.datasets.refcoco import Expression, ReferredImage
from lavis_svp.datasets.referring import MIRRORED_SUFFIX, ReferringDataset

_ANSWER_STREAM = 1  # of the random numbers; the base class draws from its own


class AnsweringDataset(ReferringDataset):
    """Images with texts that are answered in words; drawn, cached and collated as expressions are.

    A sample is :class:`~lavis_svp.datasets.referring.ReferringDataset`'s with the words in ``text_output``: in
    training one of a text's answers, drawn anew each epoch; in evaluation the first. ``masks`` holds None. An empty
    ``text_input`` asks for a caption. A mirrored image's answers are mirrored, too; one whose answers cannot be is
    not mirrored.

    With ``drawing.max_expressions`` 1, an item of an evaluation is one text, and ``text_input`` a string: the form that
    LAVIS's own tasks take, with ``question_id`` as a tensor.

    Args:
        args: see :class:`~lavis_svp.datasets.referring.ReferringDataset`; ``source`` must be given.
        kwargs: likewise.
    """

    coco_fmt_qust_file: str | None = None
    """File of the questions, for LAVIS's VQA task; None where there is none, or several."""
    coco_fmt_anno_file: str | None = None
    """File of their answers."""
    answer_list: list[str] | None = None
    """The answers to choose from with inference method "rank"."""
    ground_truth: tuple[Path, ...] = ()
    """The files that evaluation reads: (questions, annotations) or (captions,)."""

    def sample(self, index: int) -> dict[str, Any]:
        """One image with some of its texts, or an error that names it; see :meth:`ReferringDataset.sample`."""
        sample = super().sample(index)
        image = self.annotation[self._items[index][0]]
        by_id = {expression.expression_id: expression.answers or () for expression in image.expressions}
        rng = np.random.default_rng([self.options.seed, self.epoch, index, _ANSWER_STREAM])
        mirrored = sample["image_key"].endswith(MIRRORED_SUFFIX)
        said = [self._answer(by_id[name], rng, mirrored) for name in sample["expression_ids"]]
        sample["text_output"] = said
        if not self.train:
            sample["question_id"] = [int(name) for name in sample["expression_ids"]]
            if self.options.max_expressions == 1:
                sample |= {key: sample[key][0] for key in ("text_input", "text_output", "question_id")}
        return sample

    def collater(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples, see :meth:`ReferringDataset.collater`; ``question_id`` of single questions is a (B,) tensor."""
        batch = super().collater(samples)
        if "question_id" in batch and isinstance(batch["question_id"][0], int):
            batch["question_id"] = torch.tensor(batch["question_id"])
        return batch

    def _masks(self, place: Placement, expressions: Sequence[Expression]) -> list[Any]:
        return [None] * len(expressions)

    def _clean(self, image: ReferredImage, text: str) -> str:
        return super()._clean(image, text) if text else ""  # a caption

    def _answer(self, answers: Sequence[str], rng: np.random.Generator, mirrored: bool) -> str | None:
        if not answers:
            return None
        answer = answers[int(rng.integers(len(answers)))] if self.train else answers[0]
        return mirror_text(answer) if mirrored else answer
