"""A whole svp_ris under the options that an ablation turns: what holds for the defaults holds for them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lavis_svp.export.parity import observe

SVP = {"name": "svp", "sspe_width": 16, "mask_size": 8}
AIDS = {
    "readout": {"state_norm": "batch", "pointer": True, "pointer_position": True, "pointer_mask": True},
    "losses": {"resolution": "low"},
    "aids": {"grounding": 1.0, "word_alignment": 1.0, "point_regression": 1.0, "token_norm": True},
}
CENTROID = {"language": {"visual_positions": "centroid"}}
SETTINGS = {
    "centroid_and_global_token": {"projector": {**SVP, "global_token": "mean"}, **CENTROID},
    "bbox_mlp": {"projector": {**SVP, "sspe": "bbox_mlp"}},
    "random_order": {"projector": {**SVP, "token_order": "random"}},
    "geometry": {"projector": {"name": "mask_pool_geometry"}},
    "centroid_of_bins": {"projector": {"name": "avg_pool"}, **CENTROID},
}


def settings_named(*names):
    return pytest.mark.parametrize("sections", [SETTINGS[name] for name in names], ids=names)


def loss_of(model, batch):
    random.seed(0)
    torch.manual_seed(0)
    return model(batch)


@settings_named("centroid_and_global_token", "bbox_mlp", "random_order", "geometry")
def test_everything_learns_with_all_aids(make_model, batch, sections):
    model = make_model(**{**AIDS, "aids": {**AIDS["aids"], "shuffle_tokens": True}}, **sections)
    losses = loss_of(model, batch)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values() if isinstance(value, torch.Tensor))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@settings_named("centroid_and_global_token", "centroid_of_bins")
def test_packed_and_separate_have_the_same_losses(make_model, batch, sections):
    values = [
        float(loss_of(make_model(layout=layout, **sections).eval(), batch)["loss"].detach())
        for layout in ("packed", "separate")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@settings_named("centroid_and_global_token", "random_order")
@pytest.mark.parametrize("mode", ["generative", "teacher_forced"])
def test_batched_equals_single(make_model, batch, sections, mode):
    model = make_model(**AIDS, **sections).eval()
    with torch.no_grad():
        model.language.added_embedding.mul_(100)
    together = model.predict_masks(batch, mode)
    for index in range(2):
        alone = model.predict_masks({k: v[index : index + 1] for k, v in batch.items()}, mode)[0]
        for a, b in zip(alone, together[index], strict=True):
            np.testing.assert_allclose(a.logits, b.logits, atol=2e-3)
            assert (a.text, a.answered, a.pick, a.tokens) == (b.text, b.answered, b.pick, b.tokens)


def test_centroid_positions_reach_every_path_and_are_those_of_patches(make_model, batch):
    """For `mlp` they are the indices, to the bit; for superpixels they change all that the language model says."""
    for projector, same in (({"name": "mlp"}, True), (SVP, False)):
        seen = []
        for where in ("index", "centroid"):
            model = make_model(projector=projector, language={"visual_positions": where}).eval()
            encoded = model.encode(batch)
            assert (encoded.positions is None) == (where == "index")
            seen_by_parity = observe(model)  # the splice of its own, and teacher-forced masks
            generated = torch.from_numpy(model.predict_masks(batch)[0][0].logits)
            forced = torch.from_numpy(seen_by_parity.masks[0])
            seen.append([loss_of(model, batch)["loss_ce"], generated, forced, seen_by_parity.tokens])
        assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [same] * 4


def test_a_sequence_of_patches_must_fit_though_its_tokens_are_few(make_model, batch):
    """Nine superpixels an image, on a grid of 36 patches."""
    loss_of(make_model(language={"max_length": 45}), batch)
    with pytest.raises(ValueError, match=r"positions, the language model knows 45.*centroid"):
        loss_of(make_model(language={"max_length": 45, "visual_positions": "centroid"}), batch)


def test_unknown_positions_are_named(make_model):
    with pytest.raises(ValueError, match="visual_positions is 'grid'; known: index, centroid"):
        make_model(language={"visual_positions": "grid"})


def test_a_global_token_is_no_region(make_model, batch):
    model = make_model(**AIDS, projector={**SVP, "global_token": "mean"}).eval()
    plain = make_model(**AIDS).eval()
    with torch.no_grad():  # every state points at the first token
        model.readout.key.weight.zero_()
    predictions = model.predict_masks(batch, "teacher_forced")
    for row, other in zip(predictions, plain.predict_masks(batch, "teacher_forced"), strict=True):
        for prediction, rival in zip(row, other, strict=True):
            assert prediction.tokens == rival.tokens + 1
            assert 0 <= prediction.pick < prediction.region_map.count


def test_word_alignment_leaves_a_global_token_out(make_model, batch):
    model = make_model(**AIDS, projector={**SVP, "global_token": "mean"})
    words = [["red", "cup"], ["blue", "star"]]
    instances = [dict(item, words=[w]) for item, w in zip(batch["instances"], words, strict=True)]
    samples = {**batch, "instances": instances}
    encoded = model.encode(samples)
    before = model.aids.alignment_loss(encoded, samples, model.language, model.device)
    encoded.visual.tokens = encoded.visual.tokens.detach().clone()
    encoded.visual.tokens[:, 0] += torch.randn(encoded.visual.tokens.shape[-1])
    torch.testing.assert_close(model.aids.alignment_loss(encoded, samples, model.language, model.device), before)
    encoded.visual.tokens[:, 1] += torch.randn(encoded.visual.tokens.shape[-1])
    moved = model.aids.alignment_loss(encoded, samples, model.language, model.device)
    assert (moved - before).abs() > 1e-5
