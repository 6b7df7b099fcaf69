"""The original LLaVA's convention, on a small double of its contract around a real CLIP and a real LLaMA.

LLaVA itself does not install beside this package's transformers. The double keeps what our part relies on: one -200
an image, `encode_images` of all images at once, an image for each prompt without one, labels of -100, padding on
either side made after the splice, generation from embeddings.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lavis_svp.common.files import BadFileError
from lavis_svp.hosts.llava_original import (
    RaggedImages,
    SuperpixelImageProcessor,
    add_label_channels,
    build_vision_projector,
    label_channels,
    llava_swap_config,
    load_mm_projector,
    read_label_channels,
    save_mm_projector,
)
from lavis_svp.projectors import PatchFeatures, Projector, Superpixels, build_projector, list_projectors
from lavis_svp.superpixels import RegionMap

IMAGE, IGNORED = -200, -100
SIDE, PATCH, VISION, LANGUAGE, WORDS = 48, 8, 32, 24, 60
SHOWN = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
OPTIONS = {
    "avg_pool": {"tokens_h": 3, "tokens_w": 2},
    "pixel_shuffle": {"ratio": 3},
    "svp": {"sspe_width": 32, "mask_size": 8},
    "token_packer": {"scale": 2, "num_levels": 2},
    "vision_zip": {"dominant": 5, "contextual": 2},
}


class Tower(nn.Module):
    """CLIP's patches of the layer before the last."""

    def __init__(self):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=VISION, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
            patch_size=PATCH,
        )  # fmt: skip
        self.vision_tower = CLIPVisionModel(config)
        self.num_patches_per_side = SIDE // PATCH
        self.select_layer, self.first = -2, 1

    @torch.no_grad()
    def forward(self, images):
        states = self.vision_tower(images, output_hidden_states=True).hidden_states
        return states[self.select_layer][:, self.first :]


class DoubleMeta:
    """What LlavaMetaForCausalLM promises."""

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.tower[0]

    def encode_images(self, images):
        return self.model.mm_projector(self.model.tower[0](images))

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        assert isinstance(images, torch.Tensor) and images.ndim == 4, "the double splits no tiles"
        visual = iter(self.encode_images(images))
        kept = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        targets = torch.full_like(input_ids, IGNORED) if labels is None else labels
        rows, wanted = [], []
        for ids, said in zip(
            *([row[real] for row, real in zip(t, kept, strict=True)] for t in (input_ids, targets)), strict=True
        ):
            parts, spoken = [], []
            if not (ids == IMAGE).any():
                parts.append(next(visual)[:0])  # the image of a prompt without any
            for word, target in zip(ids, said, strict=True):
                tokens = next(visual) if word == IMAGE else self.model.embed_tokens(word[None])
                parts.append(tokens)
                spoken.append(target.new_full((len(tokens),), IGNORED) if word == IMAGE else target[None])
            rows.append(torch.cat(parts))
            wanted.append(torch.cat(spoken))
        assert next(visual, None) is None
        side = getattr(self.config, "tokenizer_padding_side", "right")
        embeds = pad_sequence(rows, batch_first=True, padding_side=side)
        mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side).bool()
        new_labels = pad_sequence(wanted, batch_first=True, padding_side=side, padding_value=IGNORED)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return None, positions, mask.long(), past_key_values, embeds, None if labels is None else new_labels


class Double(RaggedImages, DoubleMeta, LlamaForCausalLM):
    def logits(self, input_ids, images, labels=None, attention_mask=None):
        given = self.prepare_inputs_labels_for_multimodal(input_ids, None, attention_mask, None, labels, images)
        _, positions, mask, _, embeds, labels = given
        out = LlamaForCausalLM.forward(
            self, inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels
        )
        return out, mask, labels

    def say(self, input_ids, images, attention_mask=None, **kwargs):
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, None, None, images
        )
        return self.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False, **kwargs)


