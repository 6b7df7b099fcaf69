from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lavis_svp.vision.extra_channels import (
    COLOUR_MEAN,
    COLOUR_STD,
    EXTRA_CHANNELS,
    append_channels,
    extra_width,
    on_grid,
    patch_colours,
)
from lavis_svp.vision.types import PatchFeatures


def slow_mean(channel: torch.Tensor, grid: tuple[int, int], covered: tuple[float, float], finer: int) -> torch.Tensor:
    """Mean of each patch from ``finer`` samples along each axis."""
    places = [
        ((torch.arange(cells * finer) + 0.5) / (cells * finer) * share * pixels).long()
        for cells, share, pixels in zip(grid, covered, channel.shape, strict=True)
    ]
    samples = channel[places[0]][:, places[1]]  # (h * finer, w * finer)
    return samples.unflatten(0, (grid[0], finer)).unflatten(2, (grid[1], finer)).mean((1, 3))


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    covered=st.sampled_from([(1.0, 1.0), (0.5, 1.0), (1.0, 0.75)]),
)
def test_a_patch_gets_the_mean_of_what_it_covers(size, grid, covered):
    channel = (torch.arange(size[0] * size[1], dtype=torch.float32) * 0.37 % 1).reshape(size)
    got = on_grid(channel[None], grid, covered)
    assert got.shape == (grid[0] * grid[1], 1)
    torch.testing.assert_close(got[:, 0].reshape(grid), slow_mean(channel, grid, covered, 60), rtol=0, atol=0.06)


def test_channels_stand_in_the_named_order_and_reach_levels():
    valid = torch.tensor([[True, True, True, False]])
    features = PatchFeatures(torch.randn(1, 4, 5), [(2, 2)], valid, levels=torch.randn(1, 2, 4, 5))
    sam, pixels = torch.randn(1, EXTRA_CHANNELS["sam"], 2, 2), torch.rand(1, 3, 4, 4)
    got = append_channels(features, ("colour", "sam"), sam, pixels, [(1.0, 1.0)])
    assert got.patches.shape == (1, 4, 5 + extra_width(("sam", "colour"))) == (1, 4, 264)
    assert torch.equal(got.patches[..., :5], features.patches)
    colour = (pixels[0, :, :2, 2:].mean((1, 2)) - COLOUR_MEAN) / COLOUR_STD
    size = features.patches[0].square().mean(1).sqrt()
    torch.testing.assert_close(got.patches[0, 1, 5:8], colour * size[1])
    embedding = sam[0, :, 1, 0] - sam[0, :, 1, 0].mean()
    torch.testing.assert_close(
        got.patches[0, 2, 8:], embedding / embedding.std(correction=0) * size[2], rtol=0, atol=1e-4
    )
    assert got.levels is not None
    torch.testing.assert_close(got.levels[0, :, :, 5:], got.patches[0, None, :, 5:].expand(2, -1, -1))
    assert append_channels(features, (), sam, pixels, [(1.0, 1.0)]) is features


def test_no_padding_of_sams_input_gets_into_a_stretched_image(make_extractor, samples):
    """Grey in the padding below a wide image must change nothing."""
    extractor = make_extractor(extra_channels=["colour"])
    image = samples["image"]
    colour = extractor({"image": image}).patches.patches[..., -3:]
    moved = image.clone()
    moved[:, :3] = torch.where(moved[:, 3:] > 0, moved[:, :3], 0.7)
    assert torch.equal(extractor({"image": moved}).patches.patches[..., -3:], colour)


def test_cached_features_are_those_of_the_encoders_alone(make_extractor, samples):
    plain, more = make_extractor(), make_extractor(extra_channels=["sam", "colour"])
    assert more.settings() == plain.settings()  # one cache serves both
    assert more.patch_dim == plain.patch_dim + 259
    vision = plain(samples)
    stored = [
        {"patches": vision.patches.patches[i], "valid": vision.patches.valid[i], "sam": vision.sam[i]} for i in range(2)
    ]
    from_cache = more({**samples, "frozen": stored}).patches.patches
    torch.testing.assert_close(from_cache, more(samples).patches.patches)


def test_means_are_float32_under_autocast():
    """In bf16 the channel would be off by up to .004 of its size."""
    channels = torch.rand(256, 24, 24)
    expected = on_grid(channels, (9, 7), (0.75, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(on_grid(channels, (9, 7), (0.75, 1.0)), expected)


def test_colours_of_bytes_are_those_of_floats():
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    got = patch_colours(pixels, (4, 4), (1.0, 0.5))
    assert got.shape == (16, 3) and torch.equal(got, patch_colours(pixels.float() / 255, (4, 4), (1.0, 0.5)))
    mean = pixels[:, 8:16, 4:8].float().mean((1, 2)) / 255
    torch.testing.assert_close(got[5], (mean - COLOUR_MEAN) / COLOUR_STD)
