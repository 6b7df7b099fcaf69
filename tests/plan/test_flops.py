from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions
from lavis_svp.models.config import parse_model_options
from lavis_svp.models.param_groups import optimizer_groups
from lavis_svp.models.svp_ris import SvpRis
from lavis_svp.plan.flops import (
    Flops,
    count,
    counted,
    decode_mask,
    language_shape,
    make_seg_prompts,
    parameters_by_part,
    part_flops,
    point_prompts,
    project,
    superpixel_flops,
    training_flops,
    visual_tokens,
)
from lavis_svp.projectors import list_projectors


def test_products_are_counted_by_kind():
    linear = nn.Linear(8, 4, device="meta")
    flops, out = count(lambda: linear(torch.empty(3, 8)) @ torch.empty(4, 3))
    assert out.shape == (3, 3) and out.is_meta
    assert flops.total == 2 * 3 * 8 * 4 + 2 * 3 * 4 * 3
    flops, _ = count(lambda: torch.bmm(torch.empty(2, 3, 4), torch.empty(2, 4, 5)))
    assert flops == Flops(weights=0, mixing=2 * 2 * 3 * 4 * 5)


def backward_count(modules, run):
    """Operations of a real forward and backward pass, on the CPU."""
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", [(False, True), (True, True), (True, False)])
def test_training_costs_what_autograd_runs(trained):
    """Frozen or trained linear layers, then mixing as in attention; the input needs gradients, as inside a network."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)]
    for layer, trains in zip(layers, trained, strict=True):
        layer.requires_grad_(trains)
    x = torch.randn(2, 5, 8, requires_grad=True)

    def run():
        h = layers[1](layers[0](x))
        return torch.bmm(h, h.transpose(1, 2))

    forward = Flops(weights=2 * (2 * 10 * 8 * 8), mixing=2 * 2 * 5 * 5 * 8)
    expected = training_flops(forward, sum(trained) / 2, gradient_flows=True).total
    assert backward_count(layers, run) == expected


def test_a_frozen_part_costs_its_forward_pass_and_checkpointing_one_more():
    forward = Flops(100.0, 10.0)
    assert training_flops(forward, 0.0, gradient_flows=False, recompute=True) == forward
    assert training_flops(forward, 0.0, True) == Flops(200.0, 30.0)
    assert training_flops(forward, 1.0, True) == Flops(300.0, 30.0)
    assert training_flops(forward, 1.0, True, recompute=True) == Flops(400.0, 40.0)


@pytest.fixture(scope="module", params=["frozen", "lora", "full"])
def pair(request, tiny_llama):
    options = LanguageOptions(name=str(tiny_llama), tuning=request.param)
    return LanguageModel(options).eval(), LanguageModel(options, weights="none")


def really_counted(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counted(counter)


def counted_forward(language, length):
    """Operations of the transformer over one sequence of a skeleton, and the shape of the states.

    It runs on fake CPU tensors: the rotary embedding turns autocast off by the name of the device, and there is no
    autocast for "meta". Attention is counted in its plain form.
    """
    transformer = copy.deepcopy(language.transformer)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        transformer = transformer.to_empty(device="cpu").eval()
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        states = transformer(
            inputs_embeds=torch.zeros(1, length, language.dim),
            attention_mask=torch.zeros(1, 1, length, length),
            position_ids=torch.arange(length)[None],
            use_cache=False,
        ).last_hidden_state
    return counted(counter), states.shape


def test_prefill_and_decode_follow_the_formula(pair):
    real, skeleton = pair
    shape, length = language_shape(skeleton), 12
    assert shape == language_shape(real) or shape.vocabulary != language_shape(real).vocabulary
    cache = DynamicCache(config=real.config)
    embeddings = torch.randn(1, length, real.dim)
    prefill = really_counted(
        lambda: real(embeddings, torch.zeros(1, 1, length, length), torch.arange(length)[None], cache)
    )
    assert prefill.weights == shape.forward(length, length).weights
    rotary = 2 * length * (real.config.hidden_size // real.config.num_attention_heads) // 2
    assert prefill.mixing == shape.forward(length, length).mixing + rotary
    decode = really_counted(
        lambda: real(embeddings[:, :1], torch.zeros(1, 1, 1, length + 1), torch.full((1, 1), length), cache)
    )
    assert decode.weights == shape.forward(1, length + 1).weights
    assert decode.mixing == pytest.approx(shape.forward(1, length + 1).mixing, rel=0.05)
    counted_whole, states = counted_forward(skeleton, length)
    assert counted_whole == prefill and states == (1, length, real.dim)


def test_logits_follow_the_formula(pair):
    real, _ = pair
    counted_logits = really_counted(lambda: real.logits(torch.randn(7, real.dim)))
    assert counted_logits == language_shape(real).logits(7)


def test_what_trains_is_read_off_the_module(pair):
    real, skeleton = pair
    share = {"frozen": 0.0, "full": 1.0}.get(real.options.tuning)
    found = language_shape(skeleton).trained_share
    assert found == share if share is not None else 0 < found < 0.2


SWAPPED = list_projectors()
TYPES = sorted(SvpRis.PRETRAINED_MODEL_CONFIG_DICT)
FULL = [name for name in TYPES if not name.startswith("tiny")]
SLOW = {"pretrain_vicuna7b", "glamm_dinov2_vicuna7b", "refcoco_llama3_8b"}  # parts that another type has as well
SOME = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TYPES]
LANGUAGES = ["refcoco_qwen2_5_7b", "refcoco_vicuna7b", pytest.param("refcoco_llama3_8b", marks=pytest.mark.slow)]
SAM_VIT_H = {"sam_encoder": 637_026_048, "sam_prompt_encoder": 6_220, "superpixel_decoder": 4_058_340}
DINOV2_L, CLIP_L = 304_368_640, 303_507_456
VICUNA, LORA_VICUNA, SEG_ROWS = 6_738_415_616, 4_194_304, 2 * 4096
MM_PROJECTOR, TEXT_HIDDEN_FCS = 20_979_712, 17_830_144


def options_of(model_type):
    return parse_model_options(OmegaConf.load(SvpRis.default_config_path(model_type)).model)


@pytest.fixture(scope="module")
def skeletons():
    return {name: SvpRis.skeleton(options_of(name)) for name in TYPES}


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_builds_without_weights(skeletons, model_type):
    model = skeletons[model_type]
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(p.requires_grad for p in model.extractor.parameters())
    groups = optimizer_groups(model, OmegaConf.create({"init_lr": 3e-4}), {})
    trained = sum(p.numel() for group in groups for p in group["params"])
    assert trained == parameters_by_part(model)["whole model"].trained > 0


@pytest.mark.parametrize("model_type", FULL)
def test_full_scale_types_have_the_published_sizes(skeletons, model_type):
    model = skeletons[model_type]
    counts = parameters_by_part(model)
    assert {part: counts[part].total for part in SAM_VIT_H} == SAM_VIT_H
    assert counts["vision_encoder"].total == (CLIP_L if model_type == "glamm_vicuna7b" else DINOV2_L)
    assert model.extractor.vision_encoder.grid == (24, 24) and model.extractor.sam_encoder.grid == (64, 64)
    lora = LORA_VICUNA if model.options.language.tuning == "lora" else 0
    if "vicuna" in model_type:
        assert counts["language"].total + counts["embeddings"].total == VICUNA + lora + SEG_ROWS
        assert counts["language"].trained == lora
        assert counts["seg_prompt"].total == counts["seg_prompt"].trained == TEXT_HIDDEN_FCS
    assert counts["embeddings"].trained == counts["embeddings"].total
    if "glamm" in model_type:
        assert counts["projector"].total == MM_PROJECTOR
    parts = [counts[part].total for part in counts if part != "whole model"]
    assert sum(parts) == counts["whole model"].total


@pytest.mark.parametrize("model_type", SOME)
def test_a_forward_pass_has_the_right_shapes(skeletons, model_type):
    model = skeletons[model_type]
    side, width = model.options.sam.side, model.language.dim
    _, embedding = count(
        lambda: model.extractor.sam_encoder(torch.empty(1, 3, side, side), torch.empty(1, 1, side, side))
    )
    assert embedding.shape == (1, 256, side // 16, side // 16)
    _, features = count(lambda: model.extractor.vision_encoder(torch.empty(1, 3, side, side)))
    patches = model.extractor.vision_encoder.grid[0] ** 2
    assert features.patches.shape == (1, patches, model.extractor.vision_encoder.dim)
    _, visual = count(lambda: project(model, features, 40))
    assert visual.tokens.shape == (1, visual_tokens(model, 40), width)
    assert visual_tokens(model, 40) == (576 if "glamm" in model_type else 40)
    _, sparse = count(lambda: make_seg_prompts(model, visual))
    assert sparse.shape == (1, 1, 256)
    _, logits = count(lambda: decode_mask(model, embedding, sparse))
    assert logits.shape == (1, side // 4, side // 4)


@pytest.mark.parametrize("model_type", LANGUAGES)
def test_the_language_model_runs_whole_and_costs_what_the_formula_says(skeletons, model_type):
    language = skeletons[model_type].language
    counted, shape = counted_forward(language, 64)
    assert shape == (1, 64, language.dim)
    formula = language_shape(language).forward(64, 64)
    assert counted.weights == formula.weights
    assert counted.mixing == pytest.approx(formula.mixing, rel=0.01)  # the rotary embedding's angles are a product, too
    assert language.transformer.layers[0].self_attn.q_proj.weight.is_meta  # the original was not touched


def test_known_costs_at_full_scale():
    model = SvpRis.skeleton(options_of("refcoco_vicuna7b"))
    parts = part_flops(model, 40, 0)
    assert parts.sam_encoder.total == pytest.approx(5.96e12, rel=0.01)  # "about 6 TFLOP"
    assert parts.vision_encoder.total == pytest.approx(0.382e12, rel=0.01)
    embedding = torch.empty(1, 256, 64, 64, device="meta")
    factored = [superpixel_flops(model, embedding, prompts).total for prompts in (0, 1)]
    model.extractor.generator.options = type(model.extractor.generator.options)(decoder="plain")
    plain = superpixel_flops(model, embedding, 1).total
    assert plain == pytest.approx(3.6e9, rel=0.05) and 3 < plain / (factored[1] - factored[0]) < 6


def test_prompts_and_tokens_follow_the_yaml(skeletons, small_skeleton):
    assert point_prompts(skeletons["glamm_vicuna7b"]) == 0
    assert 256 < point_prompts(skeletons["refcoco_vicuna7b"]) < 1024
    model = small_skeleton(projector={"name": "avg_pool", "tokens_h": 3, "tokens_w": 2})
    assert visual_tokens(model, 40) == 6 and point_prompts(model) == 0
    assert point_prompts(small_skeleton(superpixels={"name": "felzenszwalb"})) == 0


def test_a_boundary_head_costs_its_convolutions(small_skeleton):
    """Counted here by hand, of each convolution's own shape; the head is no part of the model."""
    model = small_skeleton(superpixels={"name": "one_pass"})
    head = model.extractor.generator.loaded.head
    expected, grid = 0, 8  # cells of the embedding, at side 128
    for name, module in head.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            at_stride_16 = name.startswith(("reduce", "enlarge", "upscaler.0"))  # the cells that it reads
            at_stride_4 = name.startswith(("image4", "upscaled4", "boundaries"))
            cells = grid * (1 if at_stride_16 else 4 if at_stride_4 else 2)
            expected += 2 * module.weight.numel() * cells**2
    embedding = torch.empty(1, 256, grid, grid, device="meta")
    assert superpixel_flops(model, embedding, 0).weights == expected > 0
    parts = parameters_by_part(model)
    assert parts["boundary_head"].total == sum(p.numel() for p in head.parameters())
    assert list(parts)[-1] == "whole model" and point_prompts(model) == 0
    other = parameters_by_part(small_skeleton())
    assert "boundary_head" not in other and other["whole model"] == parts["whole model"]
    assert all(not parameter.is_meta for parameter in head.parameters())  # it can still run


