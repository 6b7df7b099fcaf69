"""GLaMM's and LISA's checkpoints: tiny ones with their tensors' names go through the real converter and classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lavis_svp.cli.zoo import main
from lavis_svp.common.files import BadFileError
from lavis_svp.language.causal_lm import LanguageModel, LanguageOptions
from lavis_svp.vision.sam import build_mask_decoder
from lavis_svp.zoo.glamm import import_glamm

BASE, WIDTH = 320, 32
GLAMM_TOKENS = ["<im_start>", "<im_end>", "<bbox>", "<point>", "[SEG]", "<p>", "</p>"]
LISA_TOKENS = ["[SEG]", "<im_start>", "<im_end>"]


def glamm_state(segmenter, tokens):
    """Tensors with the published names: a LLaMA with a grown vocabulary, SAM's decoder, projectors, what is dropped."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=BASE + len(tokens), **sizes))
    state = {name: tensor.half() for name, tensor in llama.state_dict().items()}
    state |= {f"{segmenter}.mask_decoder.{n}": t.half() for n, t in build_mask_decoder().state_dict().items()}
    for part, (rows, columns) in {"0": (WIDTH, WIDTH), "2": (256, WIDTH)}.items():
        state[f"model.text_hidden_fcs.0.{part}.weight"] = torch.randn(rows, columns).half()
        state[f"model.text_hidden_fcs.0.{part}.bias"] = torch.randn(rows).half()
    for part, columns in {"0": 24, "2": WIDTH}.items():
        state[f"model.mm_projector.{part}.weight"] = torch.randn(WIDTH, columns).half()
        state[f"model.mm_projector.{part}.bias"] = torch.randn(WIDTH).half()
    for name in (
        f"{segmenter}.image_encoder.blocks.0.attn.qkv.weight",
        f"{segmenter}.prompt_encoder.no_mask_embed.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "model.region_encoder.mlvl_fuse.input_conv.0.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        state[name] = torch.zeros(3)
    return state


def write_folder(folder, state, tokens, sentencepiece_folder, files=2):
    """As the Hugging Face hub has it: parts and index (or one file), config of the whole model, slow tokenizer."""
    folder.mkdir()
    for file in sentencepiece_folder.iterdir():
        shutil.copy(file, folder)
    (folder / "added_tokens.json").write_text(json.dumps({t: BASE + i for i, t in enumerate(tokens)}))
    config = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"architectures": ["GLaMMForCausalLM"], "model_type": "llava", "mm_hidden_size": 24, "vocab_size": BASE + 7}
    (folder / "config.json").write_text(json.dumps({**config, **more, "max_position_embeddings": 128}))
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names, index = sorted(state), {}
    for number in range(files):
        part = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        chosen = names[number::files]
        torch.save({name: state[name] for name in chosen}, folder / part)
        index |= dict.fromkeys(chosen, part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(params=["glamm", "lisa"])
def checkpoint(request, tmp_path, sentencepiece_folder):
    """(folder, its tensors, [SEG]'s id, the segmenter's name)"""
    glamm = request.param == "glamm"
    segmenter = "model.grounding_encoder" if glamm else "model.visual_model"
    tokens = GLAMM_TOKENS if glamm else LISA_TOKENS
    state = glamm_state(segmenter, tokens)
    folder = write_folder(tmp_path / "source", state, tokens, sentencepiece_folder, files=2 if glamm else 1)
    return folder, state, BASE + tokens.index("[SEG]"), segmenter


def test_the_language_model_is_the_same_and_seg_has_its_row(checkpoint, tmp_path):
    folder, state, seg_id, _ = checkpoint
    report = import_glamm(folder, tmp_path / "out", progress=False)
    assert report.seg_id == seg_id and report.vocabulary == BASE
    language = LanguageModel(LanguageOptions(name=str(tmp_path / "out/language"), tuning="frozen")).eval()
    assert language.seg_id == BASE
    own = {f"model.{name}": tensor for name, tensor in language.transformer.state_dict().items()}
    own |= {"model.embed_tokens.weight": language.embed_tokens.weight, "lm_head.weight": language.output.weight}
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name].float()[: len(tensor)]), name
    assert set(own) == set(report.language)
    svp = load_file(tmp_path / "out/svp.safetensors")
    assert torch.equal(svp["language.added_embedding"], state["model.embed_tokens.weight"][seg_id : seg_id + 1])
    assert torch.equal(svp["language.added_output"], state["lm_head.weight"][seg_id : seg_id + 1])


def test_every_other_tensor_has_a_place_in_our_model_or_a_reason(checkpoint, tmp_path):
    from lavis_svp.models.checkpoint import load_pretrained_parts
    from lavis_svp.models.config import parse_model_options
    from lavis_svp.models.svp_ris import SvpRis

    folder, state, _, segmenter = checkpoint
    report = import_glamm(folder, tmp_path / "out", progress=False)
    assert set(report.language) | set(report.renamed) | set(report.dropped) == set(state)
    svp = load_file(tmp_path / "out/svp.safetensors")
    options = parse_model_options(
        {"language": {"name": str(tmp_path / "out/language"), "tuning": "frozen"}, "sam": {"side": 128}}
    )
    model = SvpRis(options)
    own = dict(model.named_parameters())
    assert {name: tensor.shape for name, tensor in svp.items()} == {name: own[name].shape for name in svp}
    assert load_pretrained_parts(model, tmp_path / "out/svp.safetensors") == set(svp)
    wanted = state[f"{segmenter}.mask_decoder.mask_tokens.weight"].float()
    assert torch.equal(model.mask_head.mask_decoder.mask_tokens.weight, wanted)
    assert torch.equal(model.readout.mlp[2].weight, state["model.text_hidden_fcs.0.2.weight"].float())
    untouched = {n for n in own if n.startswith(("mask_head.mask_decoder.", "readout.", "language.added_"))} - set(svp)
    assert untouched == set()
    dropped = {name.split(".")[1] for name in report.dropped}
    segmenter_parts = {name.split(".")[2] for name in report.dropped if name.startswith(segmenter)}
    assert dropped == {"vision_tower", "mm_projector", "region_encoder", segmenter.split(".")[1], "layers"}
    assert segmenter_parts == {"image_encoder", "prompt_encoder"}
    assert json.loads((tmp_path / "out/import.json").read_text())["renamed"] == report.renamed


