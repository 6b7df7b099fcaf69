"""The SAM generator on a tiny SAM with random weights."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.superpixels import SamEmbedding, SuperpixelGenerator, build_superpixels
from lavis_svp.superpixels.sam.factored_decoder import FactoredDecoder

WIDTH, SIDE = 32, 128
LENIENT = {"points_per_side": 4, "pred_iou": -10.0, "stability": 0.0, "box_nms": 1.0, "containment": None}
"""Random weights are sure of nothing."""


@pytest.fixture(scope="module")
def parts() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    prompt_encoder = PromptEncoder(WIDTH, (SIDE // 16,) * 2, (SIDE, SIDE), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=64, num_heads=4)
    mask_decoder = MaskDecoder(
        transformer_dim=WIDTH, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=WIDTH
    )
    return {"prompt_encoder": prompt_encoder.eval(), "mask_decoder": mask_decoder.eval()}


def embedding(seed: int = 0, input_size: tuple[int, int] = (90, 128)) -> SamEmbedding:
    values = torch.randn(WIDTH, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(seed))
    return SamEmbedding(values, input_size, (input_size[0] * 3, input_size[1] * 3), SIDE)


def lenient(parts: dict[str, torch.nn.Module], **options: object) -> SuperpixelGenerator:
    return build_superpixels("sam", **parts, **{**LENIENT, **options})


def test_gives_regions_over_the_valid_area_and_leaves_the_embedding_alone(parts: dict[str, torch.nn.Module]) -> None:
    given = [embedding(0), embedding(1, (128, 37))]
    before = [item.embedding.clone() for item in given]
    first, second = lenient(parts)(embeddings=given)
    assert first.size == (23, 32) and second.size == (32, 10)
    assert first.count > 2 and set(first.levels.tolist()) <= {-1, 0, 1, 2}
    assert all(torch.equal(item.embedding, old) for item, old in zip(given, before, strict=True))
    alone = lenient(parts)(embeddings=[given[1]])[0]
    assert np.array_equal(alone.labels, second.labels)


@pytest.mark.parametrize("decisions", ["low", "full"])
def test_an_image_is_not_touched_by_its_batch_mates(parts: dict[str, torch.nn.Module], decisions: str) -> None:
    given = [embedding(0), embedding(1, (128, 37)), embedding(2, (90, 128))]
    generator = lenient(parts, decisions=decisions, chunk=5)
    for one, item in zip(generator(embeddings=given), given, strict=True):
        alone = generator(embeddings=[item])[0]
        assert np.array_equal(one.labels, alone.labels) and np.array_equal(one.scores, alone.scores)


def test_padding_is_never_seen(parts: dict[str, torch.nn.Module]) -> None:
    """Points lie on the image, and logits in the padding take no part in a decision."""
    generator = lenient(parts)
    decode, seen = FactoredDecoder.decode, []

    def spoilt(self: FactoredDecoder, image: object, prompts: torch.Tensor, size: tuple[int, int]) -> object:
        logits, ious = decode(self, image, prompts, (32, 32))
        logits[:, :, size[0] :], logits[:, :, :, size[1] :] = 1e4, -1e4
        seen.append(size)
        return logits[:, :, : size[0], : size[1]], ious

    expected = generator(embeddings=[embedding()])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactoredDecoder, "decode", spoilt)
        assert np.array_equal(generator(embeddings=[embedding()])[0].labels, expected.labels)
    assert set(seen) == {(23, 32)}


@pytest.mark.parametrize("size", [(1, 128), (128, 1), (3, 5), (128, 128), (85, 128)])
@pytest.mark.parametrize("decisions", ["low", "full"])
def test_any_shape_of_image(parts: dict[str, torch.nn.Module], size: tuple[int, int], decisions: str) -> None:
    regions = lenient(parts, decisions=decisions, unlabelled="nearest")(embeddings=[embedding(3, size)])[0]
    low = (-(-size[0] // 4), -(-size[1] // 4))
    assert regions.size == (low if decisions == "low" else (size[0] * 3, size[1] * 3)) and regions.coverage() == 1


@pytest.mark.parametrize(
    ("input_size", "original_size"),
    [
        ((128, 128), (128, 128)),
        ((128, 96), (1000, 750)),
        ((85, 128), (427, 640)),
        ((9, 128), (4, 57)),
        ((128, 128), (1400, 1400)),
    ],
)
def test_borders_lie_where_the_logits_change_sign(
    parts: dict[str, torch.nn.Module], input_size: tuple[int, int], original_size: tuple[int, int]
) -> None:
    """Within one pixel of the label map: of the image with full decisions, of the decoder's frame with low ones."""
    border = 0.6 * input_size[1]  # in SAM's frame

    def right_side(_: object, __: object, prompts: torch.Tensor, size: tuple[int, int]) -> object:
        centres = 4 * (torch.arange(size[1]) + 0.5)
        logits = ((centres - border) * 9).expand(len(prompts), 3, *size)
        return logits, torch.full((len(prompts), 3), 0.95)

    given = embedding()._replace(input_size=input_size, original_size=original_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactoredDecoder, "decode", right_side)
        for decisions, pixel in (("full", 1.0), ("low", original_size[1] / (input_size[1] / 4))):
            generator = lenient(parts, decisions=decisions, unlabelled="rest", box_nms=0.7, min_area=0.0)
            regions = generator(embeddings=[given])[0].resized(original_size)
            assert regions.count == 2 and regions.levels.tolist() == [-1, 2]
            found = float((regions.labels[0] == 0).sum())
            assert abs(found - border * original_size[1] / input_size[1]) <= pixel
            assert (regions.labels == regions.labels[:1]).all()


