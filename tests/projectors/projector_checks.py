"""What every projector must hold, as checks for a test suite.

Each check takes a registered name and options, and raises AssertionError::

    from projector_checks import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_projector(check):
        check("my_projector", width=32)

The images have different grids, superpixel counts and letter-box padding; the sizes are tiny.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.options import build_options
from lavis_svp.projectors.base import PROJECTORS, Projector, build_projector
from lavis_svp.projectors.types import Superpixels, VisualTokens
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.types import Grid, PatchFeatures

VISION_DIM, LLM_DIM, KEY_DIM = 16, 24, 8
GRID, MATE, OTHER = (8, 6), (3, 5), (5, 8)  # of a projector's usual grid, of its batch mate, of a third image
MASK_SIZE = (8, 8)
CLOSE = 1e-5  # of float32 sums in another order
BFLOAT16_SHARE = 0.05  # of the tokens' norm that bfloat16 may change


def fitting(grid: Grid, multiple: int) -> Grid:
    """``grid`` with its sides rounded up to multiples."""
    return (-(-grid[0] // multiple) * multiple, -(-grid[1] // multiple) * multiple)


def make_projector(name: str, *, seed: int = 0, **options: Any) -> Projector:
    """Build a projector for a grid that fits, with all parameters random, also those that start at zero or one."""
    torch.manual_seed(seed)
    multiple = build_options(PROJECTORS.get(name).options_class, options, name).grid_multiple
    grid = fitting(GRID, multiple)
    projector = build_projector(name, vision_dim=VISION_DIM, llm_dim=LLM_DIM, grid=grid, **options)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return projector


def make_regions(seed: int, regions: int) -> RegionMap:
    """Make a random region map, some of it in no region."""
    return RegionMap.from_labels(np.random.default_rng(seed).integers(-1, regions, (13, 9)))


def make_batch(
    grids: Sequence[Grid],
    *,
    cut: Sequence[tuple[int, int]] | None = None,
    levels: int = 1,
    mask_size: Grid = MASK_SIZE,
    seed: int = 0,
) -> tuple[PatchFeatures, Superpixels]:
    """Make random images with every output of an encoder; bfloat16 holds the values exactly.

    Args:
        grids: of the images; image b has up to 4 + 2 b superpixels.
        cut: rows at the bottom and columns at the right of each image that are letter-box padding; None: one row of
            the first image.
        levels: L.
        mask_size: of the superpixels' masks.
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    cut = [(1, 0)] + [(0, 0)] * (len(grids) - 1) if cut is None else cut
    batch, most = len(grids), max(h * w for h, w in grids)
    valid = torch.zeros(batch, most, dtype=torch.bool)
    extents = []
    for b, ((h, w), (rows, columns)) in enumerate(zip(grids, cut, strict=True)):
        image = torch.zeros(h, w, dtype=torch.bool)
        image[: h - rows, : w - columns] = True
        valid[b, : h * w] = image.flatten()
        extents.append(((h - rows) / h, (w - columns) / w))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    features = PatchFeatures(
        noise(batch, most, VISION_DIM),
        list(grids),
        valid,
        levels=noise(batch, levels, most, VISION_DIM),
        cls_attention=noise(batch, most).softmax(dim=1),
        keys=noise(batch, most, KEY_DIM),
    )
    maps = [make_regions(seed + b, regions=4 + 2 * b) for b in range(batch)]
    return features, Superpixels.from_region_maps(maps, grids, extents, mask_size)


def batch_for(projector: Projector) -> tuple[PatchFeatures, Superpixels]:
    """Make two images that fit a projector: the last row of one and the last column of the other are padding."""
    grids = [projector.grid, fitting(MATE, projector.options.grid_multiple)]
    levels = getattr(projector.options, "num_levels", 1)
    mask_size = projector.mask_size or MASK_SIZE
    return make_batch(grids, cut=[(1, 0), (0, 1)], levels=levels, mask_size=mask_size)


