import pytest
import torch

from lavis_svp.vision.tinyvit import TinyViTEncoder, from_mobile_sam


def mobile_sam_names(state):
    """TinyViTEncoder's names -> MobileSAM's, spelled out apart from the code under test."""
    renamed = {}
    for name, value in state.items():
        words = name.removeprefix("trunk.").split(".")
        if words[0] == "patch_embed":
            words[1:2] = ["seq", {"conv1": "0", "conv2": "2"}[words[1]]]
        elif words[0] == "stages":
            shift = 1 if words[2] == "downsample" else 0
            words[:2] = ["layers", str(int(words[1]) - shift)]
        words = ["c" if word == "conv" else word for word in words]
        renamed[".".join(words)] = value
    return renamed


def test_names_map_both_ways(tinyvit):
    state = tinyvit.state_dict()
    original = mobile_sam_names(state)
    assert "patch_embed.seq.0.c.weight" in original and "layers.2.downsample.conv2.bn.running_var" in original
    back = from_mobile_sam(original)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_unused_tensors_are_left_out_and_counts_filled_in(tinyvit):
    original = mobile_sam_names(tinyvit.state_dict())
    given = {name: value for name, value in original.items() if not name.endswith("num_batches_tracked")}
    given |= {"head.weight": torch.zeros(1), "norm_head.bias": torch.zeros(1)}
    given["layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(49, 49, dtype=torch.long)
    TinyViTEncoder().load_state_dict(from_mobile_sam(given), strict=True)


@pytest.mark.parametrize("side", [64, 112, 208])
def test_stride_is_16_for_every_side(tinyvit, side):
    with torch.no_grad():
        assert tinyvit(torch.rand(2, 3, side, side)).shape == (2, 256, side // 16, side // 16)


def test_it_has_mobile_sams_parameters(tinyvit):
    classifier = 320 * 1000 + 1000 + 2 * 320  # head and norm_head of MobileSAM's class, unused by SAM
    published = 6_065_532
    assert sum(parameter.numel() for parameter in tinyvit.parameters()) == published - classifier


def test_a_batch_equals_its_images(tinyvit):
    pixels = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        together = tinyvit(pixels)
        alone = torch.cat([tinyvit(pixels[:1]), tinyvit(pixels[1:])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
