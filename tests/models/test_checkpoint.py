from __future__ import annotations

import json
import logging
import random

import pytest
import torch
from safetensors.torch import save_file

from lavis_svp.common.checkpoints import CorruptCheckpointError, WrongCheckpointError, read_metadata, save_checkpoint
from lavis_svp.common.files import BadFileError
from lavis_svp.models.checkpoint import check_config_compatible, flat_options, model_json, only_training, read_weights
from lavis_svp.models.config import parse_model_options

STAGE1 = {
    "projector": {"name": "svp", "sspe": "off"},
    "language": {"tuning": "full", "train_embeddings": "all"},
}
STAGE2 = {
    "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
    "language": {"tuning": "lora", "train_embeddings": "added", "lora": {"r": 2, "alpha": 4}},
}


def shake(model):
    """As if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(folder, model, iters=3):
    folder.mkdir(exist_ok=True)
    save_checkpoint(
        folder / f"checkpoint_{iters}.pth",
        {"model": model.checkpoint_state(), "optimizer": {"state": {}, "param_groups": []}},
    )
    return folder


def loss(model, batch):
    random.seed(0)
    torch.manual_seed(0)
    return model.eval()(batch)["loss"].detach()


@pytest.fixture(scope="module")
def stage1(make_model, tmp_path_factory):
    model = shake(make_model(**STAGE1))
    return model, save(tmp_path_factory.mktemp("stage1"), model)


def follow(make_model, folder, **sections):
    return make_model(**{**STAGE2, **sections}, load_pretrained=True, pretrained=str(folder))


def test_the_next_stage_starts_with_the_earlier_ones_weights(make_model, stage1, caplog):
    before, folder = stage1
    with caplog.at_level(logging.INFO):
        model = follow(make_model, folder)
    now = dict(model.named_parameters())
    for name, tensor in before.checkpoint_state().items():
        place = name if name in now else name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(now[place], tensor), name
    assert not now["language.transformer.norm.weight"].requires_grad  # trained before, frozen now, loaded
    fresh = next(r.message for r in caplog.records if r.message.startswith("randomly initialised"))
    assert "LoRA 8 tensors" in fresh and "projector.sspe " in fresh and "projector.head" not in fresh


def test_zero_started_sspe_and_lora_change_nothing_at_first(make_model, stage1, batch):
    before, folder = stage1
    zero = follow(make_model, folder, projector={**STAGE2["projector"], "sspe_start": "zero"})
    torch.testing.assert_close(loss(zero, batch), loss(before, batch))
    plain = follow(make_model, folder)
    assert (loss(plain, batch) - loss(before, batch)).abs() > 1e-4
    loss_now = zero.train()(batch)["loss"]
    loss_now.backward()
    assert zero.projector.sspe_to_llm.weight.grad.abs().sum() > 0


def test_a_checkpoint_of_the_next_stage_needs_the_earlier_one_no_more(make_model, stage1, batch, tmp_path):
    model = shake(follow(make_model, stage1[1]))
    save(tmp_path, model)
    for trainable in (None, ["projector.*", "language.transformer.*lora_*"]):
        alone = make_model(**STAGE2, trainable=trainable)
        alone.load_checkpoint(str(tmp_path))
        torch.testing.assert_close(loss(alone, batch), loss(model, batch))
        assert set(alone.checkpoint_state()) == set(model.checkpoint_state())  # carried on


def test_a_part_frozen_since_is_still_saved(make_model, stage1):
    model = follow(make_model, stage1[1], trainable=["projector.sspe*", "language.transformer.*lora_*"])
    state = model.checkpoint_state()
    assert {"mask_head.mask_decoder.mask_tokens.weight", "language.embed_tokens.weight"} <= set(state)
    assert "language.transformer.layers.0.self_attn.q_proj.base_layer.weight" in state
    assert not any(name.startswith("frozen.") for name in state)


def test_a_safetensors_file_works_as_well(make_model, stage1, tmp_path):
    before, _ = stage1
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in before.checkpoint_state().items()}, path)
    model = follow(make_model, path)
    assert torch.equal(model.projector.head[0].weight, before.projector.head[0].weight)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"projector": {"name": "mlp"}}, r"unknown to the model: projector\.ssa"),
        (
            {"seg_prompt": {"pointer": True}},
            r"readout\.mlp\.0\.weight: \(32, 32\).*\(32, 64\)",
        ),
        ({"language": {"tuning": "lora", "num_layers": 1}}, r"unknown.*language\.transformer\.layers\.1"),
    ],
)
def test_another_architecture_is_named(make_model, stage1, sections, message):
    with pytest.raises(WrongCheckpointError, match=message):
        follow(make_model, stage1[1], **sections)


def test_missing_weights_are_named(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint_<steps>.pth"):
        follow(make_model, tmp_path)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        follow(make_model, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="pretrained names no checkpoint"):
        make_model(load_pretrained=True, pretrained="")


def test_finetuned_stays_strict_about_what_is_missing(make_model, stage1):
    with pytest.raises(WrongCheckpointError, match=r"missing in the file: .*sspe"):
        make_model(**{**STAGE1, "projector": STAGE2["projector"]}, load_finetuned=True, finetuned=str(stage1[1]))


SECTION = {"projector": {"name": "svp"}, "seg_prompt": {"pointer": True}, "layout": "packed"}


@pytest.fixture
def trained(tmp_path):
    """A state that names the model of ``SECTION``."""
    import torch

    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"model": model_json(parse_model_options(SECTION))})
    return path


def check(path, **changes):
    check_config_compatible(parse_model_options({**SECTION, **changes}), path)


def test_the_same_model_passes_however_it_is_written(trained):
    check(trained)
    check(trained, projector={"name": "svp", "sspe": True})  # the default, spelled out
    check(
        trained,
        layout="separate",
        losses={"ce": 3.0},
        auxiliary_losses={"grounding": 1.0},
        learning_rates={"seg_prompt": 1e-3},
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector": {"name": "mlp"}}, "model.projector.name: 'svp' in training, 'mlp' now"),
        ({"projector": {"name": "svp", "sspe": False}}, "model.projector.sspe: 'full' in training, 'none' now"),
        ({"language": {"num_layers": 4}}, "model.language.num_layers: None in training, 4 now"),
        ({"seg_prompt": {"pointer": False}}, "model.seg_prompt.pointer: True in training, False now"),
        ({"vision_encoder": {"name": "other"}}, "model.vision_encoder.name"),
        ({"visual_tokens": {"norm": True}}, "model.visual_tokens.norm: False in training, True now"),
    ],
)
def test_another_architecture_is_refused_with_its_keys(trained, changes, words):
    with pytest.raises(WrongCheckpointError) as error:
        check(trained, **changes)
    assert words in str(error.value) and "load_finetuned: False" in str(error.value)


def test_another_input_is_warned_of(trained, caplog):
    with caplog.at_level(logging.WARNING):
        check(trained, superpixels={"name": "felzenszwalb"}, sam={"side": 512})
    assert "model.superpixels.name: 'one_pass' in training, 'felzenszwalb' now" in caplog.text
    assert "model.sam.side: 1024 in training, 512 now" in caplog.text


def test_options_of_another_version_are_named(tmp_path):
    import torch

    stored = json.loads(model_json(parse_model_options(SECTION)))
    stored["seg_prompt"]["telepathy"] = True
    save_file({"x": torch.zeros(1)}, tmp_path / "new.safetensors", {"model": json.dumps(stored)})
    with pytest.raises(WrongCheckpointError, match="another version of lavis_svp.*telepathy"):
        check(tmp_path / "new.safetensors")


def test_files_without_metadata_and_damaged_ones(tmp_path, trained):
    import torch

    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    check(tmp_path / "bare.safetensors")
    check(tmp_path / "not_even_there.pth")
    trained.write_bytes(trained.read_bytes()[:40])
    with pytest.raises(CorruptCheckpointError, match="no complete safetensors"):
        read_metadata(trained)


def test_every_pattern_is_of_an_option():
    from lavis_svp.models.checkpoint import INPUT_KEYS, ONLY_TRAINING, _matches

    superpixels = {"name": "sam", "cache": "off"}
    options = parse_model_options({**SECTION, "superpixels": superpixels, "learning_rates": {"seg_prompt": 1e-3}})
    keys = [*flat_options(options), "learning_rates"]
    for pattern in (*ONLY_TRAINING, *INPUT_KEYS):
        assert any(_matches(key, (pattern,)) for key in keys), pattern
    assert only_training("auxiliary_losses.grounding") and not only_training("visual_tokens.norm")


@pytest.mark.parametrize("cut", [0, 8, 200, -1])
def test_a_damaged_file_of_an_earlier_stage_is_named(tmp_path, cut):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadFileError) as error:
        read_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_state_of_dense_tensors_is_named(tmp_path):
    path = tmp_path / "checkpoint_1.pth"
    eye = torch.eye(2)
    for state in ([1], {"x": 1}, {"x": eye.to_sparse()}, {"x": eye.to("meta")}, {"x": eye[0, :1].expand(10**12)}):
        torch.save({"model": state}, path)
        with pytest.raises(BadFileError, match="checkpoint_1.pth"):
            read_weights(path)


@pytest.mark.parametrize(
    "stored",
    [
        "{", "[]", "3", "null", "[" * 200_000, '{"projector": 3}', '{"projector": {"name": []}}', '{"superpixels": []}',
        '{"language": {"lora": []}}', '{"sam": {"side": "x"}}', '{"learning_rates": 3}', '{"prompt": {"answers": 3}}',
    ],
)  # fmt: skip
def test_a_model_section_that_cannot_be_is_named(tmp_path, stored):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"model": stored})
    with pytest.raises((BadFileError, WrongCheckpointError), match=r"weights\.safetensors") as error:
        check(path)
    assert "\n" not in str(error.value)
