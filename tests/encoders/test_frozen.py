import torch
from torch import nn

from lavis_svp.encoders.frozen import FrozenModule


class Toy(FrozenModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.freeze()


def test_it_stays_frozen_inside_a_model_that_trains():
    model = nn.ModuleDict({"frozen": Toy(), "other": nn.Linear(2, 2)})
    model.train()
    assert model["other"].training
    assert not any(module.training for module in model["frozen"].modules())
    assert not any(parameter.requires_grad for parameter in model["frozen"].parameters())


def test_batch_norm_does_not_drift():
    toy = Toy().train()
    toy.layers(torch.randn(8, 2) + 5)
    assert torch.equal(toy.layers[1].running_mean, torch.zeros(2))