def image(features: PatchFeatures, superpixels: Superpixels, index: int) -> tuple[PatchFeatures, Superpixels]:
    """Cut one image out of a batch, without the batch's padding."""
    grid, one, real = features.grids[index], slice(index, index + 1), superpixels.valid[index]
    count = grid[0] * grid[1]
    alone = PatchFeatures(
        features.patches[one, :count],
        [grid],
        features.valid[one, :count],
        levels=None if features.levels is None else features.levels[one, :, :count],
        cls_attention=None if features.cls_attention is None else features.cls_attention[one, :count],
        keys=None if features.keys is None else features.keys[one, :count],
    )
    masks = None if superpixels.masks is None else superpixels.masks[one, real]
    return alone, Superpixels(superpixels.weights[one, real, :count], masks, superpixels.valid[one, real])


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raise AssertionError if two tensors differ by more than the rounding of float32 sums."""
    torch.testing.assert_close(ours, theirs, atol=CLOSE, rtol=CLOSE, msg=lambda text: f"{what}: {text}")


def check_output(name: str, **options: Any) -> None:
    """Shapes; exact zeros in padding; real tokens first, finite and not zero; an assignment that adds up."""
    projector = make_projector(name, **options)
    features, superpixels = batch_for(projector)
    result = projector(features, superpixels)
    assert result.tokens.shape == (*result.valid.shape, LLM_DIM), f"tokens have shape {tuple(result.tokens.shape)}"
    assert result.tokens.isfinite().all(), "a token is not finite"
    assert result.tokens[~result.valid].eq(0).all(), "padding is not zero"
    assert result.valid[:, 0].all(), "an image has no token"
    assert (result.valid.int().diff(dim=1) <= 0).all(), "a real token stands behind padding"
    assert result.tokens[result.valid].abs().sum(1).gt(0).all(), "a real token is zero"
    if result.assignment is not None:
        assert result.assignment.shape == (*result.valid.shape, features.patches.shape[1]), "assignment: not (B, T, N)"
        close(result.assignment.sum(2), result.valid.float(), "a row of the assignment does not sum to 1")
        padding = (~features.valid)[:, None].expand_as(result.assignment)
        assert result.assignment[padding].eq(0).all(), "a token is assigned to a patch that is not valid"
    packed, lengths = result.packed()
    assert packed.shape == (sum(lengths), LLM_DIM), "packed tokens do not fit their lengths"


def check_token_count(name: str, **options: Any) -> None:
    """As many tokens as ``num_tokens`` and ``image_tokens`` promised; in any case at least one."""
    projector = make_projector(name, **options)
    multiple = projector.options.grid_multiple
    for grid in (projector.grid, fitting(OTHER, multiple), fitting(MATE, multiple)):
        for cut in ((0, 0), (1, 0), (0, 1)):
            levels = getattr(projector.options, "num_levels", 1)
            mask_size = projector.mask_size or MASK_SIZE
            features, superpixels = make_batch([grid] * 2, cut=[cut] * 2, levels=levels, mask_size=mask_size)
            found = projector(features, superpixels).valid.sum(1).tolist()
            seen = (grid[0] - cut[0], grid[1] - cut[1])
            promised = [projector.image_tokens(seen, int(count)) for count in superpixels.valid.sum(1)]
            for count, promise in zip(found, promised, strict=True):
                assert count >= 1 and promise in (None, count), f"{promise} promised for {seen} patches, {count} given"
            whole = projector.num_tokens(grid)
            if cut == (0, 0) and whole is not None:
                assert found == [whole] * 2, f"num_tokens({grid}) is {whole}, {found} given"


def check_gradients(name: str, **options: Any) -> None:
    """Every parameter gets a finite gradient that is not zero."""
    projector = make_projector(name, **options)
    projector(*batch_for(projector)).tokens.square().sum().backward()
    without = [key for key, p in projector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without, f"no gradient in {', '.join(without)}"
    assert all(p.grad.isfinite().all() for p in projector.parameters() if p.grad is not None), "infinite gradient"


def check_independence(name: str, **options: Any) -> None:
    """An image has the same tokens alone and in a batch."""
    projector = make_projector(name, **options)
    features, superpixels = batch_for(projector)
    packed, lengths = projector(features, superpixels).packed()
    for index, together in enumerate(packed.split(lengths)):
        alone, _ = projector(*image(features, superpixels, index)).packed()
        close(alone, together, f"image {index} depends on its batch")


def check_padding_content(name: str, **options: Any) -> None:
    """What stands in padded patches and padded superpixels does not matter."""
    projector = make_projector(name, **options)
    features, superpixels = batch_for(projector)
    patches, regions = ~features.valid, ~superpixels.valid
    loud = dataclasses.replace(
        features,
        patches=features.patches.masked_fill(patches[..., None], 50.0),
        levels=None if features.levels is None else features.levels.masked_fill(patches[:, None, :, None], 50.0),
        cls_attention=None if features.cls_attention is None else features.cls_attention.masked_fill(patches, 50.0),
        keys=None if features.keys is None else features.keys.masked_fill(patches[..., None], 50.0),
    )
    masks = None if superpixels.masks is None else superpixels.masks.masked_fill(regions[..., None, None], 0.7)
    dirty = Superpixels(superpixels.weights.masked_fill(regions[..., None], 0.7), masks, superpixels.valid)
    close(projector(loud, dirty).tokens, projector(features, superpixels).tokens, "padding matters")


def check_inputs(name: str, **options: Any) -> None:
    """Inputs are left as they were."""
    projector = make_projector(name, **options)
    given = batch_for(projector)
    before = copy.deepcopy(given)
    projector(*given)
    pairs: list[tuple[Any, Any]] = list(zip(given, before, strict=True))
    for now, then in pairs:
        for field in dataclasses.fields(now):
            value, old = getattr(now, field.name), getattr(then, field.name)
            same = torch.equal(value, old) if isinstance(value, Tensor) else value == old
            assert same, f"{type(now).__name__}.{field.name} was changed"


def check_low_precision(name: str, **options: Any) -> None:
    """Autocast to bfloat16, and a bfloat16 projector fed with float32, stay close; autocast goes backward."""
    projector = make_projector(name, **options)
    given = batch_for(projector)
    exact = projector(*given).tokens
    with torch.autocast("cpu", torch.bfloat16):
        mixed = projector(*given).tokens
    mixed.float().sum().backward()
    half = projector.to(torch.bfloat16)(*given).tokens
    for tokens, way in ((mixed, "autocast"), (half, "bfloat16")):
        share = float((tokens.float() - exact).detach().norm() / exact.detach().norm())
        assert share < BFLOAT16_SHARE, f"{way} changes the tokens by {share:.1%}"


def check_meta_device(name: str, **options: Any) -> None:
    """A dry run without memory gives the same shape; as many tokens as patches where only the features would tell."""
    projector = make_projector(name, **options)
    features, superpixels = batch_for(projector)
    result = projector(features, superpixels)
    on_meta = PatchFeatures(features.patches.to("meta"), features.grids, features.valid.to("meta"))
    for field in ("levels", "cls_attention", "keys"):
        setattr(on_meta, field, getattr(features, field).to("meta"))
    dry: VisualTokens = projector.to("meta")(on_meta, superpixels.to("meta"))
    known = projector.image_tokens(projector.grid, 1) is not None
    expected = result.tokens.shape[1] if known else features.patches.shape[1]
    assert dry.tokens.shape == (len(features.grids), expected, LLM_DIM), f"dry run gives {tuple(dry.tokens.shape)}"


def check_state_dict(name: str, **options: Any) -> None:
    """Another projector with the same state gives the same bits."""
    first, second = make_projector(name, **options), make_projector(name, seed=1, **options)
    second.load_state_dict(first.state_dict())
    given = batch_for(first)
    assert torch.equal(first(*given).tokens, second(*given).tokens), "its state dict does not hold all of its state"


CHECKS: tuple[Callable[..., None], ...] = (
    check_output,
    check_token_count,
    check_gradients,
    check_independence,
    check_padding_content,
    check_inputs,
    check_low_precision,
    check_meta_device,
    check_state_dict,
)
