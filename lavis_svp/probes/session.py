"""The model, data and evaluation of a project YAML, as probes use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lavis.common.dist_utils import get_world_size
from tqdm import tqdm

from lavis_svp.common.transfer import move_to_device, received
from lavis_svp.metrics.records import Record
from lavis_svp.models.outputs import MaskPrediction
from lavis_svp.runners.data import eval_loader
from lavis_svp.tasks.base import run_facts
from lavis_svp.tasks.scoring import score_image, timed_predictions


@dataclass(frozen=True)
class Answer:
    """The model's answer to one expression."""

    samples: Mapping[str, Any]  # its batch
    index: int  # of the image in the batch
    number: int  # of the expression in the image
    record: Record  # its scores, as the evaluation writes them
    prediction: MaskPrediction  # mask, pick, region map


class Session:
    """Gives probes a run's model, batches and answers.

    Args:
        runner: an ``lavis_svp`` runner whose model has its weights.
        split: name of the split that is scored.
        weights: name of the file of the weights, which results record.

    Raises:
        ValueError: the model is not a svp_ris, or there are several processes.
    """

    def __init__(self, runner: Any, split: str, weights: str) -> None:
        if get_world_size() > 1:
            raise ValueError(f"A probe runs in one process; this run has {get_world_size()}.")
        self.model = runner.bare_model.eval()
        if not hasattr(self.model, "encode") or not hasattr(self.model, "predict_masks"):
            raise ValueError(f"Probes are made for svp_ris; model.arch gives {type(self.model).__name__}.")
        self.runner, self.split, self.weights = runner, split, weights

    def held_out(self) -> Iterator[Mapping[str, Any]]:
        """Batches of the split that is scored."""
        return self.split_batches(self.split)

    def split_batches(self, split: str) -> Iterator[Mapping[str, Any]]:
        """Batches of one of ``run.test_splits``, on the model's device; a ValueError for any other split."""
        if split not in self.runner.datasets:
            raise ValueError(f"run.test_splits has no '{split}', only: {', '.join(self.runner.datasets)}.")
        return self._moved(eval_loader(self.runner.datasets, split, self.runner.options, pin_memory=False))

    def training(self, images: int) -> Iterator[Mapping[str, Any]]:
        """Batches of the first ``images`` training images, the same in every run.

        Raises:
            ValueError: the YAML builds no training data.
        """
        if not self.runner.task.train_sets:
            raise ValueError("This probe is fitted on training images: use a YAML whose data sets have a train split.")
        data = self.runner.task.train_sets[0]
        size = self.runner.options.batch_size_eval
        count = min(images, len(data))
        return self._moved(
            data.collater([data[i] for i in range(start, min(start + size, count))]) for start in range(0, count, size)
        )

    def records(self, progress: str) -> list[Record]:
        """Score the split as ``lavis_svp.evaluate`` does with ``run.eval.mode: generative``."""
        return [answer.record for answer in self.answers(progress)]

    def answers(self, progress: str) -> Iterator[Answer]:
        """Answer every expression of the split, under a progress bar of this title, and score the answers."""
        for samples in tqdm(self.held_out(), desc=progress, unit="batch", mininterval=1):
            yield from answers_of(self.model, samples)

    def facts(self) -> dict[str, Any]:
        """The "run" section of a result: command, seed, machine, date, weights and settings, as in a summary."""
        return {**self.runner.task.settings, **run_facts(), "split": self.split, "weights": self.weights}

    def _moved(self, batches: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
        device = self.model.device
        for batch in received(batches):
            yield move_to_device(batch, device)


@torch.no_grad()
def answers_of(model: Any, samples: Mapping[str, Any]) -> list[Answer]:
    """Answer and score one batch in generative mode."""
    predictions, ms = timed_predictions(model, samples, "generative")
    return [
        Answer(samples, index, number, record, row[number])
        for index, row in enumerate(predictions)
        for number, record in enumerate(score_image(samples, index, row, "generative", ms))
    ]


def instances_of(samples: Mapping[str, Any], index: int) -> tuple[np.ndarray, Sequence[Sequence[str]]]:
    """An image's objects: (H, W) labels, -1 = none, and the words of each.

    Raises:
        ValueError: the data set has none.
    """
    instances = samples.get("instances")
    if instances is None or instances[index] is None:
        raise ValueError("Probes need the annotated objects: set datasets.<name>.sampling.instances to true.")
    return instances[index]["labels"], instances[index]["words"]