@pytest.mark.parametrize("name", SWAPPED)
def test_every_projector_can_be_planned(small_skeleton, name):
    model = small_skeleton(projector={"name": name}, vision_encoder={"side": 112})
    cost, visual = count(lambda: project(model, model.extractor.vision_encoder(torch.empty(1, 3, 112, 112)), 5))
    assert visual.tokens.shape == (1, visual_tokens(model, 5), 32)
    assert cost.weights >= 2 * 32 * 32 * visual.tokens.shape[1]  # at least the head's last product


@pytest.mark.parametrize("channels", [["classes"], ["classifier", "colour"]])
def test_an_image_classifier_is_planned_where_a_channel_reads_it(small_skeleton, channels):
    model = small_skeleton(vision_encoder={"extra_channels": channels}, classifier={"side": 128})
    plain = small_skeleton(classifier={"side": 128})
    parts, without = part_flops(model, 5, 0), part_flops(plain, 5, 0)
    assert without.classifier.total == 0 and "classifier" not in parameters_by_part(plain)
    assert parameters_by_part(model)["classifier"].total == 4_652_008
    square = 2 * 0.38e9 * (128 / 224) ** 2  # published: 0.4 G products at side 224
    assert parts.classifier.total == pytest.approx(square, rel=0.1)
    assert parts.vision_encoder == without.vision_encoder and parts.projector.weights > without.projector.weights