def test_the_second_pass_prompts_only_what_no_mask_covers(parts: dict[str, torch.nn.Module]) -> None:
    def prompted(**options: object) -> int:
        count = 0
        decode = FactoredDecoder.decode

        def counted(self: FactoredDecoder, image: object, prompts: torch.Tensor, size: tuple[int, int]) -> object:
            nonlocal count
            count += len(prompts)
            return decode(self, image, prompts, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FactoredDecoder, "decode", counted)
            lenient(parts, points_per_side=8, **options)(embeddings=[embedding()])
        return count

    assert prompted(first_stride=1) == 64
    assert 16 <= prompted() < 64
    assert prompted(pred_iou=50.0) == 64  # no mask at all


def test_the_dial_runs_sam_once(parts: dict[str, torch.nn.Module]) -> None:
    generator = lenient(parts, points_per_side=8, min_area=0.0)
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        image = FactoredDecoder.image
        patch.setattr(FactoredDecoder, "image", lambda self, values: calls.append(1) or image(self, values))
        maps = generator.at_granularities(embedding(), [0.0, 0.5, 1.0])
    assert len(calls) == 1
    counts = [regions.count for regions in maps]
    assert counts == sorted(counts) and counts[0] == 10 < counts[-1]
    alone = lenient(parts, points_per_side=8, min_area=0.0, granularity=0.5)(embeddings=[embedding()])[0]
    assert np.array_equal(maps[1].labels, alone.labels)
    with pytest.raises(ValueError, match=r"granularity must lie in 0..1, got 1.5"):
        generator.at_granularities(embedding(), [1.5])


def test_autocast_and_low_precision_weights_around_it_do_not_reach_the_decisions(
    parts: dict[str, torch.nn.Module],
) -> None:
    expected = lenient(parts)(embeddings=[embedding()])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(lenient(parts)(embeddings=[embedding()])[0].labels, expected.labels)
    half = {name: copy.deepcopy(module).bfloat16() for name, module in parts.items()}
    again = {name: copy.deepcopy(module).float() for name, module in half.items()}
    labels = [lenient(some)(embeddings=[embedding()])[0].labels for some in (half, again)]
    assert np.array_equal(*labels) and next(half["mask_decoder"].parameters()).dtype == torch.bfloat16


def test_the_same_input_gives_the_same_regions(parts: dict[str, torch.nn.Module]) -> None:
    labels = [lenient(parts)(embeddings=[embedding(4)])[0].labels for _ in range(2)]
    assert np.array_equal(*labels)


def test_chunks_change_nothing(parts: dict[str, torch.nn.Module]) -> None:
    maps = [lenient(parts, chunk=chunk)(embeddings=[embedding()])[0].labels for chunk in (1, 5, 64)]
    for labels in maps[1:]:
        assert (labels == maps[0]).mean() > 0.98  # float noise may move single pixels


def test_decoder_outputs_are_subpart_part_whole(parts: dict[str, torch.nn.Module]) -> None:
    """Only level 2 passes when only it gets a bonus that lifts it over the threshold."""
    regions = lenient(parts, pred_iou=50.0, level_bonus=[0, 0, 100], unlabelled="ignore")(embeddings=[embedding()])[0]
    assert set(regions.levels.tolist()) == {2}


def test_nothing_found_gives_one_region(parts: dict[str, torch.nn.Module]) -> None:
    regions = build_superpixels("sam", **parts, points_per_side=2, pred_iou=50.0)(embeddings=[embedding()])[0]
    assert regions.count == 1 and regions.coverage() == 1 and regions.size == (23, 32)


def test_half_precision_embeddings_are_taken(parts: dict[str, torch.nn.Module]) -> None:
    stored = embedding()._replace(embedding=embedding().embedding.half())
    assert lenient(parts)(embeddings=[stored])[0].count > 2


