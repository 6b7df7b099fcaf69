"""What only LLaVA-OneVision has: pooled canvases, one square view for each of several images."""

from __future__ import annotations

import pytest
import torch

from lavis_svp.hosts import swap_projector
from lavis_svp.hosts.llava_onevision import most_views, onevision_canvases

PINPOINTS = [[28, 28], [56, 56]]


def test_one_image_is_tiled_and_several_are_seen_whole():
    sizes = [(50, 60), (20, 60), (60, 18), (90, 80)]
    canvases = onevision_canvases(sizes, [1, 2, 1], PINPOINTS, 28, 9)
    assert [canvas.base for canvas in canvases] == [True, False, False, True]
    assert [canvas.views for canvas in canvases] == [5, 1, 1, 5]
    assert canvases[1].grid == (2, 3) and canvases[2].grid == (3, 2)  # less the padding
    assert all(canvas.base for canvas in onevision_canvases(sizes, None, PINPOINTS, 28, 9))
    with pytest.raises(ValueError, match=r"\[1, 2\] = 3 images, there are 4"):
        onevision_canvases(sizes, [1, 2], PINPOINTS, 28, 9)


def test_pooling_setting():
    assert most_views("anyres_max_9") == 9
    for wrong in ("pad", "anyres_max_", "anyres_max_x", "anyres"):
        with pytest.raises(ValueError, match="vision_aspect_ratio"):
            most_views(wrong)


@torch.no_grad()
def test_mlp_is_pooled_as_the_host_pools(llava_onevision, image):
    model, processor = swap_projector(*llava_onevision, "mlp")
    large = [processor(text="<image>", images=image(1, *size), return_tensors="pt") for size in ((56, 56), (84, 28))]
    tokens = [int((inputs["input_ids"] == model.config.image_token_id).sum()) for inputs in large]
    # 36 and 27 patches against 2 views of 9: sides shrink by sqrt(2) and sqrt(1.5), 6 x 6 to 4 x 4, 9 x 3 to 7 x 2
    assert tokens == [9 + 4 * 5, 9 + 7 * 3]


@torch.no_grad()
def test_the_embeddings_stay_tied(llava_onevision, tmp_path):
    model, _ = swap_projector(*llava_onevision, "mask_pool", superpixels="felzenszwalb")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