def config_of(kind, **more):
    return SimpleNamespace(
        mm_projector_type=kind, mm_hidden_size=VISION, hidden_size=LANGUAGE, mm_projector_grid=[6, 6],
        mm_projector_options=OPTIONS.get(kind, {}), mm_projector_levels=[1, 3],
        mm_superpixels={"name": "felzenszwalb"}, **more,
    )  # fmt: skip


def double(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=LANGUAGE, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=WORDS - 1,
    )  # fmt: skip
    model = Double(config)
    model.model.tower = [Tower().eval()]
    model.model.get_vision_tower = lambda: model.model.tower[0]
    model.model.mm_projector = build_vision_projector(config_of(kind))
    with torch.no_grad():  # so that what an image holds changes what is said
        for parameter in model.model.mm_projector.parameters():
            parameter.mul_(4.0)
    return model.eval()


@pytest.fixture
def images_of(image):
    def make(kind, pad=True):
        inner = CLIPImageProcessor(**SHOWN)
        process = SuperpixelImageProcessor(inner, config_of(kind), pad=pad)
        return process([image(seed, 60, 45 + 20 * seed) for seed in range(4)], return_tensors="pt")["pixel_values"]

    return make


def prompts():
    """One image, two, none (which takes an image too); with padding on the right, masked out."""
    rows = [[1, 5, IMAGE, 7], [1, IMAGE, 9, IMAGE, 8, 3], [1, 4, 6]]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, ids != 0, [[0], [1, 2], [3]]


