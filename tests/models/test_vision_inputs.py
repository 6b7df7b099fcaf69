"""The whole model on inputs that its feature extractor may give: extra channels, further outputs, other grids."""

import pytest

from lavis_svp.projectors import list_projectors
from lavis_svp.projectors.baselines.mlp import MlpProjector


@pytest.mark.parametrize("name", list_projectors())
def test_every_projector_takes_extra_channels(make_model, batch, name):
    encoder = {"extra_channels": ["sam", "colour"], "side": 112, "levels": [0, 1]}
    model = make_model(projector={"name": name}, vision_encoder=encoder)
    model(batch)["loss"].backward()


def test_the_outputs_that_a_projector_requires_reach_it(make_model, batch, monkeypatch):
    outputs = frozenset({"cls_attention", "keys", "levels"})
    monkeypatch.setattr(MlpProjector, "requires", outputs)
    model = make_model(projector={"name": "mlp"}, vision_encoder={"levels": [0, -1]})
    features = []
    model.projector.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    assert model(batch)["loss"].isfinite()
    assert all(getattr(features[0], name) is not None for name in outputs)


@pytest.mark.parametrize("projector", [{"name": "svp"}, {"name": "avg_pool", "tokens_h": 2, "tokens_w": 3}])
def test_an_input_that_is_not_square_goes_through_the_whole_model(make_model, batch, projector):
    seg_prompt = {"pointer": True, "pointer_position": True}
    model = make_model(vision_encoder={"side": [56, 84]}, projector=projector, seg_prompt=seg_prompt)
    loss = model(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    predictions = model.eval().predict_masks({**batch, "text_input": [["a cup"], ["b"]]}, mode="teacher_forced")
    assert [p[0].mask.shape for p in predictions] == [(96, 128), (128, 128)]
