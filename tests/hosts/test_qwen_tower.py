"""Qwen2.5-VL's vision tower up to its merger: row order, what it gives besides patches, one image at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lavis_svp.hosts.qwen_tower import PatchOrder, image_grids, qwen_features
from lavis_svp.hosts.swap import SwapConfig

GRIDS = torch.tensor([[1, 6, 10], [1, 2, 4], [1, 10, 4]])
PLAIN = SwapConfig("mlp", 32, 32, (4, 4))


@pytest.fixture
def tower(qwen):
    return qwen[0].model.visual


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(int(GRIDS.prod(1).sum()), 3 * 2 * 8 * 8)


def test_patches_come_row_by_row(tower):
    order = PatchOrder.of(tower, GRIDS, torch.device("cpu"))
    place = tower.rot_pos_emb(GRIDS)  # angles tell row and column
    rows_and_columns = place[order.grouped][order.raster]
    step = tower.rotary_pos_emb(2)[1]
    wanted = [torch.cat([row * step, column * step]) for _, h, w in GRIDS for row in range(h) for column in range(w)]
    assert torch.allclose(rows_and_columns, torch.stack(wanted))
    assert order.images.tolist() == [0, 60, 68, 108] and order.windows.tolist()[:2] == [0, 16]


@torch.no_grad()
def test_merging_its_patches_gives_what_the_tower_gives(tower, pixels):
    features = qwen_features(tower, pixels, GRIDS, PLAIN)
    assert features.grids == [(6, 10), (2, 4), (10, 4)] and features.valid.sum(1).tolist() == [60, 8, 40]
    assert not features.patches[~features.valid].any()
    cells = []
    for patches, (height, width) in zip(features.patches, features.grids, strict=True):
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                cells.append(patches[[r * width + c for r in (row, row + 1) for c in (column, column + 1)]])
    assert torch.equal(tower.merger(torch.cat(cells)), tower(pixels, GRIDS))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vision_zip", "token_packer"])
def test_what_it_tells_besides_depends_on_no_batch_mate(tower, pixels, name):
    swap = replace(PLAIN, name=name, levels=(0, 1, -1))
    together, start = qwen_features(tower, pixels, GRIDS, swap), 0
    for index, grid in enumerate(GRIDS):
        count = int(grid.prod())
        single = qwen_features(tower, pixels[start : start + count], grid[None], swap)
        assert torch.allclose(together.patches[index, :count], single.patches[0], atol=1e-5)
        assert torch.allclose(together.levels[index, :, :count], single.levels[0], atol=1e-5)
        for field in ("cls_attention", "keys"):
            if field in swap.encoder_outputs:
                mine, alone = getattr(together, field)[index], getattr(single, field)[0]
                assert torch.allclose(mine[:count], alone, atol=1e-5) and not mine[count:].any()
        start += count
    assert torch.equal(together.levels[:, 2], together.patches)


@torch.no_grad()
def test_attention_received_is_that_of_the_block(tower, pixels, monkeypatch):
    seen = []

    def spy(module, query, key, value, *args, scaling, **kwargs):
        seen.append((query * scaling @ key.mT).softmax(-1).mean(dim=(0, 1, 2)))
        return (query @ key.mT * scaling).softmax(-1).matmul(value).transpose(1, 2), None

    swap = replace(PLAIN, name="vision_zip")
    features = qwen_features(tower, pixels, GRIDS, swap)
    monkeypatch.setattr("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.eager_attention_forward", spy)
    monkeypatch.setattr(tower.config, "_attn_implementation", "eager")
    qwen_features(tower, pixels, GRIDS, swap)
    order = PatchOrder.of(tower, GRIDS, torch.device("cpu"))
    wanted = torch.cat(seen[-3:])[order.raster]  # the last block looks at each of the three images
    assert torch.allclose(features.cls_attention[features.valid], wanted, atol=1e-5)
    assert torch.allclose(features.cls_attention.sum(1), torch.ones(3), atol=1e-4)


def test_what_it_cannot_give_is_said(tower, pixels, monkeypatch):
    with pytest.raises(ValueError, match="Image 1 has 2 steps"):
        image_grids(torch.tensor([[1, 2, 2], [2, 2, 2]]))
    with pytest.raises(ValueError, match=r"levels \[3\].*0 \(embedding\) to 2"):
        qwen_features(tower, pixels, GRIDS, replace(PLAIN, levels=(1, 3)))
    monkeypatch.setattr(tower, "fullatt_block_indexes", [])
    with pytest.raises(ValueError, match="windows only"):
        qwen_features(tower, pixels, GRIDS, replace(PLAIN, name="vision_zip"))
