"""The probes on a whole svp_ris of tiny random parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lavis_svp.metrics.bootstrap import Bootstrap
from lavis_svp.probes.disturb import Disturbance, collect, compare, disturbances, format_comparison
from lavis_svp.probes.session import answers_of
from lavis_svp.probes.tokens import PLACES, format_readouts, gather_tokens, read_all
from lavis_svp.tasks.referring_segmentation import EvalOptions, ReferringSegmentationTask

FEW = Bootstrap(resamples=20)
WORDS = [["small", "plain", "red", "circle"], ["large", "striped", "blue", "star"], ["small", "dotted", "red", "ring"]]


@pytest.fixture
def labelled(batch):
    """The batch with what evaluation needs beside the model's inputs, and objects that fill the superpixels."""
    labels = []
    for size in batch["original_size"]:
        whole = np.full(size, -1, np.int32)
        whole[:, : size[1] // 3], whole[: size[0] // 3, size[1] // 3 :], whole[2 * size[0] // 3 :, -size[1] // 3 :] = (
            0,
            1,
            2,
        )
        labels.append(whole)
    return {
        **batch,
        "image_id": [0, 1],
        "file_name": ["0.png", "1.png"],
        "expression_ids": [["a", "b", "c"], ["d"]],
        "kinds": [["attribute", "no_target", "relation"], ["attribute"]],
        "instances": [{"labels": one, "words": WORDS} for one in labels],
    }


def without_time(records):
    return [{key: value for key, value in record.items() if key != "ms"} for record in records]


def test_undisturbed_records_are_those_of_the_evaluation(make_model, labelled):
    model = make_model().eval()
    task = ReferringSegmentationTask(EvalOptions(mode="generative"))
    with torch.no_grad():
        expected = without_time(task.valid_step(model, labelled))
    assert without_time(answer.record for answer in answers_of(model, labelled)) == expected
    bank = collect(model.projector, (model.encode(labelled) for _ in range(1)))

    def score(_):
        return [answer.record for answer in answers_of(model, labelled)]

    result = compare(model.projector, bank, [Disturbance("sspe", "zero"), Disturbance("tokens", "swap")], score, FEW)
    assert [row["mode"] for row in result["cases"]] == ["zero", "swap"]
    assert "sspe: zero" in format_comparison(result)
    assert without_time(score("")) == expected
    assert len(disturbances(model.projector, (0, 1))) == 3 * 6 + 8


@pytest.mark.parametrize("projector", ["svp", "mlp"])
def test_tokens_are_read_at_every_place(make_model, labelled, projector):
    model = make_model(projector={"name": projector}).eval()
    train = gather_tokens(model, [labelled], seed=0)
    assert train.count == 2 and len(train.facts) == len(train.at("tokens")) > 2
    assert {place: train.at(place).shape[1] for place in PLACES} == {"encoder": 32, "tokens": 32, "language": 32}
    result = read_all(train, train, (0, 1), FEW)
    assert len(result["tokens"]["x"]["by_seed"]) == 2 and "left_of" in format_readouts(result)


def test_states_of_the_language_model_do_not_see_text(make_model, labelled):
    model = make_model().eval()
    alone = gather_tokens(model, [labelled], seed=0).at("language")
    other = {**labelled, "text_input": [["x", "y", "z"], ["w"]]}
    assert np.array_equal(alone, gather_tokens(model, [other], seed=0).at("language"))
