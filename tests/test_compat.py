"""LAVIS 1.0.2 works with today's transformers, on a CPU, without a process group, twice in a process."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import lavis_svp
from lavis_svp.common.paths import cache_root
from lavis_svp.compat import INSTALL_LAVIS
from lavis_svp.compat.patches import init_distributed_mode, restore_moved_names

from lavis.common.logger import SmoothedValue  # isort: skip
from lavis.common.registry import registry
from lavis.datasets.datasets.dataloader_utils import PrefetchLoader
from lavis.models import med
from lavis.models.base_model import BaseModel
from lavis.models.blip2_models import Qformer
from lavis.tasks.base_task import BaseTask


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_lavis_the_error_names_the_command():
    hide = (
        "import sys, importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = classmethod(lambda c, n, *a: None if n == 'lavis' else find(n, *a))\n"
        "import lavis_svp, lavis_svp.common.registry\n"
    )
    for statement in ("import lavis", "import lavis_svp.tasks", "from lavis.models import load_model"):
        result = run_python(hide + statement)
        assert result.returncode and INSTALL_LAVIS in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize(("version", "named"), [("5.0.0", "4.57.6"), ("5.23.1", "4.57.6"), (None, "4.57.6")])
def test_a_transformers_that_cannot_work_is_named(monkeypatch, version, named):
    def fake(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    with pytest.raises(ImportError, match=named):
        restore_moved_names()


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import lavis_svp.runners.optimizer",
        "import lavis_svp.processors.image",
        "import lavis_svp.datasets.builders",
        "from lavis.models import model_zoo",
    ],
)
def test_any_import_order_registers_once(first):
    code = f"import lavis_svp; {first}; from lavis.common.registry import registry as r; print(r.list_runners())"
    result = run_python(code)
    assert "runner_svp" in result.stdout, result.stderr


@pytest.mark.slow
def test_opencv_reads_png_after_lavis():
    code = (
        "import lavis_svp, lavis, cv2, numpy; "
        "png = cv2.imencode('.png', numpy.arange(3000, dtype=numpy.uint8).reshape(20, 50, 3))[1]; "
        "print('read', cv2.imdecode(png, cv2.IMREAD_COLOR).shape)"
    )
    result = run_python(code)
    assert "read (20, 50, 3)" in result.stdout, result.stderr


def test_lavis_text_models_generate():
    config = med.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        encoder_width=16,
        fusion_layer=0,
        add_type_embeddings=False,
        add_cross_attention=False,
        is_decoder=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = med.BertLMHeadModel(config).eval()
    assert model.generate(torch.ones(1, 2, dtype=torch.long), max_length=5, do_sample=False).shape[1] <= 5
    assert hasattr(Qformer.BertLMHeadModel, "generate")


def test_meters_and_loaders_work_without_cuda_and_without_processes():
    meter = SmoothedValue()
    meter.update(2.0)
    meter.synchronize_between_processes()
    assert meter.global_avg == 2.0
    if not torch.cuda.is_available():
        loader = PrefetchLoader([{"x": torch.ones(1)}, {"x": torch.zeros(1)}])
        assert [batch["x"].item() for batch in loader] == [1, 0] and len(loader) == 2


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    run = OmegaConf.create({"device": "cpu"})
    init_distributed_mode(run, silence=lambda main: None)
    assert run == {"device": "cpu", "distributed": False, "rank": 0, "world_size": 1, "gpu": 0}


def test_the_cache_is_ours_instead_of_the_authors_machine():
    assert registry.get_path("cache_root") == str(cache_root())


def test_version_is_given():
    assert lavis_svp.__version__


class LinearModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, samples):
        return {"loss": self.linear(samples["x"]).square().mean()}


class PlainTask(BaseTask):
    def valid_step(self, model, samples):
        return [model(samples)["loss"].item()]

    def after_evaluation(self, val_result, **kwargs):
        return {"agg_metrics": sum(val_result)}


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": torch.tensor([index, 1.0])}

    def collater(self, samples):
        return {"x": torch.stack([sample["x"] for sample in samples])}


@pytest.mark.parametrize("name", ["runner_base", "runner_iter"])
def test_lavis_own_runners_train_on_a_cpu_twice_in_a_process(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {
        "device": "cpu", "distributed": False, "evaluate": False, "output_dir": "relative", "init_lr": 0.1, "min_lr": 0,
        "lr_sched": "linear_warmup_cosine_lr", "num_workers": 0, "batch_size_train": 2, "batch_size_eval": 2,
        "weight_decay": 0.0, "max_epoch": 1, "max_iters": 2, "iters_per_inner_epoch": 2, "train_splits": ["train"],
        "valid_splits": ["val"],
    }  # fmt: skip
    config = SimpleNamespace(run_cfg=OmegaConf.create(run), to_dict=lambda: {"run": run})
    for job in ("", "second"):
        datasets = {"points": {"train": Points(), "val": Points()}}
        runner = registry.get_runner_class(name)(config, PlainTask(), LinearModel(), datasets, job)
        runner.train()
        assert (Path("relative") / job / "checkpoint_best.pth").is_file()
        assert registry.get_path("output_dir") == str(tmp_path / "relative" / job)
