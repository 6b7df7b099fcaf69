"""The calibration of "there is no such thing": what is added to [SEG], when, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lavis_svp.common.checkpoints import WrongCheckpointError
from lavis_svp.common.files import BadFileError
from lavis_svp.models.checkpoint import only_training
from lavis_svp.models.config import parse_model_options
from lavis_svp.segmentation.no_target import CALIBRATION_KEY, NoTargetOptions, read_fit, stored_calibration

READS = {"prompt": {"style": "plain", "answers": ["[SEG]"]}, "seg_prompt": {"pointer": True}}
ALWAYS = 1e6


def answered(model, batch):
    with torch.no_grad():
        return [[one.answered for one in image] for image in model.predict_masks(batch)]


@pytest.mark.parametrize(("bias", "expected"), [(ALWAYS, True), (-ALWAYS, False)])
def test_the_bias_decides_alone_when_it_is_large(make_model, batch, bias, expected):
    model = make_model(**READS, no_target={"bias": bias}).eval()
    assert answered(model, batch) == [[expected] * 3, [expected]]


def test_what_is_weighed_foretells_every_answer(make_model, batch):
    plain = make_model(**READS).eval().no_target_evidence(batch)
    assert (plain.evidence <= 0).all() and plain.evidence.std() > 0
    weight = 3.0
    level = plain.margin + weight * plain.evidence
    bias = -float(level.median()) - 1e-6  # some are above, some below
    model = make_model(**READS, no_target={"bias": bias, "evidence": weight}).eval()
    expected = (level + bias > 0).tolist()
    given = answered(model, batch)
    places = zip(plain.image_index.tolist(), plain.expression.tolist(), strict=True)
    assert [given[image][number] for image, number in places] == expected and len(set(expected)) == 2
    again = model.no_target_evidence(batch)  # of the model itself, whatever its calibration
    assert torch.equal(again.margin, plain.margin) and torch.equal(again.evidence, plain.evidence)


def test_a_pointer_that_may_choose_nothing_speaks_by_its_log_odds(make_model, batch):
    section = {**READS, "seg_prompt": {"pointer": True, "pointer_absent": True}}
    model = make_model(**section).eval()
    found = model.no_target_evidence(batch)
    with torch.no_grad():
        encoded = model.encode(batch)
        turns = model.ask_expressions(encoded, batch).checked().turns
        answers = model.answer_expressions(encoded, turns, "generative")
        prompts = model.make_seg_prompts(encoded, answers.seg_states, answers.image_index, answers.nouns)
        absent = prompts.absent.double().exp()  # (P,)
        torch.testing.assert_close(found.evidence.double(), ((1 - absent) / absent).log(), rtol=1e-3, atol=1e-4)
        model.readout.absent.bias.fill_(30.0)  # there never is such a thing
    refused = model.no_target_evidence(batch)
    assert (refused.evidence < -20).all() and torch.equal(refused.margin, found.margin)
    weighed = make_model(**section, no_target={"evidence": 10.0}).eval()
    with torch.no_grad():
        weighed.readout.absent.bias.fill_(30.0)
    assert answered(weighed, batch) == [[False] * 3, [False]]
    with torch.no_grad():
        weighed.readout.absent.bias.fill_(-30.0)
    assert answered(weighed, batch) == [[True] * 3, [True]]


def test_answers_in_words_and_given_answers_are_untouched(make_model, batch):
    model, refusing = make_model(**READS).eval(), make_model(**READS, no_target={"bias": -ALWAYS}).eval()
    asked = {"image": batch["image"], "text_input": ["what is it?", "how many?"]}
    with torch.no_grad():
        assert refusing.predict_answers(asked) == model.predict_answers(asked)
        given = refusing.predict_masks(batch, mode="teacher_forced")
    assert all(one.answered for image in given for one in image)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"no_target": {"evidence": 1.0}}, "pointer"),
        ({"no_target": {"bias": 1.0}, "prompt": {"answers": ["It is [SEG]."]}}, "first word"),
        ({**READS, "no_target": {"evidence": -1.0}}, "-1.0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        parse_model_options(section)


def test_weights_may_be_calibrated_after_training():
    assert (
        only_training("no_target.bias")
        and only_training("no_target.evidence")
        and not only_training("seg_prompt.pointer")
    )


def saved(path, **metadata):
    save_file({"a": torch.zeros(1)}, path, metadata)
    return path


def test_weights_bring_their_calibration(make_model, batch, tmp_path):
    told = tmp_path / "told.json"
    told.write_text(json.dumps({"presence": {"bias": -ALWAYS, "evidence": 0.5}, "probe": "absence"}))
    source = make_model(**READS).eval()
    path = tmp_path / "weights.safetensors"
    state = {name: value.clone() for name, value in source.checkpoint_state().items()}
    save_file(state, path, {CALIBRATION_KEY: read_fit(told)})
    model, fixed = make_model(**READS).eval(), make_model(**READS, no_target={"bias": 0.0}).eval()
    for one in (model, fixed):
        one.load_checkpoint(str(path))
    assert model.no_target == NoTargetOptions(-ALWAYS, 0.5) and answered(model, batch) == [[False] * 3, [False]]
    assert fixed.no_target == NoTargetOptions() and answered(fixed, batch) == answered(source, batch)
    worded = make_model(prompt={"style": "plain", "answers": ["It is [SEG]."]}, seg_prompt={"pointer": True})
    with pytest.raises(ValueError, match="first word"):
        worded.load_checkpoint(str(path))


def test_weights_without_calibration_add_nothing(tmp_path):
    assert stored_calibration(saved(tmp_path / "plain.safetensors")) == NoTargetOptions()
    assert stored_calibration(tmp_path / "a.pth") == NoTargetOptions()


@pytest.mark.parametrize("entry", ["[1]", '{"bias": 1, "slope": 2}', '{"evidence": "much"}', '{"bias": NaN}'])
def test_a_calibration_that_is_none_is_refused(tmp_path, entry):
    with pytest.raises(WrongCheckpointError, match="another version"):
        stored_calibration(saved(tmp_path / "odd.safetensors", **{CALIBRATION_KEY: entry}))


@pytest.mark.parametrize("entry", ["{", "[" * 200_000])
def test_a_calibration_that_is_damaged_is_refused(tmp_path, entry):
    with pytest.raises(BadFileError, match=r"metadata of .*odd.safetensors is truncated or not JSON"):
        stored_calibration(saved(tmp_path / "odd.safetensors", **{CALIBRATION_KEY: entry}))


@pytest.mark.parametrize("content", ["{}", '{"presence": 3}', "no json", "[" * 200_000, "[]", "\udcff"])
def test_only_the_probe_s_result_calibrates(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadFileError, match="other.json"):
        read_fit(path)