def test_settings_tell_weights_and_options_apart(parts: dict[str, torch.nn.Module]) -> None:
    settings = lenient(parts).settings()
    assert settings == lenient(parts, chunk=7).settings() == lenient(parts, decoder="plain").settings()
    assert settings != lenient(parts, dtype="bfloat16").settings()
    assert settings != lenient(parts, points_per_side=5).settings()
    assert settings != lenient(parts, encoder_name="vit_h").settings()
    other = PromptEncoder(WIDTH, (SIDE // 16,) * 2, (SIDE, SIDE), mask_in_chans=8)
    assert settings != lenient({**parts, "prompt_encoder": other}).settings()


def test_settings_follow_the_weights_though_their_digest_is_kept(parts: dict[str, torch.nn.Module]) -> None:
    generator = lenient(copy.deepcopy(parts))
    before = generator.settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashlib, "sha256", None)  # the second call hashes nothing
        assert generator.settings() == before
    generator.mask_decoder.load_state_dict({k: v + 1 for k, v in parts["mask_decoder"].state_dict().items()})
    changed = generator.settings()
    assert changed["weights"] != before["weights"]
    generator.mask_decoder.bfloat16()
    assert generator.settings()["weights"] != changed["weights"]


def test_float32_copies_of_the_decoder_are_made_once(parts: dict[str, torch.nn.Module]) -> None:
    generator = lenient({name: copy.deepcopy(module).bfloat16() for name, module in parts.items()})
    first, second = (generator.point_decoder().mask_decoder for _ in range(2))
    assert first is second and first.mask_tokens.weight.dtype == torch.float32
    generator.mask_decoder.load_state_dict(
        {k: torch.zeros_like(v) for k, v in generator.mask_decoder.state_dict().items()}
    )
    assert (generator.point_decoder().mask_decoder.mask_tokens.weight == 0).all()


def test_bad_input_is_named(parts: dict[str, torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="needs prompt_encoder and mask_decoder"):
        build_superpixels("sam")
    with pytest.raises(ValueError, match="did you mean 'pred_iou'"):
        build_superpixels("sam", **parts, pred_iuo=0.5)
    with pytest.raises(ValueError, match="pass embeddings="):
        lenient(parts)([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match="Build both for the same side"):
        lenient(parts)(embeddings=[embedding()._replace(side=256)])
    with pytest.raises(ValueError, match="does not lie within"):
        lenient(parts)(embeddings=[embedding()._replace(input_size=(129, 5))])
    for bad in (float("nan"), float("inf")):
        spoilt = embedding()
        spoilt.embedding[3, 2, 1] = bad
        with pytest.raises(ValueError, match="holds 1 NaN or infinite values"):
            lenient(parts)(embeddings=[spoilt])
    with pytest.raises(UnknownNameError, match="Did you mean 'l2_nmsf_s1_rsw3'"):
        lenient(parts, preset="l2_nmsf_s1")
    parts["mask_decoder"].num_multimask_outputs, before = 4, parts["mask_decoder"].num_multimask_outputs
    with pytest.raises(ValueError, match="3 outputs per prompt, this has 4"):
        lenient(parts)
    parts["mask_decoder"].num_multimask_outputs = before


@pytest.mark.parametrize("decisions", ["low", "full"])
def test_on_a_gpu_the_host_waits_for_the_batch_not_for_its_images(
    parts: dict[str, torch.nn.Module], devices: Any, decisions: str
) -> None:
    """Two passes, each with one answer to "which masks passed" and one copy of them, and no copy that blocks."""
    options = {"decisions": decisions, "dtype": "float32"}
    given = [embedding(0), embedding(1, (128, 37)), embedding(2)]
    expected = lenient(parts, **options)(embeddings=given)
    copies = {name: copy.deepcopy(module) for name, module in parts.items()}
    with devices.LogicalCuda() as cuda, cuda.counting() as waits:
        moved = {name: module.to("cuda:1") for name, module in copies.items()}
        on_device = [item._replace(embedding=item.embedding.to("cuda:1", non_blocking=True)) for item in given]
        generator = lenient(moved, **options)
        with cuda.counting() as waits:
            found = generator(embeddings=on_device)
    cuda.check()
    assert not cuda.doubles and not waits.copies, waits.table()
    assert len(waits.reads) <= 4 + (0 if decisions == "low" else 2 * 2 * len(given)), waits.table()
    for one, other in zip(found, expected, strict=True):
        assert one.count > 1 and np.array_equal(one.labels, other.labels)


def test_clocks_wait_for_the_device(parts: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr("lavis_svp.superpixels.sam.generator.wait_for", waits.append)
    _, seconds = lenient(parts).timed(embedding())
    assert waits == [torch.device("cpu")] * 2 and set(seconds) == {"superpixels"}
