"""svp_vqa and svp_captioning, and LAVIS's own vqa, gqa and captioning, on a model with set answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import lavis_svp  # noqa: F401

# isort: split
from lavis.common.registry import registry

from lavis_svp.common.files import BadFileError
from lavis_svp.models.outputs import NoAnswer
from lavis_svp.tasks import answer_scores, answering
from lavis_svp.tasks.answering import AnswerEvalOptions, ImageSwapper, SvpCaptioningTask, SvpVqaTask

TRUTH = {1: "2", 2: "red", 3: "yes", 4: "no", 5: "3"}
OF_IMAGE = {0: [1, 2], 1: [3], 2: [4, 5]}
CAPTIONS = {0: "a red cup on a table", 1: "two white dogs in the snow", 2: "a man rides a horse"}


class SeeingModel(torch.nn.Module):
    """Knows the truth of the image that ``image`` shows; says "dunno" to a question about another one."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def before_evaluation(self, **kwargs):
        pass

    def predict_answers(self, samples, **kwargs):
        self.calls.append(kwargs)
        shown = [int(pixels[0, 0, 0]) for pixels in samples["image"]]
        return [
            [TRUTH[number] if number in OF_IMAGE[image] else "dunno" for number in numbers]
            for image, numbers in zip(shown, samples["question_id"], strict=True)
        ]

    def generate(self, samples, **kwargs):
        self.calls.append(kwargs)
        return [CAPTIONS[int(image[0, 0, 0])] for image in samples["image"]]


def batch(ids, captions=False):
    asked = {index: [0] if captions else OF_IMAGE[index] for index in ids}
    return {
        "image": torch.stack([torch.full((4, 2, 2), float(index)) for index in ids]),
        "image_id": ids,
        "file_name": [f"{index}.png" for index in ids],
        "original_size": [(2, 2)] * len(ids),
        "text_input": [["" if captions else f"question {number}?" for number in asked[index]] for index in ids],
        "expression_ids": [[str(index)] if captions else [str(number) for number in asked[index]] for index in ids],
        "question_id": [asked[index] for index in ids],
        "kinds": [["caption" if captions else "what"] * len(asked[index]) for index in ids],
    }


class Split:
    answer_list = None

    def __init__(self, ids, truth):
        self.ids, self.ground_truth = ids, truth

    def expression_ids(self):
        return self.ids


@pytest.fixture
def vqa_truth(tmp_path):
    annotations = [
        {
            "question_id": number,
            "image_id": image,
            "question_type": "count" if answer.isdigit() else "what",
            "answer_type": "number" if answer.isdigit() else "other",
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer, "answer_id": i} for i in range(10)],
        }
        for image, numbers in OF_IMAGE.items()
        for number in numbers
        for answer in [TRUTH[number]]
    ]
    questions = [
        {"question_id": one["question_id"], "image_id": one["image_id"], "question": "x?"} for one in annotations
    ]
    paths = tmp_path / "q.json", tmp_path / "a.json"
    paths[0].write_text(
        json.dumps(
            dict.fromkeys(("info", "license", "task_type", "data_type", "data_subtype"), "x") | {"questions": questions}
        )
    )
    paths[1].write_text(json.dumps({"annotations": annotations, "data_subtype": "x"}))
    return paths


@pytest.fixture
def caption_truth(tmp_path):
    path = tmp_path / "c.json"
    annotations = [{"id": index, "image_id": index, "caption": text} for index, text in CAPTIONS.items()]
    path.write_text(json.dumps({"images": [{"id": index} for index in CAPTIONS], "annotations": annotations}))
    return (path,)


def evaluated(task, split, batches):
    model = SeeingModel()
    task.before_evaluation(model, split)
    return task.after_evaluation(task.evaluation(model, batches, cuda_enabled=False), "test", 7), model


