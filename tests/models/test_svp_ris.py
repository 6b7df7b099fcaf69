from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.projectors import list_projectors

RECIPE = {
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_position": True},
    "losses": {"resolution": "low"},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "point_regression": 1.0},
    "visual_tokens": {"norm": True, "shuffle": True},
}


GRID_8X8 = {"side": 112}  # in which every projector's defaults fit


def loss_of(model, batch):
    random.seed(0)
    torch.manual_seed(0)
    return model(batch)


@pytest.mark.parametrize("projector", list_projectors())
@pytest.mark.parametrize("sections", [{}, RECIPE], ids=["paper", "recipe"])
def test_every_trainable_parameter_learns_with_every_projector(make_model, batch, projector, sections):
    model = make_model(**sections, projector={"name": projector}, vision_encoder=GRID_8X8)
    losses = loss_of(model, batch)
    assert losses.pop("stats")["tokens_per_image"] == np.mean(model.encode(batch).counts)
    assert {"loss", "loss_ce", "loss_bce", "loss_dice"} <= set(losses)
    assert all(torch.isfinite(value) for value in losses.values())
    losses["loss"].backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert not any(p.requires_grad for p in model.extractor.parameters())


@pytest.mark.parametrize(
    "projector", [{"name": "svp", "sspe_width": 16, "mask_size": 8, "sspe": "bbox_mlp"}, {"name": "mask_pool_geometry"}]
)
def test_every_trainable_parameter_learns_in_the_rows_of_the_ablation(make_model, batch, projector):
    model = make_model(**RECIPE, projector=projector)
    losses = loss_of(model, batch)
    losses["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("projector", list_projectors())
def test_one_line_swaps_the_projector_and_its_token_count_was_known_before(make_model, batch, projector):
    model = make_model(projector={"name": projector}, vision_encoder=GRID_8X8).eval()
    predictions = model.predict_masks(batch, "teacher_forced")
    for row, size in zip(predictions, batch["original_size"], strict=True):
        regions = 0 if row[0].region_map is None else row[0].region_map.count
        assert row[0].tokens == model.projector.image_tokens((8, 8), regions)
        assert all(p.answered and p.mask.shape == size and np.isfinite(p.logits).all() for p in row)


@pytest.mark.parametrize("layout", ["separate", "packed", "conversation"])
def test_total_is_the_weighted_sum_in_every_layout(make_model, batch, layout):
    model = make_model(layout=layout, losses={"ce": 1.5, "bce": 2.0, "dice": 0.5})
    losses = loss_of(model, batch)
    expected = 1.5 * losses["loss_ce"] + 2.0 * losses["loss_bce"] + 0.5 * losses["loss_dice"]
    torch.testing.assert_close(losses["loss"], expected)


def test_packed_and_separate_have_the_same_losses(make_model, batch):
    values = [
        float(loss_of(make_model(layout=layout).eval(), batch)["loss"].detach()) for layout in ("packed", "separate")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("mode", ["generative", "teacher_forced"])
def test_batched_equals_single(make_model, batch, mode):
    model = make_model(**RECIPE).eval()
    with torch.no_grad():
        model.language.added_embedding.mul_(100)
    together = model.predict_masks(batch, mode)
    assert [len(row) for row in together] == [3, 1]
    for index in range(2):
        one = {k: v[index : index + 1] for k, v in batch.items()}
        alone = model.predict_masks(one, mode)[0]
        for a, b in zip(alone, together[index], strict=True):
            assert a.mask.shape == batch["original_size"][index] and a.mask.dtype == np.uint8
            np.testing.assert_allclose(a.logits, b.logits, atol=2e-3)
            assert (a.text, a.answered, a.pick, a.tokens) == (b.text, b.answered, b.pick, b.tokens)


def test_without_seg_there_is_no_mask(make_model, batch):
    model = make_model().eval()
    with torch.no_grad():
        model.language.added_embedding.zero_()
    for row in model.predict_masks(batch):
        for prediction in row:
            assert not prediction.answered and prediction.mask.sum() == 0 and prediction.pick is None
    assert all(p.answered for row in model.predict_masks(batch, "teacher_forced") for p in row)


def test_generate_answers_in_text(make_model, batch):
    model = make_model().eval()
    nested = model.generate(batch)
    assert [len(row) for row in nested] == [3, 1] and all(isinstance(t, str) for row in nested for t in row)
    flat = model.generate({"image": batch["image"], "text_input": ["the red cup", "the circle"]})
    assert flat == [nested[0][0], nested[1][0]]


def test_a_batch_without_any_target_still_trains_everything(make_model, batch):
    model = make_model()
    batch = dict(batch, masks=[[m * 0 for m in row] for row in batch["masks"]], has_target=[[False] * 3, [False]])
    losses = loss_of(model, batch)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.mask_decoder.mask_decoder.output_upscaling.parameters())
    assert float(losses["loss_bce"].detach()) == 0


def test_the_alignment_stage_trains_the_projector_alone(make_model, batch):
    sections = copy.deepcopy(RECIPE)
    sections["auxiliary_losses"]["alignment_steps"] = 10
    model = make_model(**sections)
    words = [["red", "cup"], ["blue", "star"]]
    instances = [dict(item, words=[w]) for item, w in zip(batch["instances"], words, strict=True)]
    first = {**batch, "instances": instances, "epoch": 0, "num_iters_per_epoch": 8, "iters": 3}
    losses = loss_of(model, first)
    assert set(losses) == {"loss", "loss_word", "stats"}
    losses["loss"].backward()
    assert model.projector.head[0].weight.grad is not None
    assert all(p.grad is None for p in model.language.transformer.parameters())
    assert "loss_ce" in loss_of(model, {**first, "epoch": 1, "iters": 2})


def test_cached_inputs_change_nothing(make_model, batch):
    model = make_model(**RECIPE)
    plain = loss_of(model.eval(), batch)
    vision = model.extractor(batch)
    cached = [
        {"patches": vision.patches.patches[i], "valid": vision.patches.valid[i], "sam": vision.sam[i]} for i in range(2)
    ]
    again = loss_of(model, {**batch, "frozen": cached, "region_map": vision.region_maps})
    torch.testing.assert_close(again["loss"], plain["loss"])


@pytest.mark.parametrize("superpixels", [{"name": "sam", "points_per_side": 2}, {"name": "one_pass"}])
def test_the_sam_encoder_runs_once_for_superpixels_and_masks(make_model, batch, superpixels):
    model = make_model(superpixels=superpixels).eval()
    calls = []
    model.extractor.sam_encoder.register_forward_hook(lambda *_: calls.append(1))
    model.predict_masks(batch, "teacher_forced")
    assert len(calls) == 1


def test_a_checkpoint_comes_back_and_another_models_is_refused(make_model, batch, tmp_path):
    model = make_model(**RECIPE)
    loss_of(model, batch)["loss"].backward()
    torch.save({"model": model.checkpoint_state()}, tmp_path / "a.pth")
    other = make_model(**RECIPE)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(1)
    other.load_checkpoint(str(tmp_path / "a.pth"))
    for name, value in model.checkpoint_state().items():
        torch.testing.assert_close(other.state_dict()[name], value)
    different = make_model(projector={"name": "mlp"})
    with pytest.raises(ValueError, match="another model"):
        different.load_checkpoint(str(tmp_path / "a.pth"))
    with pytest.raises(FileNotFoundError):
        different.load_checkpoint(str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"projektor": {"name": "svp"}}, "projektor.*did you mean 'projector'"),
        ({"sam": {"sid": 128}}, "model.sam"),
        ({"projector": {"name": "svp", "quieries": 2}}, "quieries"),
        ({"layout": "columns"}, "layout"),
        ({"auxiliary_losses": {"grounding": 1.0}}, "pointer"),
        ({"learning_rates": {"lm": 1.0}, "projector": {"name": "nope"}}, "mask_pool"),
    ],
)
def test_wrong_settings_are_named(make_model, sections, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        make_model(**sections)


def test_wrong_inputs_are_named(make_model, batch):
    model = make_model()
    with pytest.raises(ValueError, match="image_size 128"):
        model(dict(batch, image=batch["image"][..., :64, :64]))
    with pytest.raises(ValueError, match="no valid pixel"):
        model(dict(batch, image=batch["image"] * 0))
    with pytest.raises(ValueError, match="masks have"):
        model(dict(batch, masks=[batch["masks"][0][:1], batch["masks"][1]]))
    with pytest.raises(ValueError, match=r"\(50, 50\)"):
        model(dict(batch, masks=[[np.ones((50, 50), np.uint8)] * 3, batch["masks"][1]]))
    with pytest.raises(UnknownNameError, match="teacher_forced"):
        model.predict_masks(batch, "oracle")


@pytest.mark.parametrize("size", [(1, 1), (8000, 200), (3, 500)])
def test_tiny_and_extreme_images_are_segmented(make_model, size):
    from lavis_svp.vision.geometry import to_sam_input

    model = make_model(**RECIPE).eval()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    samples = {"image": to_sam_input(image, 128)[None], "original_size": [size], "text_input": ["the red cup"]}
    prediction = model.predict_masks(samples, "teacher_forced")[0][0]
    assert prediction.mask.shape == size and np.isfinite(prediction.logits).all()
    assert prediction.tokens >= 1
