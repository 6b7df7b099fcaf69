from __future__ import annotations

import json
import logging

import torch
from torch import nn

from lavis_svp.runners.optimizer import build_optimizer
from lavis_svp.runners.parameter_table import parameter_rows, render, report_parameters
from lavis_svp.runners.run_options import RunOptions

OPTIONS = RunOptions(task="t", output_dir="o", init_lr=0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))}).requires_grad_(False)
        self.encoder["deep"].to(torch.bfloat16)
        self.head = nn.ModuleDict({"first": nn.Linear(3, 5), "last": nn.Linear(5, 2)})
        self.scale = nn.Parameter(torch.ones(1))
        self.head["last"].bias.requires_grad_(False)

    def get_optimizer_params(self, run_cfg):
        first = list(self.head["first"].parameters())
        return [
            {"params": [first[0]], "lr": 1e-3, "name": "a"},
            {"params": [first[1], self.head["last"].weight, self.scale], "lr": 1e-4, "name": "b"},
        ]


def rows_of(net):
    return {row.module: row for row in parameter_rows(net, build_optimizer(net, OPTIONS, {}).param_groups)}


def test_counts_rates_and_precisions():
    rows = rows_of(Net())
    assert list(rows) == ["scale", "encoder.deep", "head.first", "head.last"]
    assert (rows["encoder.deep"].parameters, rows["encoder.deep"].trainable) == (21, 0)
    assert rows["encoder.deep"].dtypes == ["bfloat16"] and rows["encoder.deep"].rates == []
    assert (rows["head.first"].trainable, rows["head.first"].rates) == (20, [1e-4, 1e-3])
    assert (rows["head.last"].parameters, rows["head.last"].trainable) == (12, 10)


def test_peak_rates_are_shown_whatever_the_schedule_is_at():
    net = Net()
    optimizer = build_optimizer(net, OPTIONS, {})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert {row.module: row.rates for row in parameter_rows(net, optimizer.param_groups)}["scale"] == [1e-4]


def test_the_model_may_name_its_rows_and_split_parameters_count_whole():
    net = Net()
    net.parameter_row = lambda name: "everything"
    net.scale.ds_numel = 7  # as ZeRO-3 leaves them
    rows = parameter_rows(net, [])
    assert [(row.module, row.parameters) for row in rows] == [("everything", 21 + 32 + 7)]


def test_the_table_is_readable_and_logged(tmp_path, caplog):
    net = Net()
    text = render(rows_of(net).values())
    assert "encoder.deep" in text and "bfloat16" in text and "0.0001 … 0.001" in text
    assert "54" in text and "31 (57.41%)" in text
    with caplog.at_level(logging.INFO):
        report_parameters(net, build_optimizer(net, OPTIONS, {}).param_groups, tmp_path)
    assert "head.first" in caplog.text
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["parameters"][0] == {
        "module": "scale", "parameters": 1, "trainable": 1, "rates": [1e-4], "dtypes": ["float32"],
    }  # fmt: skip