def test_the_projector_is_kept_on_demand_for_mlp(checkpoint, tmp_path):
    from lavis_svp.projectors import build_projector

    folder, state, _, _ = checkpoint
    import_glamm(folder, tmp_path / "out", with_projector=True, progress=False)
    svp = load_file(tmp_path / "out/svp.safetensors")
    mine = {name.removeprefix("projector."): t for name, t in svp.items() if name.startswith("projector.")}
    build_projector("mlp", vision_dim=24, llm_dim=WIDTH, grid=(4, 4)).load_state_dict(mine, strict=True)
    assert torch.equal(mine["head.0.weight"], state["model.mm_projector.0.weight"])


def test_the_command_tells_what_it_did(checkpoint, tmp_path, capsys):
    folder, _, seg_id, segmenter = checkpoint
    assert main(["import-glamm", str(folder), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"[SEG], row {seg_id}: to svp.safetensors" in said and f"{segmenter}.mask_decoder.* -> mask_head" in said
    assert "dropped model.region_encoder.*" in said and "model.pretrained" in said
    with pytest.raises(SystemExit, match="2"):
        main(["import-glamm", str(folder), str(tmp_path / "out")])
    assert "exists already" in capsys.readouterr().err


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_wrong_folders_are_told_and_leave_nothing(tmp_path, sentencepiece_folder):
    def attempt(change, tokens=GLAMM_TOKENS, message="", error=ValueError):
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        state = glamm_state("model.grounding_encoder", GLAMM_TOKENS)
        folder = write_folder(tmp_path / "source", change(state) or state, tokens, sentencepiece_folder, files=1)
        with pytest.raises(error, match=message):
            import_glamm(folder, tmp_path / "out", progress=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    attempt(lambda s: {**s, "model.layers.0.x": Harmful(tmp_path / "it_ran")}, message=r"pytorch_model\.bin is damaged")
    attempt(lambda s: {**s, "base_model.model.lora_A.weight": torch.ones(1)}, message="Merge its adapters")
    attempt(lambda s: {n: t for n, t in s.items() if n != "model.norm.weight"}, message=r"lacks model\.norm\.weight")
    attempt(lambda s: {n: t for n, t in s.items() if "text_hidden" not in n}, message="lacks readout")
    attempt(lambda s: {n: t for n, t in s.items() if ".layers.1." not in n}, message=r"lacks model\.layers\.1")
    attempt(lambda s: None, tokens=["<im_start>"], message="--seg-id")
    with pytest.raises(FileNotFoundError, match="pytorch_model"):
        import_glamm(tmp_path, tmp_path / "out")


def test_safetensors_parts_and_ids_from_the_tokenizers_config(tmp_path, sentencepiece_folder):
    state = glamm_state("model.grounding_encoder", GLAMM_TOKENS)
    folder = write_folder(tmp_path / "source", state, GLAMM_TOKENS, sentencepiece_folder, files=1)
    (folder / "pytorch_model.bin").unlink()
    (folder / "added_tokens.json").unlink()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"1": {"content": "<s>"}, str(BASE + 4): {"content": "[SEG]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert import_glamm(folder, tmp_path / "out", progress=False).seg_id == BASE + 4


@pytest.mark.parametrize("name", ["config.json", "added_tokens.json", "tokenizer_config.json", "index"])
@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 200_000, '{"weight_map": [], "[SEG]": "x"}', '{"weight_map": {"a": 1}}']
)
def test_damaged_json_is_named(tmp_path, sentencepiece_folder, name, content):
    state = {} if name != "index" else {"model.norm.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    folder = write_folder(tmp_path / "source", state, GLAMM_TOKENS, sentencepiece_folder, files=1 + (name == "index"))
    name = "pytorch_model.bin.index.json" if name == "index" else name
    (folder / name).write_text(content)
    if name in ("added_tokens.json", "tokenizer_config.json") and "weight_map" in content:
        content = '{"[SEG]": "x", "added_tokens_decoder": {"x": {}}}'
        (folder / name).write_text(content)
    with pytest.raises(BadFileError) as caught:
        import_glamm(folder, tmp_path / "out", progress=False)
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer_and_damaged_weights_are_named(tmp_path, sentencepiece_folder):
    state = glamm_state("model.grounding_encoder", GLAMM_TOKENS)
    folder = write_folder(tmp_path / "source", state, GLAMM_TOKENS, sentencepiece_folder, files=1)
    for name in ("pytorch_model.bin", "tokenizer.model"):
        whole = (folder / name).read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"\x80" * 500, whole[:20] + b"\xff" * 40 + whole[60:]):
            (folder / name).write_bytes(content)
            with pytest.raises(BadFileError) as caught:
                import_glamm(folder, tmp_path / "out", progress=False)
            assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)
        (folder / name).write_bytes(whole)