def test_llavas_own_types_stay():
    built = build_vision_projector(config_of("mlp2x_gelu"))
    assert [type(layer) for layer in built] == [nn.Linear, nn.GELU, nn.Linear]
    assert list(built.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(build_vision_projector(config_of("mlp3x_gelu"))) == 5
    assert build_vision_projector(config_of("linear")).weight.shape == (LANGUAGE, VISION)
    assert isinstance(build_vision_projector(config_of("identity")), nn.Identity)
    assert isinstance(build_vision_projector(SimpleNamespace(mm_hidden_size=4, hidden_size=8)), nn.Linear)
    for name in list_projectors():
        assert build_vision_projector(config_of(name)).name == name
    with pytest.raises(ValueError, match="'mlp2x'.*mlp<number>x_gelu.*svp"):
        build_vision_projector(config_of("mlp2x"))


def test_the_grid_is_read_from_the_vision_tower(tmp_path):
    CLIPVisionConfig(image_size=56, patch_size=14).save_pretrained(tmp_path)
    config = SimpleNamespace(mm_projector_type="svp", mm_hidden_size=8, hidden_size=6, mm_vision_tower=str(tmp_path))
    swap = llava_swap_config(config)
    assert swap.grid == (4, 4) and swap.superpixels == {"name": "sam"} and swap.options == {}


@torch.no_grad()
def test_mlp_is_mlp2x_gelu_bit_for_bit(images_of):
    ids, mask, _ = prompts()
    theirs, ours = double("mlp2x_gelu"), double("mlp")
    ours.model.mm_projector.head.load_state_dict(theirs.model.mm_projector.state_dict())
    images = images_of("mlp")
    assert isinstance(ours.encode_images(images), torch.Tensor)
    before, after = (
        theirs.logits(ids, images[:, :3], attention_mask=mask),
        ours.logits(ids, images, attention_mask=mask),
    )
    assert torch.equal(before[0].logits, after[0].logits)
    assert torch.equal(theirs.say(ids, images[:, :3], mask), ours.say(ids, images[:, :3], mask))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["svp", "mask_pool", "avg_pool"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_one_by_one(images_of, kind, side):
    model, images = double(kind), images_of(kind)
    model.config.tokenizer_padding_side = side
    ids, mask, own = prompts()
    labels = ids.clone()
    out, new_mask, new_labels = model.logits(ids, images, labels, mask)
    counts = [len(tokens) for tokens in model.encode_images(images)]
    assert len(set(counts)) > 1 or kind == "avg_pool"
    for row, chosen in enumerate(own):
        single, _, said = model.logits(ids[row : row + 1, mask[row]], images[chosen], labels[row : row + 1, mask[row]])
        real = new_mask[row].bool()
        assert int(real.sum()) == single.logits.shape[1]
        assert torch.allclose(out.logits[row][real], single.logits[0], atol=1e-5)
        assert torch.equal(new_labels[row][real], said[0]) and (new_labels[row][~real] == IGNORED).all()
    assert int((new_labels == IGNORED).sum()) >= sum(counts[:3])
    assert out.loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["svp", "mlp2x_gelu"])
def test_generation_with_cache_equals_without_and_beams(images_of, kind):
    model = double(kind)
    images = images_of("svp")[:, : 3 if kind == "mlp2x_gelu" else 5]
    model.config.tokenizer_padding_side = "left"
    ids, mask, own = prompts()
    said = [model.say(ids, images, mask, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said) and not torch.equal(said[0], model.say(ids, images.flip(0), mask))
    beams = model.say(ids, images, mask, num_beams=3)
    for row, chosen in enumerate(own):
        alone = model.say(ids[row : row + 1, mask[row]], images[chosen], num_beams=3)
        assert torch.equal(beams[row, : alone.shape[1]], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["token_packer", "vision_zip", "dpc_knn"])
def test_what_projectors_want_besides_comes_from_the_model_in_the_tower(images_of, kind):
    model, images = double(kind), images_of(kind)
    model.config.mm_projector_levels = [1, 3]
    together = model.encode_images(images)
    for image, tokens in zip(images, together, strict=True):
        assert torch.allclose(model.encode_images(image[None])[0], tokens, atol=1e-5)
    projector, tower = model.model.mm_projector, model.model.tower[0]
    with torch.no_grad():  # another last layer changes only what looks at it
        tower.vision_tower.vision_model.encoder.layers[2].mlp.fc2.weight.add_(0.1)
    same = all(torch.equal(a, b) for a, b in zip(model.encode_images(images), together, strict=True))
    assert same == ("levels" not in projector.requires)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_superpixels(images_of, dtype):
    model, images = double("mask_pool"), images_of("mask_pool")
    exact = model.encode_images(images)
    model.to(dtype).model.tower[0].to(dtype)
    rough = model.encode_images(images.to(dtype))
    assert [len(tokens) for tokens in exact] == [len(tokens) for tokens in rough]
    assert all(torch.allclose(a, b.float(), atol=0.15) for a, b in zip(exact, rough, strict=True))


@torch.no_grad()
def test_padding_is_seen_by_no_token_and_tokens_are_means_of_their_patches(image):
    """An image twice as wide as high, halves as superpixels: 3 of 6 rows of patches, 3 columns each."""
    model = double("mask_pool")
    inner = CLIPImageProcessor(**SHOWN)
    process = SuperpixelImageProcessor(inner, config_of("mask_pool"))
    halves = RegionMap.from_labels(np.repeat(np.array([[0, 1]], np.int32), 48, axis=1).repeat(48, 0))
    images = process.preprocess(image(1, 48, 96), region_maps=[halves], return_tensors="pt")["pixel_values"]
    assert images.shape == (1, 5, SIDE, SIDE)
    patches = model.model.tower[0](images[:, :3])[0].view(6, 6, -1)
    # 48 x 48 of a 96 x 96 square: rows 24..72, in patches 1.5..4.5
    weights = torch.tensor([0, 0.5, 1, 1, 0.5, 0])[:, None, None]
    middle = (weights * patches).sum(0) / 3
    wanted = model.model.mm_projector.head(torch.stack([middle[:3].mean(0), middle[3:].mean(0)]))
    assert torch.allclose(model.encode_images(images)[0], wanted, atol=1e-5)


@torch.no_grad()
def test_without_padding_the_superpixels_are_those_of_the_crop(image):
    model = double("mask_pool")
    inner = CLIPImageProcessor(**SHOWN)
    thirds = RegionMap.from_labels(np.repeat(np.array([[0, 1, 2]], np.int32), 32, axis=1).repeat(48, 0))
    process = SuperpixelImageProcessor(inner, config_of("mask_pool"), pad=False)
    images = process.preprocess(image(1, 48, 96), region_maps=[thirds], return_tensors="pt")["pixel_values"]
    # of 96 columns the crop shows 24..72: the first third up to 8 of 48, the second up to 40
    channel = images[0, 3, 0]
    assert channel.unique_consecutive(return_counts=True)[1].tolist() == [8, 32, 8]
    assert len(model.encode_images(images)[0]) == 3


@torch.no_grad()
def test_images_in_a_list_and_dummies_of_texts(images_of):
    model, images = double("svp"), images_of("svp")
    ids, mask, _ = prompts()
    listed = [*images[:3], torch.zeros(3, SIDE, SIDE)]
    wanted = model.logits(ids, images, attention_mask=mask)[0].logits
    assert torch.equal(model.logits(ids, listed, attention_mask=mask)[0].logits, wanted)


def test_training_reaches_the_whole_projector(images_of):
    model, images = double("svp"), images_of("svp")
    ids, mask, _ = prompts()
    model.logits(ids, images, ids.clone(), mask)[0].loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.mm_projector.parameters())


def test_it_stays_on_its_device(devices, images_of):
    model, images = double("svp"), images_of("svp")
    ids, mask, _ = prompts()
    with devices.LogicalCuda() as cuda:
        model.to("cuda:1")
        model.model.tower[0].to("cuda:1")
        ids, mask, images = ids.to("cuda:1"), mask.to("cuda:1"), images.to("cuda:1")
        model.logits(ids, images, ids.clone(), mask)[0].loss.backward()
        model.say(ids, images, mask)
    assert not [fault for fault in cuda.faults if fault.place.startswith("lavis_svp/")]


def test_the_image_processor_serves_data_sets_and_workers(image):
    inner = CLIPImageProcessor(**SHOWN)
    process = pickle.loads(pickle.dumps(SuperpixelImageProcessor(inner, config_of("svp"))))
    assert process.crop_size == {"height": SIDE, "width": SIDE} and process.image_mean == inner.image_mean
    plain = process([image(1), image(2)])["pixel_values"]
    assert isinstance(plain, list) and plain[0].shape == (5, SIDE, SIDE)
    unlabelled = SuperpixelImageProcessor(inner, config_of("avg_pool"))(image(1), return_tensors="pt")["pixel_values"]
    assert unlabelled[:, 3].unique().tolist() == [0.0, 1.0]  # nothing and padding
    with pytest.raises(AttributeError, match="no_such"):
        process.no_such  # noqa: B018  (the point is the access)


def test_the_document(image, tmp_path, monkeypatch):
    """docs/hosts.md: its last Python, word for word."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    own = build_vision_projector(config_of("mlp2x_gelu"))
    save_mm_projector(tmp_path / "llava-v1.5-7b" / "mm_projector.bin", own)
    model = double("svp")
    model.config.update(vars(config_of("svp")))
    model.get_vision_tower().image_processor = CLIPImageProcessor(**SHOWN)
    names = {"model": model}
    exec(compile(code, "docs/hosts.md", "exec"), names)
    assert names["new"] and torch.equal(names["projector"].head[2].weight, own[2].weight)
    images = names["tower"].image_processor(image(1), return_tensors="pt")["pixel_values"]
    assert len(model.encode_images(images)[0]) > 1
    assert torch.load("out/mm_projector.bin", weights_only=True).keys() >= {"model.mm_projector.head.0.weight"}
    for line in ("build_vision_projector", "class LlavaLlamaForCausalLM(RaggedImages, "):
        assert re.search(rf"^\+.*{re.escape(line)}", text, re.MULTILINE)


def test_what_is_wrong(images_of, image):
    model, images = double("svp"), images_of("svp")
    ids, mask, _ = prompts()
    with pytest.raises(ValueError, match="needs superpixels.*3 channels.*SuperpixelImageProcessor"):
        model.encode_images(images[:, :3])
    with pytest.raises(ValueError, match="anyres|image_aspect_ratio"):
        model.logits(ids, images[None], attention_mask=mask)
    with pytest.raises(ValueError, match="image_aspect_ratio"):
        model.logits(ids, [images[0], images[1, :, :40]], attention_mask=mask)
    model.model.tower[0].first = 0
    with pytest.raises(ValueError, match="37 tokens for 6x6 patches.*'patch'"):
        model.encode_images(images)
    inner = CLIPImageProcessor(**SHOWN)
    process = SuperpixelImageProcessor(inner, config_of("svp"))
    with pytest.raises(ValueError, match="2 images need as many region maps"):
        process([image(1), image(2)], region_maps=[])
    no_levels = SimpleNamespace(**{**vars(config_of("token_packer")), "mm_projector_levels": None})
    with pytest.raises(ValueError, match="mm_projector_levels"):
        build_vision_projector(no_levels)
    with pytest.raises(ValueError, match="'no_such'"):
        build_vision_projector(SimpleNamespace(**{**vars(config_of("svp")), "mm_projector_options": {"no_such": 1}}))
    assert isinstance(model.model.mm_projector, Projector)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 1))
def test_what_is_written_is_read(seed, dtype, edge):
    """More labels than half precision can count, at a size with an edge that fills no patch."""
    draw = np.random.default_rng(seed)
    labels = draw.choice([-1, 0, 1, 127, 128, 300, 16000], (12, 8))
    padding = np.zeros((12, 8), bool)
    padding[8:] = True
    channels = label_channels(labels, (12, 8), padding)
    image = torch.nn.functional.pad(torch.cat([torch.rand(3, 12, 8), channels]), (0, edge, 0, edge)).to(dtype)
    features = PatchFeatures.whole(torch.zeros(1, 6, 2), (3, 2))
    made, superpixels = read_label_channels(image[None], features, mask_size=(3, 2))
    assert made.valid[0].tolist() == [True] * 4 + [False] * 2
    real = [label for label in np.unique(labels[:8]) if label >= 0]
    masks = torch.stack([torch.from_numpy((labels == label) & ~padding) for label in real])
    wanted = Superpixels.from_masks([masks], [(3, 2)], mask_size=(3, 2))
    assert torch.equal(superpixels.weights, wanted.weights) and torch.equal(superpixels.masks, wanted.masks)


def test_label_channels_of_another_resolution_and_images_without_superpixels():
    channels = label_channels(np.array([[0, 1]]), (2, 4))
    assert channels[0].tolist() == [[2, 2, 3, 3]] * 2 and not channels[1].any()
    plain = add_label_channels(torch.rand(3, 2, 4))
    assert plain.shape == (5, 2, 4) and add_label_channels(plain) is plain
    images = torch.stack([torch.cat([plain[:3], channels]), plain])
    features, superpixels = read_label_channels(images, PatchFeatures.whole(torch.zeros(2, 2, 1), (1, 2)), None)
    assert features.valid.all() and superpixels.valid.tolist() == [[True, True], [False, False]]
    assert superpixels.weights[0].tolist() == [[1, 0], [0, 1]]


def test_wrong_labels_are_refused():
    with pytest.raises(ValueError, match="At most 16382 superpixels.*got 16383"):
        label_channels(np.array([[16382]]), (1, 1))
    with pytest.raises(ValueError, match="got 4"):
        add_label_channels(torch.zeros(4, 2, 2))


def build_projector_of(name="svp", llm=24, **options):
    return build_projector(name, vision_dim=32, llm_dim=llm, grid=(4, 4), **options)


def same(one, two):
    return all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_round_trip(tmp_path, prefix):
    path = save_mm_projector(tmp_path / "new" / "mm_projector.bin", projector := build_projector_of(), prefix)
    assert [file.name for file in path.parent.iterdir()] == ["mm_projector.bin"]
    assert all(key.startswith(f"{prefix}mm_projector.") for key in torch.load(path, weights_only=True))
    other = build_projector_of()
    assert not same(projector, other)
    assert load_mm_projector(path, other) == [] and same(projector, other)


def test_as_llavas_trainer_writes_and_its_model_reads(tmp_path):
    """Its trainer saves named parameters whose name has mm_projector; its loader cuts the name there."""
    model = nn.ModuleDict(
        {"model": nn.ModuleDict({"mm_projector": build_projector_of(), "embed_tokens": nn.Embedding(3, 2)})}
    )
    weights = {key: value for key, value in model.named_parameters() if "mm_projector" in key or "embed" in key}
    torch.save(weights, tmp_path / "theirs.bin")
    other = build_projector_of()
    assert load_mm_projector(tmp_path / "theirs.bin", other) == [] and same(model["model"]["mm_projector"], other)
    ours = torch.load(save_mm_projector(tmp_path / "ours.bin", other), weights_only=True)
    model.load_state_dict(ours, strict=False)
    build_projector_of().load_state_dict({key.split("mm_projector.")[1]: value for key, value in ours.items()})


@pytest.mark.parametrize("name", list_projectors())
def test_all_of_a_projector_is_in_what_llavas_trainer_writes(name):
    """It writes named parameters only: a buffer that has to be kept would be lost."""
    projector = build_projector(name, vision_dim=32, llm_dim=24, grid=(8, 8))
    assert set(projector.state_dict()) == {key for key, _ in projector.named_parameters()}


def test_llavas_mlp_becomes_the_head(tmp_path):
    mlp = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    path = save_mm_projector(tmp_path / "mm_projector.bin", mlp)
    for name in ("mlp", "mask_pool", "svp"):
        projector = build_projector_of(name)
        new = load_mm_projector(path, projector)
        assert same(mlp, projector.head)
        assert sorted(new) == sorted(key for key in projector.state_dict() if not key.startswith("head."))
    again = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    assert load_mm_projector(path, again) == [] and same(mlp, again)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No projector at"):
        load_mm_projector(tmp_path / "none.bin", build_projector_of())
    path = save_mm_projector(tmp_path / "wide.bin", build_projector_of(llm=48))
    with pytest.raises(ValueError, match=r"other shape: \['head.0.bias \(48,\) for \(24,\)'"):
        load_mm_projector(path, build_projector_of())
    path = save_mm_projector(tmp_path / "other.bin", build_projector_of("mask_pool"))
    with pytest.raises(ValueError, match="Missing: .*ssa"):
        load_mm_projector(path, build_projector_of())
    deep = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
    with pytest.raises(ValueError, match="unexpected: .*4.weight"):
        load_mm_projector(save_mm_projector(tmp_path / "deep.bin", deep), build_projector_of())
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="mapping of names to tensors"):
        load_mm_projector(tmp_path / "list.bin", build_projector_of())
    torch.save({"step": torch.zeros(2)}, tmp_path / "nothing.bin")
    with pytest.raises(ValueError, match="Missing"):
        load_mm_projector(tmp_path / "nothing.bin", build_projector_of())


class Payload:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"mm_projector.0.weight": Payload()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="is damaged or of another kind"):
        load_mm_projector(tmp_path / "evil.bin", build_projector_of())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_named(tmp_path, zipped):
    path = tmp_path / "mm_projector.bin"
    state = {f"mm_projector.{name}": tensor for name, tensor in build_projector_of().state_dict().items()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-30], b"PK\x03\x04" + bytes(100), b"\x80\x02" + b"\xff" * 90):
        path.write_bytes(content)
        with pytest.raises(BadFileError) as caught:
            load_mm_projector(path, build_projector_of())
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