def test_vqa_scores_and_files(folders, vqa_truth):
    task = SvpVqaTask(AnswerEvalOptions(blind=True))
    task.run_cfg = {"max_len": 4}
    split = Split(["1", "2", "3", "4", "5"], vqa_truth)
    scores, model = evaluated(task, split, [batch([0, 1]), batch([2])])
    assert scores["agg_metrics"] == 100 and scores["blind"] == 0 and scores["accuracy count"] == 100
    assert model.calls[0]["max_len"] == 4 and model.calls[0]["num_beams"] == 1
    result = json.loads((folders / "result/test_7_result.json").read_text())
    assert result == [{"question_id": number, "answer": answer} for number, answer in TRUTH.items()]
    summary = json.loads((folders / "result/test_7.summary.json").read_text())
    assert summary["overall"]["n"] == 5 and summary["by_kind"]["count"]["n"] == 2
    assert summary["run"]["asked"]["inference_method"] == "generate"
    assert json.loads((folders / "evaluate.txt").read_text())["agg_metrics"] == 100


def test_the_result_file_goes_through_the_official_evaluation(folders, vqa_truth):
    """What LAVIS's vqa_tools make of our result file is our score."""
    from lavis.common.vqa_tools.vqa import VQA
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    evaluated(SvpVqaTask(), Split([str(number) for number in TRUTH], vqa_truth), [batch([0, 1, 2])])
    vqa = VQA(str(vqa_truth[1]), str(vqa_truth[0]))
    official = VQAEval(vqa, vqa.loadRes(str(folders / "result/test_7_result.json"), str(vqa_truth[0])))
    official.evaluate()
    assert official.accuracy["overall"] == 100


def test_a_split_without_answers_is_answered_all_the_same(folders, vqa_truth):
    scores, _ = evaluated(SvpVqaTask(), Split(["1", "2"], vqa_truth[:1]), [batch([0])])
    assert scores == {"agg_metrics": 0.0} and (folders / "result/test_7_result.json").is_file()


def test_an_unanswered_question_is_an_error(folders, vqa_truth):
    with pytest.raises(ValueError, match="2 of 3 texts were not answered"):
        evaluated(SvpVqaTask(), Split(["3", "4", "5"], vqa_truth), [batch([1])])


def test_captions_scores_and_files(folders, caption_truth, monkeypatch):
    monkeypatch.setattr(answer_scores.shutil, "which", lambda name: None)
    task = SvpCaptioningTask(AnswerEvalOptions(blind=True))
    scores, _ = evaluated(task, Split(["0", "1", "2"], caption_truth), [batch([0, 1, 2], captions=True)])
    assert scores["agg_metrics"] == pytest.approx(scores["CIDEr"] + scores["Bleu_4"])
    assert scores["Bleu_1"] == pytest.approx(1, abs=1e-6) and scores["blind CIDEr"] < 0.5 < scores["CIDEr"]
    result = json.loads((folders / "result/test_7_result.json").read_text())
    assert result == [{"image_id": index, "caption": text} for index, text in CAPTIONS.items()]


def test_blind_needs_two_images(folders, vqa_truth):
    with pytest.raises(ValueError, match="batch_size_eval"):
        evaluated(SvpVqaTask(AnswerEvalOptions(blind=True)), Split(["1", "2"], vqa_truth), [batch([0])])


def test_swapped_images_are_others_and_each_comes_once():
    others, shown = ImageSwapper(), []
    for ids in ([0, 1, 2], [3, 4], [5]):
        swapped = others.swap(batch_of(ids))
        given = [int(image[0, 0, 0]) for image in swapped["image"]]
        assert all(one != other for one, other in zip(ids, given, strict=True)) and swapped["text_input"] == ids
        shown += given
    assert shown == [1, 0, 1, 2, 3, 4]


def test_what_was_prepared_of_the_own_images_does_not_go_with_others():
    swapped = ImageSwapper().swap({**batch_of([0, 1]), "prepared": "of images 0 and 1"})
    assert "prepared" not in swapped


