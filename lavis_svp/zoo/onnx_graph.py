"""Read the tensors of an exported ONNX file and find the names that the exporter dropped."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


class OnnxGraph:
    """An ONNX file's nodes and constant tensors.

    torch's exporter keeps a parameter's name unless it transforms the tensor: the weights of linear layers come
    out transposed, and convolutions with their batch norm folded in, under names like ``onnx::MatMul_2385``.

    Args:
        path: the .onnx file.
    """

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.tensors: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.tensors[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.named = [t.name for t in graph.initializer if not t.name.startswith("onnx::")]
        self._producer = {output: node for node in self.nodes for output in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._consumers[name].append(node)

    def named_tensors(self) -> dict[str, np.ndarray]:
        """The tensors that kept their parameter's name."""
        return {name: self.tensors[name] for name in self.named}

    def linear_weights(self) -> dict[str, np.ndarray]:
        """Weights (out, in) of the linear layers, named after the bias that is added next."""
        weights = {}
        for node in self.nodes:
            if node.op_type != "MatMul" or node.input[1] not in self.tensors:
                continue
            adds = [after for after in self._consumers[node.output[0]] if after.op_type == "Add"]
            biases = [name for add in adds for name in add.input if name.endswith(".bias")]
            if biases:
                weights[biases[0].removesuffix("bias") + "weight"] = self.tensors[node.input[1]].T
        return weights

    def convolutions(self, unnamed_only: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weight and bias of the convolutions in the order they run; by default of those that lost their name."""
        found = []
        for node in self.nodes:
            if node.op_type == "Conv" and not (unnamed_only and node.input[1] in self.named):
                found.append((self.tensors[node.input[1]], self.tensors[node.input[2]]))
        return found

    def softmax_biases(self) -> list[np.ndarray]:
        """The constants added just before each softmax (relative position biases), in the order they run."""
        found: list[np.ndarray] = []
        for node in self.nodes:
            if node.op_type == "Softmax":
                add = self._producer[node.input[0]]
                found.extend(self.tensors[name] for name in add.input if name in self.tensors)
        return found