def test_an_unknown_sam_is_told(small_options):
    with pytest.raises(FileNotFoundError, match=r"sam_vit_h_\*\.pth"):
        SvpRis.skeleton(small_options(sam={"name": "my_sam.pth"}))


def test_a_sam_that_is_there_is_read_off_its_file(small_options, tmp_path):
    from lavis_svp.vision.sam import SamVitShape, build_mask_decoder, build_prompt_encoder, build_sam_vit

    shape = SamVitShape(width=32, depth=3, heads=2, global_blocks=(1,))
    parts = {"image_encoder": build_sam_vit(shape, 128), "prompt_encoder": build_prompt_encoder(128)}
    parts["mask_decoder"] = build_mask_decoder()
    state = {f"{p}.{k}": v for p, module in parts.items() for k, v in module.state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    model = SvpRis.skeleton(small_options(sam={"name": str(tmp_path / "sam.pth")}))
    wanted = sum(p.numel() for p in parts["image_encoder"].parameters())
    assert parameters_by_part(model)["sam_encoder"].total == wanted


def test_a_skeleton_is_the_model_without_its_weights(tiny_llama, small_options):
    real = SvpRis(small_options(language={"name": str(tiny_llama)}, vision_encoder={"name": "dinov2_small_imgfocus"}))
    bare = SvpRis.skeleton(real.options)
    assert {n: (p.shape, p.requires_grad) for n, p in bare.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in real.named_parameters()
    }
    assert {n: b.shape for n, b in bare.named_buffers()} == {n: b.shape for n, b in real.named_buffers()}


def test_what_a_projector_asks_of_the_encoder_is_counted(monkeypatch):
    from lavis_svp.projectors.baselines.mlp import MlpProjector

    def skeleton(wants, levels):
        monkeypatch.setattr(MlpProjector, "requires", frozenset(wants))
        options = options_of("tiny")
        encoder = dataclasses.replace(options.vision_encoder, levels=levels, side=[112, 224], extra_channels=())
        return SvpRis.skeleton(dataclasses.replace(options, vision_encoder=encoder, projector={"name": "mlp"}))

    plain = part_flops(skeleton((), ()), 5, 0)
    asking = skeleton({"levels", "cls_attention", "keys"}, (4, -1))
    _, features = count(lambda: asking.extractor.vision_encoder(torch.empty(1, 3, 384, 384)))
    assert features.levels.shape == (1, 2, 128, 384)
    assert features.keys.is_meta and visual_tokens(asking, 5) == 128
    # queries and keys of one block are computed again
    tokens, width = 1 + 128, 384
    flops = part_flops(asking, 5, 0)
    assert flops.vision_encoder.weights - plain.vision_encoder.weights == 2 * 2 * tokens * width**2
    assert flops.projector == plain.projector
