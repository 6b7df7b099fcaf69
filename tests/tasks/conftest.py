"""A model that returns set masks, batches as the data sets collate them, and LAVIS's result folders."""

import lavis_svp  # noqa: F401 - first, so that LAVIS runs with these transformers and knows our names

# isort: split
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lavis.common.registry import registry

from lavis_svp.superpixels.region_map import RegionMap


@dataclass
class SetPrediction:
    mask: np.ndarray
    answered: bool = True
    text: str = "It is [SEG]."
    score: float = 0.75
    pick: int | None = None
    region_map: RegionMap | None = None
    tokens: int = 4


class SetModel(torch.nn.Module):
    """Answers each expression with what was set for it, per mode; counts how often it was asked."""

    def __init__(self, answers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.answers = answers
        self.asked = []

    def before_evaluation(self, **kwargs):
        self.dataset = kwargs["dataset"]

    def predict_masks(self, samples, mode):
        self.asked.append(mode)
        return [[self.answers[mode][name] for name in names] for names in samples["expression_ids"]]

    def forward(self, samples):
        loss = self.weight * len(samples["image_id"])
        return {"loss": loss, "loss_ce": loss / 2, "accuracy": 1.0}


class Images(torch.utils.data.Dataset):
    """Images of 8 x 12 with four 4 x 6 objects; the expressions name object 0, object 3, and none."""

    kinds = ("attribute", "relation", "no_target")

    def __init__(self, count):
        self.labels = np.kron(np.arange(4, dtype=np.int32).reshape(2, 2), np.ones((4, 6), np.int32))
        self.count = count

    def __len__(self):
        return self.count

    def expression_ids(self):
        return [f"p{index}e{number}" for index in range(self.count) for number in range(3)]

    def truth(self, number):
        return [self.labels == 0, self.labels == 3, np.zeros_like(self.labels, bool)][number].astype(np.uint8)

    def __getitem__(self, index):
        image = torch.zeros(4, 12, 12)
        image[:3, :8] = 0.5
        image[3, :8] = 1
        return {
            "image": image,
            "image_id": index,
            "file_name": f"{index}.png",
            "split": "test",
            "original_size": (8, 12),
            "text_input": ["the red thing", "the thing left of the red thing", "the sofa"],
            "expression_ids": [f"p{index}e{number}" for number in range(3)],
            "kinds": list(self.kinds),
            "masks": [self.truth(number) for number in range(3)],
            "has_target": [True, True, False],
            "instances": {"labels": self.labels, "words": [["thing"]] * 4},
            "candidates": [[0], [1, 3], []],
        }

    def collater(self, samples):
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        batch["image"] = torch.stack(batch["image"])
        return batch

    def loader(self, batch_size=2, sampler=None):
        return torch.utils.data.DataLoader(self, batch_size, sampler=sampler, collate_fn=self.collater)

    def answers(self):
        """Object 0 right; object 3 mistaken for object 1; the missing object denied."""
        region_map = RegionMap.from_labels(self.labels)
        wrong = (self.labels == 1).astype(np.uint8)
        each = [
            SetPrediction(self.truth(0), pick=0, region_map=region_map),
            SetPrediction(wrong, pick=1, region_map=region_map),
            SetPrediction(self.truth(2), answered=False, text="There is none.", region_map=region_map),
        ]
        return {name: each[int(name[-1])] for name in self.expression_ids()}


@pytest.fixture
def images():
    return Images(3)


@pytest.fixture
def set_model():
    return SetModel


@pytest.fixture
def set_prediction():
    return SetPrediction


@pytest.fixture
def images_of():
    return Images


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """LAVIS's output and result folder, for this test only."""
    result = tmp_path / "result"
    result.mkdir()
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(result))
    return tmp_path
