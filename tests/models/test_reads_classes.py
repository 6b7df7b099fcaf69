"""A whole svp_ris whose pointer reads an image classifier's classes, and may choose "no such thing"."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from lavis_svp.models.checkpoint import flat_options, only_training
from lavis_svp.models.vocabulary import Vocabulary
from lavis_svp.projectors import list_projectors
from lavis_svp.projectors.base import PROJECTORS
from lavis_svp.vision.types import CLASSIFIER

PHOTOS = {
    "classifier": {"side": 64},
    "prompt": {"style": "plain", "answers": ["[SEG]"]},
    "seg_prompt": {
        "state_norm": "batch", "pointer": True, "pointer_position": True, "pointer_nouns": True, "pointer_absent": True,
        "region_mask": True,
    },
    "visual_tokens": {"norm": True, "shuffle": True, "class_words": True, "drawn_classes": 0.7},
    "losses": {"resolution": "low"},
    "auxiliary_losses": {"grounding": 1.0, "word_alignment": 1.0, "point_regression": 1.0, "regions": 1.0},
}  # fmt: skip
"""The form of tiny_photos."""
OF_PATCHES = {
    **PHOTOS,
    "seg_prompt": {**PHOTOS["seg_prompt"], "region_mask": False},
    "auxiliary_losses": {**PHOTOS["auxiliary_losses"], "regions": 0.0},
}
"""The same for projectors whose tokens are no superpixels."""
LEARN_FROM_ABSENCE = ("readout.noun_evidence.", "readout.absent.", "class_words.gate")


@pytest.fixture
def model(make_model):
    return make_model(**PHOTOS)


def loss_of(model, batch):
    random.seed(0)
    torch.manual_seed(0)
    return model(batch)


def only(batch, chosen):
    """The batch with some expressions of each image."""
    rows = {key: [[row[i] for i in c] for row, c in zip(batch[key], chosen, strict=True)] for key in
            ("text_input", "masks", "has_target")}  # fmt: skip
    return {**batch, **rows}


def test_every_parameter_learns_and_the_losses_are_finite(model, batch):
    losses = loss_of(model, batch)
    losses.pop("stats")
    assert set(losses) == {
        "loss",
        "loss_ce",
        "loss_bce",
        "loss_dice",
        "loss_ground",
        "loss_word",
        "loss_point",
        "loss_region",
    }
    assert all(torch.isfinite(value) for value in losses.values())
    losses["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    for part in LEARN_FROM_ABSENCE:
        assert any(grad.abs().max() > 0 for name, grad in grads.items() if name.startswith(part)), part


def test_expressions_without_a_target_alone_teach_the_choice_of_nothing(model, batch):
    """And those with a target alone do as well: the tokens must be likelier than nothing."""
    for chosen in ([[1], []], [[0, 2], [0]]):
        model.zero_grad(set_to_none=True)
        samples = only(batch, chosen)
        if not samples["text_input"][1]:
            samples = {key: value[:1] for key, value in samples.items()}
        losses = loss_of(model, samples)
        assert torch.isfinite(losses["loss"]) and losses["loss_ground"] > 0
        losses["loss"].backward()
        assert model.readout.absent.weight.grad.abs().max() > 0
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_grounding_is_the_cross_entropy_over_the_tokens_and_nothing(model, batch):
    """A slow reference of the whole: with drawn classes off, the loss of the pointer from its own choices."""
    model.draw_classes = None
    expected = []
    original = type(model).make_seg_prompts

    def watched(self, *arguments):
        prompts = original(self, *arguments)
        expected.append(prompts)
        return prompts

    type(model).make_seg_prompts = watched
    try:
        loss = loss_of(model, batch)["loss_ground"]
    finally:
        type(model).make_seg_prompts = original
    (prompts,) = expected  # all four together, since they share a batch norm: three with a target, one without
    assert prompts.absent.shape == (4,)
    total = torch.cat([prompts.scores.exp(), prompts.absent.exp()[:, None]], 1).sum(1)
    torch.testing.assert_close(total, torch.ones(4))
    assert loss >= -prompts.absent[3] / 4 - 1e-6  # the share of the expression without a target


def test_what_is_drawn_differs_between_steps_and_never_in_evaluation(model, batch):
    seeds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        seeds.append(float(model(batch)["loss_ground"].detach()))
    assert seeds[0] == seeds[1] != seeds[2]
    model.eval()
    with torch.no_grad():
        first, again = (model.encode(batch).visual.classes for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first.exp().sum(-1), torch.ones(first.shape[:2]))


@pytest.mark.parametrize("mode", ["generative", "teacher_forced"])
def test_predictions_do_not_depend_on_batch_mates(model, batch, mode):
    model.eval()
    together = model.predict_masks(batch, mode)
    assert [len(row) for row in together] == [3, 1]
    for index, row in enumerate(together):
        one = {key: batch[key][index : index + 1] for key in ("image", "original_size", "text_input")}
        for a, b in zip(row, model.predict_masks(one, mode)[0], strict=True):
            assert (a.text, a.pick, a.note, a.error) == (b.text, b.pick, "", None)
            np.testing.assert_allclose(a.logits, b.logits, atol=2e-3)


def test_the_pointer_follows_the_classes_of_the_named_noun_before_any_training(make_model, batch):
    """The token in which the classes of "cup" are certain is the pick for it, whatever the random rest says."""
    model = make_model(**{**PHOTOS, "visual_tokens": {}, "auxiliary_losses": {}}).eval()
    with torch.no_grad():
        for layer in (model.readout.query, model.readout.noun_evidence.query):
            layer.weight.zero_()
            layer.bias.zero_()
        encoded = model.encode(batch)
        cup = model.prompt_builder.nouns.nouns.index("cup")
        (classes,) = model.readout.noun_evidence.nouns[cup].nonzero(as_tuple=True)
        encoded.visual.classes[:] = -20.0
        encoded.visual.classes[0, 3, classes[0]] = 0.0
        predicted = model.predict_masks(batch, "teacher_forced", encoded)
    assert predicted[0][0].pick == encoded.visual.on_host.order[0][3]


def test_unknown_words_are_noted(model, batch):
    model.eval()
    model.vocabulary = Vocabulary(["the red cup a", "the large blue on left"])
    notes = [[one.note for one in row] for row in model.predict_masks(batch)]
    assert notes == [["", 'I do not know the word "cat".', 'I do not know the word "star".'],
                     ['I do not know the word "circle".']]  # fmt: skip


def test_a_checkpoint_comes_back(make_model, model, batch, tmp_path):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    state = model.checkpoint_state()
    assert not [name for name in state if name.startswith("frozen.") or name.endswith((".nouns", ".words"))]
    torch.save({"model": state}, tmp_path / "checkpoint_1.pth")
    again = make_model(**PHOTOS)
    again.load_checkpoint(str(tmp_path / "checkpoint_1.pth"))
    for a, b in zip(
        sum(model.eval().predict_masks(batch), []), sum(again.eval().predict_masks(batch), []), strict=True
    ):
        assert np.array_equal(a.logits, b.logits)


@pytest.mark.slow
@pytest.mark.parametrize("projector", list_projectors())
def test_every_projector_takes_the_options(make_model, batch, projector):
    form = PHOTOS if "superpixels" in PROJECTORS.get(projector).requires else OF_PATCHES
    model = make_model(**form, projector={"name": projector}, vision_encoder={"side": 112})
    losses = loss_of(model, batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])


def test_tokens_that_are_patches_have_classes_too(make_model, batch):
    model = make_model(**OF_PATCHES, projector={"name": "mlp"})
    losses = loss_of(model, batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert model.eval().encode(batch).visual.classes.shape == (2, 36, 1000)


def test_cached_features_change_nothing(model, batch):
    model.eval()
    with torch.no_grad():
        vision = model.extractor(batch)
        entries = [
            {"patches": vision.patches.patches[i], "valid": vision.patches.valid[i], "sam": vision.sam[i],
             CLASSIFIER: vision.classifier[i]}
            for i in range(2)
        ]  # fmt: skip
        cached = {key: value for key, value in batch.items() if key != "image"}
        cached |= {"frozen": entries, "region_map": vision.region_maps}
        for a, b in zip(sum(model.predict_masks(batch), []), sum(model.predict_masks(cached), []), strict=True):
            np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)


def test_the_model_can_be_copied_and_prepared_elsewhere(model, batch):
    """A loader's worker prepares the batch: the preparer knows the nouns."""
    preparer = copy.deepcopy(model.batch_preparer(True))
    random.seed(0)
    torch.manual_seed(0)
    ready = preparer({**batch, "region_map": model.extractor(batch).region_maps})
    random.seed(0)
    torch.manual_seed(0)
    expected = loss_of(model, batch)["loss"]
    torch.manual_seed(0)
    torch.testing.assert_close(model(ready)["loss"], expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- models without the options


def test_models_without_the_options_have_none_of_the_parts(make_model, batch):
    plain = make_model(seg_prompt={"pointer": True}, auxiliary_losses={"grounding": 1.0, "word_alignment": 1.0})
    assert plain.extractor.classifier is None and plain.class_words is None and plain.draw_classes is None
    assert CLASSIFIER not in plain.extractor.config.outputs and plain.prompt_builder.nouns is None
    names = set(plain.state_dict())
    assert not [name for name in names if "noun" in name or "absent" in name or "class" in name]
    loss_of(plain, batch)["loss"].backward()
    assert plain.eval().encode(batch).visual.classes is None


def test_an_old_configuration_means_what_it_did(make_model):
    old, new = make_model().options, make_model(**PHOTOS).options
    off = {key: value for key, value in flat_options(old).items() if "pointer_" in key or "class" in key}
    assert off["seg_prompt.pointer_nouns"] is off["seg_prompt.pointer_absent"] is False
    assert off["visual_tokens.class_words"] is False and off["visual_tokens.drawn_classes"] == 0.0
    differs = [key for key in flat_options(new) if flat_options(new)[key] != flat_options(old).get(key)]
    assert {"seg_prompt.pointer_nouns", "visual_tokens.class_words"} <= {k for k in differs if not only_training(k)}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"visual_tokens": {"drawn_classes": 1.5}}, "0..1"),
        ({"visual_tokens": {"drawn_classes": 0.5}}, "word_alignment"),
        ({"seg_prompt": {"pointer": True, "pointer_absent": True}}, "pointer_absent is for answers"),
        ({"seg_prompt": {"pointer_nouns": True}}, "needs pointer: true"),
    ],
)
def test_options_that_lack_something_are_refused(make_model, sections, message):
    answers = {"prompt": {"style": "plain", "answers": ["It is [SEG]."]}}
    with pytest.raises(ValueError, match=message):
        make_model(**answers, **sections)


@pytest.mark.parametrize("projector", ["mlp", "perceiver"])
def test_whole_regions_need_a_projector_of_superpixels(make_model, projector):
    with pytest.raises(ValueError, match=f"{projector} makes them of patches alone. Set model.seg_prompt.region_mask"):
        make_model(projector={"name": projector}, **PHOTOS)