def test_the_time_of_an_answer_includes_what_the_device_has_queued(monkeypatch):
    waits = []
    monkeypatch.setattr(answering, "wait_for", lambda device: waits.append(str(device)))
    SvpVqaTask().valid_step(SeeingModel(), batch([0]))
    assert waits == ["cpu", "cpu"]


def test_batches_go_where_the_model_is(folders):
    class Model(SeeingModel):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="meta"))

        def generate(self, samples, **kwargs):
            assert samples["image"].device.type == "meta"
            return ["a cup"] * len(samples["image"])

    assert len(SvpCaptioningTask().evaluation(Model(), [batch([0, 1], captions=True)], cuda_enabled=True)) == 2


def batch_of(ids):
    images = torch.stack([torch.full((4, 2, 2), float(index)) for index in ids])
    return {"image_id": ids, "image": images, "text_input": ids}


# ------------------------------------------------------------------------------------- LAVIS's own tasks


class FlatModel(SeeingModel):
    """Takes what LAVIS's tasks give: one question per image."""

    def predict_answers(self, samples, **kwargs):
        self.calls.append(kwargs)
        return [TRUTH[int(number)] for number in samples["question_id"]]


@pytest.mark.parametrize("name", ["vqa", "gqa"])
def test_laviss_own_vqa_tasks_run(folders, vqa_truth, name):
    run = {"num_beams": 1, "inference_method": "generate", "max_len": 10, "min_len": 1, "evaluate": True}
    task = registry.get_task_class(name).setup_task(SimpleNamespace(run_cfg=run))
    task.ques_files, task.anno_files = {"test": str(vqa_truth[0])}, {"test": str(vqa_truth[1])}
    samples = {"question_id": torch.tensor(list(TRUTH)), "answer": list(TRUTH.values())}
    result = task.valid_step(FlatModel(), samples)
    assert task.after_evaluation(result, "test")["agg_metrics"] == 100


def test_laviss_own_captioning_task_runs(folders):
    run = SimpleNamespace(num_beams=1, max_len=30, min_len=1, evaluate=True, get=lambda key, default: False)
    task = registry.get_task_class("captioning").setup_task(SimpleNamespace(run_cfg=run))
    model = SeeingModel()
    result = task.valid_step(model, batch([0, 2], captions=True))
    assert result == [{"caption": CAPTIONS[index], "image_id": index} for index in (0, 2)]
    assert task.after_evaluation(result, "test", 0) == {"agg_metrics": 0.0}  # its own scores need a download


def test_a_text_without_an_answer_is_logged_and_recorded(folders, vqa_truth, caplog):
    class Failing(SeeingModel):
        def predict_answers(self, samples, **kwargs):
            first, *others = super().predict_answers(samples, **kwargs)
            return [[NoAnswer("too long"), *first[1:]], *others]

    task = SvpVqaTask()
    first, second, third = task.valid_step(Failing(), batch([0, 1]))
    assert first["answer"] == "" and first["error"] == "too long"
    assert "error" not in second and "error" not in third
    assert "Text 1 of 0.png was not answered: too long" in caplog.text


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"annotations": [5]}', '{"annotations": [{"question_id": "x"}]}', "{}"]
)
def test_damaged_true_answers_are_named(folders, vqa_truth, content):
    vqa_truth[1].write_text(content)
    with pytest.raises(BadFileError, match="a.json"):
        evaluated(SvpVqaTask(), Split(["1", "2"], vqa_truth), [batch([0])])


@pytest.mark.parametrize("content", ["[", "[]", '{"annotations": [5]}', '{"annotations": [{"image_id": 0}]}'])
def test_damaged_true_captions_are_named(folders, caption_truth, content):
    caption_truth[0].write_text(content)
    with pytest.raises(BadFileError, match="c.json"):
        evaluated(SvpCaptioningTask(), Split(["0"], caption_truth), [batch([0], captions=True)])
