import pytest
import segment_anything
import torch
from segment_anything import sam_model_registry

from lavis_svp.encoders.sam import build_mask_decoder, build_prompt_encoder
from lavis_svp.encoders.sam_vit import PUBLISHED, build_sam_vit, resized_positions, shape_of

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
