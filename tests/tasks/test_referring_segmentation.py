"""The task from YAML to result files, with a model of set masks; two processes; wrong settings."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import distributed
from torch.utils.data.distributed import DistributedSampler

from lavis_svp.metrics.records import read_records
from lavis_svp.tasks.referring_segmentation import EvalOptions, ReferringSegmentationTask

FILES_OF_A_RUN = {"test_7.jsonl", "test_7.summary.json", "images"}


def config(**run):
    return SimpleNamespace(
        run_cfg=OmegaConf.create({"seed": 5, **run}),
        model_cfg=OmegaConf.create({"arch": "svp_ris", "model_type": "tiny", "width": 4}),
        datasets_cfg=OmegaConf.create({"refshapes": {"type": "default"}}),
    )


def evaluate(task, model, images, sampler=None):
    task.before_evaluation(model=model, dataset=images)
    records = task.evaluation(model, images.loader(sampler=sampler), cuda_enabled=False)
    return task.after_evaluation(val_result=records, split_name="test", epoch=7)


def test_batches_go_where_the_model_is(images, set_model, folders):
    """Not to the first GPU; the device ``meta`` stands for the second one."""
    devices = []

    class Model(set_model):
        def predict_masks(self, samples, mode):
            devices.append(samples["image"].device.type)
            return super().predict_masks(samples, mode)

    task = ReferringSegmentationTask(EvalOptions(num_visualise=0))
    task.evaluation(Model({"generative": images.answers()}).to("meta"), images.loader(), cuda_enabled=True)
    assert set(devices) == {"meta"}


def test_an_image_of_the_lean_form_is_drawn_without_its_padding():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., :8, :] = 200
    pixels = ReferringSegmentationTask()._image({"image": image, "original_size": [(50, 100)]}, 0)
    assert pixels.shape == (8, 16, 3) and pixels.dtype == np.uint8 and (pixels == 200).all()


def test_lavis_knows_the_task():
    assert registry.get_task_class("referring_segmentation") is ReferringSegmentationTask


def test_run_from_yaml_to_files(images, set_model, folders, capsys):
    task = ReferringSegmentationTask.setup_task(cfg=config(eval={"num_visualise": 4, "bootstrap": {"resamples": 50}}))
    scores = evaluate(task, set_model({"generative": images.answers()}), images)
    assert scores["agg_metrics"] == scores["giou_macro"] == 0.5  # attribute 1, relation 0
    assert scores["n_acc"] == 1.0
    assert scores["pick_accuracy_macro"] == 0.5
    assert {path.name for path in (folders / "result").iterdir()} == FILES_OF_A_RUN
    records = read_records(folders / "result" / "test_7.jsonl")
    assert [record["expression_id"] for record in records] == images.expression_ids()
    summary = json.loads((folders / "result" / "test_7.summary.json").read_text())
    assert summary["run"]["seed"] == 5
    assert summary["run"]["model"]["arch"] == "svp_ris"
    assert summary["run"]["machine"]["cpus"] >= 1
    assert summary["headline"]["baseline_attribute_macro"] == 0.75
    assert summary["bootstrap"]["resamples"] == 50
    logged = json.loads((folders / "evaluate.txt").read_text())
    assert (logged["split"], logged["epoch"], logged["giou_macro"]) == ("test", 7, 0.5)
    drawn = {path.name for path in (folders / "result" / "images").rglob("*.png")}
    assert drawn == {"000.png", "001.png", "002.png", "003.png", "test.png"}
    assert [path.name for path in task.drawn_images] == ["000.png", "001.png", "002.png", "003.png"]
    assert "mean of kinds" in capsys.readouterr().out


def test_records_are_on_disk_while_it_runs(images, set_model, folders):
    task = ReferringSegmentationTask()
    model = set_model({"generative": images.answers()})
    seen = []

    def batches():
        for batch in images.loader(batch_size=1):
            seen.append(len(read_records(folders / "result" / "unfinished_rank0.jsonl")))
            yield batch

    task.evaluation(model, batches(), cuda_enabled=False)
    assert seen == [0, 3, 6]


def test_both_modes_are_reported_side_by_side(images, set_model, folders):
    right = images.answers()
    for name in right:
        if name.endswith("e1"):
            right[name] = type(right[name])(images.truth(1), pick=3, region_map=right[name].region_map)
    model = set_model({"generative": images.answers(), "teacher_forced": right})
    scores = evaluate(ReferringSegmentationTask(EvalOptions(mode="both", num_visualise=0)), model, images)
    assert (scores["giou_macro"], scores["teacher_forced_giou_macro"]) == (0.5, 1.0)
    assert model.asked == ["generative", "teacher_forced"] * 2


def test_valid_step_scores_every_expression_once(images, set_model):
    batch = next(iter(images.loader(batch_size=3)))
    records = ReferringSegmentationTask().valid_step(set_model({"generative": images.answers()}), batch)
    assert [record["expression_id"] for record in records] == images.expression_ids()


def test_missing_expressions_are_an_error_with_numbers(images, set_model, folders):
    task = ReferringSegmentationTask()
    with pytest.raises(ValueError, match=r"Of 9 expressions, 3 were not scored \(p1e0, p1e1, p1e2\)"):
        evaluate(task, set_model({"generative": images.answers()}), images, sampler=[0, 2])


def test_repeated_images_count_once(images, set_model, folders):
    task = ReferringSegmentationTask()
    scores = evaluate(task, set_model({"generative": images.answers()}), images, sampler=[0, 2, 1, 0])
    assert scores["n"] == 9


def test_a_split_of_no_target_only_still_has_agg_metrics(images, set_model, folders):
    batch = images.collater([images[0]])
    only = {key: [[value[0][2]]] for key, value in batch.items() if isinstance(value[0], list)}
    task = ReferringSegmentationTask()
    records = task.evaluation(set_model({"generative": images.answers()}), [{**batch, **only}], cuda_enabled=False)
    assert task.after_evaluation(val_result=records, split_name="none", epoch="best")["agg_metrics"] == 1.0


def test_images_come_from_the_file_without_an_image_tensor(images, set_model, folders):
    images.pixels = lambda image_id, split: np.full((8, 12, 3), (200, 0, 0), np.uint8)
    task = ReferringSegmentationTask()
    task.before_evaluation(model=set_model({}), dataset=images)
    batch = images.collater([images[0]])
    del batch["image"]
    assert task._image(batch, 0).shape == (8, 12, 3)
    assert task._image(batch, 0)[0, 0].tolist() == [200, 0, 0]


def test_train_step_gives_loss_and_detached_parts(images, set_model):
    batch = images.collater([images[0], images[1]])
    loss, parts = ReferringSegmentationTask().train_step(set_model({}), batch)
    assert loss.requires_grad
    assert parts == {"loss": torch.tensor(2.0), "loss_ce": torch.tensor(1.0)}
    assert not any(value.requires_grad for value in parts.values())


def test_train_step_passes_statistics_on(images, set_model):
    batch = images.collater([images[0]])
    model, stats = set_model({}), {"tokens_per_image": torch.tensor(3.0)}
    _, parts = ReferringSegmentationTask().train_step(lambda samples: {**model(samples), "stats": stats}, batch)
    assert parts["stats"] == stats


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "teacher-forced"}, "Did you mean 'teacher_forced'"),
        ({"num_visualize": 3}, "did you mean 'num_visualise'"),
        ({"num_visualise": -1}, "at least 0, got -1"),
        ({"bootstrap": {"resamples": 0}}, "resamples >= 1"),
        ({"bootstrap": {"draws": 10}}, "run.eval.bootstrap"),
        ("generative", "run.eval must be a mapping"),
    ],
)
def test_wrong_settings_name_the_key(section, message):
    with pytest.raises((ValueError, KeyError), match=message):
        ReferringSegmentationTask.setup_task(cfg=config(eval=section))


def test_a_run_that_only_aligns_says_so(caplog):
    for steps, said in ((100, 0), (101, 0), (50, 1)):
        caplog.clear()
        cfg = config(max_iters=steps)
        cfg.model_cfg = {**cfg.model_cfg, "auxiliary_losses": {"alignment_steps": 99}}
        ReferringSegmentationTask.setup_task(cfg=cfg)
        assert caplog.text.count("All 50 steps of run.max_iters") == said


def test_no_result_folder_says_who_sets_it(images, set_model, monkeypatch):
    monkeypatch.delitem(registry.mapping["paths"], "result_dir", raising=False)
    with pytest.raises(ValueError, match="no 'result_dir': runners set it"):
        ReferringSegmentationTask().evaluation(set_model({}), [], cuda_enabled=False)


def one_of_two(rank, meeting_point, folder, model_class, images):
    """One process of two; 3 images, so that the sampler repeats one."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    registry.mapping["paths"] |= {"output_dir": folder, "result_dir": f"{folder}/result"}
    task = ReferringSegmentationTask(EvalOptions(num_visualise=2))
    sampler = DistributedSampler(images, num_replicas=2, rank=rank, shuffle=False)
    scores = evaluate(task, model_class({"generative": images.answers()}), images, sampler)
    Path(folder, f"scores{rank}.json").write_text(json.dumps({k: v for k, v in scores.items() if "ms_" not in k}))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_records_of_one(images, set_model, folders, tmp_path):
    evaluate(ReferringSegmentationTask(), set_model({"generative": images.answers()}), images)
    alone = read_records(folders / "result" / "test_7.jsonl")
    together = tmp_path / "two"
    together.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=one_of_two, args=(rank, tmp_path / "meet", str(together), set_model, images))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    timeless = [
        [{**record, "ms": 0} for record in rows] for rows in (alone, read_records(together / "result/test_7.jsonl"))
    ]
    assert timeless[0] == timeless[1]
    scores = [json.loads((together / f"scores{rank}.json").read_text()) for rank in range(2)]
    assert scores[0] == scores[1]
    assert {path.name for path in (together / "result").iterdir()} == FILES_OF_A_RUN
