"""The shipped model computes what it computed when these tensors were stored: input, features, logits, mask.

``python tests/models/test_stored_tensors.py`` stores them anew; do so only for new weights. They were stored by the
code of release 0.2.0 (commit 0de6599), before the model was made ready for GPUs. Tolerances are relative to a tensor's
largest value: other versions of torch and other machines add in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lavis_svp.metrics.masks import iou, mask_counts

DATA = Path(__file__).resolve().parents[1] / "data" / "shipped_tiny"
EXPRESSIONS = {
    "scene": ["the red circle", "the blue triangle", "the circle to the right of the square", "the pink zebra"],
    "photo": ["the white cup", "the spoon"],
}
TOLERANCE = {"patches": 2e-4, "sam": 2e-4, "visual_tokens": 2e-4, "logits": 1e-3}
"""Of each stage, the largest difference as a share of the tensor's largest absolute value, in float32 on a CPU."""
MASK_IOU = 0.995  # a pixel at a mask's border may fall to the other side
REGIONS = 0.02  # share of pixels that may belong to another region
STEP = {"patches": (slice(None, None, 17), slice(None, None, 7)), "sam": (slice(None, None, 9), slice(None, None, 3))}
"""Every so many rows and columns are stored."""


def _photo() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.coffee()[60:340:2, 60:560:2])  # (140, 250, 3)


def _scene() -> np.ndarray:
    from lavis_svp.datasets.refshapes.build import make_image
    from lavis_svp.datasets.refshapes.config import RefShapesConfig

    config = RefShapesConfig()
    return make_image(1, "test", 0, config).paint(1, config)[0]


def build() -> Any:
    """The shipped model in float32, without the features' cache."""
    from lavis.models import load_model

    return load_model("svp_ris", "tiny", is_eval=True)


@torch.no_grad()
def compute(model: Any, name: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of one image on its way through the model, and the answers."""
    from lavis_svp.processors.image import SvpImageEvalProcessor

    pixels = np.array(Image.open(DATA / f"{name}.png"))
    processor = SvpImageEvalProcessor.from_config({"image_size": 384})
    samples = {
        "image": processor(pixels)[None],
        "original_size": [pixels.shape[:2]],
        "text_input": [EXPRESSIONS[name]],
    }
    encoded = model.encode(samples)
    predictions = model.predict_masks(samples, "teacher_forced")[0]
    answers = [prediction.text for prediction in model.predict_masks(samples)[0]]
    patches, sam = encoded.vision.patches.patches[0], encoded.vision.sam[0]
    logits = torch.stack([torch.from_numpy(prediction.logits) for prediction in predictions])
    return {
        "patches": patches[STEP["patches"]].contiguous(),
        "sam": sam[:, :: STEP["sam"][0].step, :: STEP["sam"][1].step].contiguous(),
        "regions": torch.from_numpy(encoded.vision.region_maps[0].labels.astype(np.int8)[::2, ::2].copy()),
        "visual_tokens": encoded.visual.tokens[0, :, ::11].contiguous(),
        "logits": logits[:, ::5, ::5].contiguous(),
        "masks": torch.from_numpy(np.stack([np.packbits(prediction.mask, axis=1) for prediction in predictions])),
    }, answers


def differences(stored: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each stage of real numbers, the largest difference as a share of the largest stored value."""
    return {
        name: float((now[name].float() - stored[name]).abs().max() / stored[name].abs().max()) for name in TOLERANCE
    }


@pytest.fixture(scope="module")
def shipped():
    return build()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_shipped_model_computes_the_stored_tensors(shipped, name):
    stored, expected = load_file(DATA / f"{name}.safetensors"), json.loads((DATA / "answers.json").read_text())
    now, answers = compute(shipped, name)
    assert float((now["regions"] != stored["regions"]).float().mean()) <= REGIONS
    assert {key: value for key, value in differences(stored, now).items() if value > TOLERANCE[key]} == {}
    for mask, before in zip(now["masks"].numpy(), stored["masks"].numpy(), strict=True):
        counts = mask_counts(np.unpackbits(mask, axis=1), np.unpackbits(before, axis=1))
        assert iou(counts.intersection, counts.union) >= MASK_IOU
    assert answers == expected[name]


def main() -> None:
    """Store the inputs and the tensors."""
    DATA.mkdir(parents=True, exist_ok=True)
    for name, pixels in {"scene": _scene(), "photo": _photo()}.items():
        Image.fromarray(pixels).save(DATA / f"{name}.png", optimize=True)
    model, answers = build(), {}
    for name in EXPRESSIONS:
        tensors, answers[name] = compute(model, name)
        save_file(tensors, DATA / f"{name}.safetensors")
    (DATA / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
