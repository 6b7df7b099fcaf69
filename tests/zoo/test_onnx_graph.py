import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lavis_svp.zoo.onnx_graph import OnnxGraph

LINEAR = np.arange(6, dtype=np.float32).reshape(2, 3)  # (in, out), as exported
BIAS = np.ones(3, np.float32)
RELATIVE = np.full((3, 3), 0.5, np.float32)
KERNEL, SHIFT = np.ones((2, 3, 1, 1), np.float32), np.zeros(2, np.float32)


@pytest.fixture
def graph(tmp_path):
    tensors = {
        "onnx::MatMul_1": LINEAR,
        "layer.bias": BIAS,
        "onnx::Conv_2": KERNEL,
        "onnx::Conv_3": SHIFT,
        "neck.weight": KERNEL,
        "neck.bias": SHIFT,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["product"]),
        helper.make_node("Add", ["layer.bias", "product"], ["linear"]),
        helper.make_node("Constant", [], ["relative"], value=numpy_helper.from_array(RELATIVE)),
        helper.make_node("Add", ["linear", "relative"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["attention"]),
        helper.make_node("Conv", ["image", "onnx::Conv_2", "onnx::Conv_3"], ["features"]),
        helper.make_node("Conv", ["image", "neck.weight", "neck.bias"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "image")]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    made = helper.make_graph(nodes, "toy", inputs, [], initializers)
    path = tmp_path / "toy.onnx"
    onnx.save(helper.make_model(made), path)
    return OnnxGraph(path)


def test_named_tensors_leave_out_the_exporters_names(graph):
    assert set(graph.named_tensors()) == {"layer.bias", "neck.weight", "neck.bias"}


def test_linear_weights_are_named_after_their_bias_and_turned(graph):
    (name,) = graph.linear_weights()
    assert name == "layer.weight"
    np.testing.assert_array_equal(graph.linear_weights()[name], LINEAR.T)


def test_convolutions_in_running_order(graph):
    assert len(graph.convolutions()) == 1 and len(graph.convolutions(unnamed_only=False)) == 2
    np.testing.assert_array_equal(graph.convolutions()[0][0], KERNEL)


def test_softmax_biases(graph):
    (bias,) = graph.softmax_biases()
    np.testing.assert_array_equal(bias, RELATIVE)
