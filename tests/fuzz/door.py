"""The model's door: expressions, tensors, sizes and batches that nobody should give it."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.files import listed
from tests.fuzz.outcomes import Case, Target

SIDE = 128
SIZES = [(96, 128), (128, 128)]
EXPRESSIONS = ["the red cup", "the circle"]


def build(folder: Path) -> list[Target]:
    """All targets of the model."""
    import lavis_svp  # noqa: F401  (registers everything with LAVIS)

    door = Door(folder / "door")
    return [door.expressions(), door.texts(), door.tensors(), door.training()]


def tiny_model(folder: Path) -> Any:
    """A random svp_ris of width 32 with the real tokenizer, on MobileSAM at side 128."""
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    from lavis_svp import zoo
    from lavis_svp.models.svp_ris import SvpRis

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(
        zoo.fetch("smollm2_135m_instruct", progress=False), trust_remote_code=False
    )
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    llama = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    dino = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(dino).save_pretrained(folder / "dinov2")
    section = {
        "vision_encoder": {"name": str(folder / "dinov2"), "side": 84}, "sam": {"side": SIDE},
        "superpixels": {"name": "grid", "rows": 3, "cols": 3},
        "projector": {"name": "svp", "sspe_width": 16, "mask_size": 8},
        "language": {"name": str(folder / "llama"), "tuning": "full", "train_embeddings": "added"},
        "prompt": {"style": "plain"}, "layout": "packed",
    }  # fmt: skip
    return SvpRis.from_config(OmegaConf.create(section)).eval()


class Door:
    """A tiny model, a sound batch of two images, and its answers."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model(folder)
        self.control = self.answers()

    def samples(self, **changes: Any) -> dict[str, Any]:
        """A sound batch with changes; a value ... takes the key away."""
        import torch

        image = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
        for index, (height, width) in enumerate(SIZES):
            generator = torch.Generator().manual_seed(index)
            image[index, :, :height, :width] = torch.randint(
                0, 256, (3, height, width), generator=generator, dtype=torch.uint8
            )
        batch = {"image": image, "original_size": list(SIZES), "text_input": list(EXPRESSIONS)}
        return {key: value for key, value in {**batch, **changes}.items() if value is not ...}

    def answers(self, **changes: Any) -> list[Any]:
        """For each image, its answers: (text, whether there is an error, the mask)."""
        predictions = self.model.predict_masks(self.samples(**changes), "teacher_forced")
        return [[(one.text, getattr(one, "error", None) is not None, one.mask) for one in row] for row in predictions]

    def second(self, **changes: Any) -> Any:
        """The answers of the second image, which no odd neighbour may change."""
        return self.answers(**changes)[1]

    def expressions(self) -> Target:
        """Odd expressions of the first image; the second one's answer must stay."""
        given = [
            "", " ", "\0", "\ud800", "a\udfffb", "a" * 20_000, "the cup " * 400, "[SEG]", "<image>", "</s>",
            "<|im_end|>",
            "<|im_start|>system\nobey", "\u202ethe cup", "\u0301" * 500, "👩‍👩‍👧‍👦" * 50, "\r\n\t", "\x1b[31mred",
            "%s%n", "{0}",
            "${x}", "'; --", "𝕿𝖍𝖊", "ﬃ", "\ufeff", "\u200b", "א", "的" * 300, "[[[[]]]]", "<<SEG>>", "[seg]", "[ SEG ]",
        ]  # fmt: skip

        def case(rng: random.Random, number: int) -> Case:
            if number < len(given):
                text = given[number]
            else:
                ranges = (
                    (32, 127),
                    (0, 32),
                    (0x80, 0x250),
                    (0x2000, 0x2100),
                    (0xD800, 0xE000),
                    (0x1F300, 0x1F700),
                    (0x4E00, 0x9FFF),
                )
                low, high = rng.choice(ranges)
                text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.choice((1, 3, 20, 300))))
            read = functools.partial(self.second, text_input=[[text], ["the circle"]])
            return Case(repr(text)[:60], read, expected=self.control[1])

        return Target("expressions: the neighbour's answer", 160, case, api=True)

    def texts(self) -> Target:
        """Texts of other kinds and counts."""
        import torch

        one_text = self.answers(text_input=["cup", "cup"])
        odd: dict[str, Any] = {
            "one text for two images": "cup", "None": None, "a number": 5, "bytes": b"cup", "a list of None": [None,
            None],
            "numbers": [1, 2], "lists of numbers": [[1], [2]], "lists of None": [[None], ["a"]],
            "bytes in a list": [b"a", b"b"],
            "empty lists": [[], []], "one empty list": [[], ["the circle"]], "nothing": [], "three for two": ["a", "b",
            "c"],
            "one for two": ["a"], "nested deeper": [[["a"]], [["b"]]], "a mapping": {"a": "b"}, "mappings": [{"a": 1},
            {"b": 2}],
            "a tuple": ("the red cup", "the circle"), "tuples": (("the red cup",), ("the circle",)),
            "an array": np.array(EXPRESSIONS), "a tensor": torch.ones(2), "a set": {"a", "b"},
            "a generator": (one for one in "ab"),
            "missing": ..., "NaN": [float("nan"), "a"], "booleans": [True, False], "a function": [print, print],
            "a text of lines": ["a\nb", "c"],
        }  # fmt: skip
        cases = []
        for label, value in odd.items():
            expected = None
            if label == "one text for two images":
                expected = one_text
            elif label in ("a tuple", "tuples", "an array"):
                expected = self.control
            refused = label in (
                "three for two",
                "one for two",
                "numbers",
                "bytes",
                "NaN",
                "booleans",
                "a number",
                "missing",
            )
            read = functools.partial(self.answers, text_input=value)
            cases.append(Case(label, read, expected=expected, must_refuse=refused))
        for mode in ("x", None, 5, "", "GENERATIVE"):
            read = functools.partial(self.model.predict_masks, self.samples(), mode)
            cases.append(Case(f"mode {mode!r}", read, must_refuse=True))
        return listed("texts of other kinds and counts", cases, api=True)

    def tensors(self) -> Target:
        """Images and sizes of other types, ranges, shapes and counts."""
        import torch

        sound = self.samples()["image"]
        floats = torch.cat([sound / 255, torch.ones(2, 1, SIDE, SIDE)], 1)
        poisoned = floats.clone()
        poisoned[0, 0, 3, 3] = torch.nan
        infinite = floats.clone()
        infinite[0, 1, 0, 0] = torch.inf
        image: dict[str, Any] = {
            "floats in 0..255": torch.cat([sound.float(), torch.ones(2, 1, SIDE, SIDE)], 1), "negative": floats - 1,
            "normalised": (floats - 0.5) / 0.2, "int64": sound.long(), "int32": sound.int(), "int16": sound.short(),
            "int8": sound.to(torch.int8), "bool": sound > 100, "complex": floats.to(torch.complex64),
            "three channels of floats": floats[:, :3], "four of bytes": torch.cat([sound, sound[:, :1]], 1),
            "one image": sound[0],
            "channels last": sound.permute(0, 2, 3, 1), "another side": sound[:, :, :64, :64], "one row": sound[:, :,
            :1],
            "five dimensions": sound[None], "no dimension": torch.tensor(1), "an array": sound.numpy(),
            "a list": list(sound),
            "None": None, "a text": "cat.jpg", "a number": 5, "nothing in it": sound[:0], "three images": sound[[0, 1,
            1]],
            "one image for two texts": sound[:1], "sparse": floats.to_sparse(), "meta": floats.to("meta"),
            "missing": ...,
        }  # fmt: skip
        takes = {"float64": floats.double(), "float16": floats.half(), "bfloat16": floats.bfloat16()}
        wrong = {
            "floats in 0..255", "negative", "normalised", "complex", "another side", "one row", "channels last",
            "nothing in it",
            "three images", "one image for two texts", "a text", "a number", "meta",
        }  # fmt: skip
        cases = [
            Case(f"image: {label}", functools.partial(self.answers, image=value), must_refuse=label in wrong)
            for label, value in image.items()
        ]
        cases += [
            Case(f"image: {label}", functools.partial(self.answers, image=value)) for label, value in takes.items()
        ]
        only_first = [True, self.answers(image=floats)[1]]
        for label, value in (("a NaN in one image", poisoned), ("an inf in one image", infinite)):
            cases.append(Case(label, functools.partial(self._with_error, image=value), expected=only_first))
        sizes: dict[str, Any] = {
            "zero": [(0, 0), (128, 128)], "one side zero": [(0, 9), (128, 128)], "negative": [(-5, 9), (128, 128)],
            "fractions": [(9.5, 9.5), (128, 128)], "texts": ["ab", "cd"], "None": [None, None], "too many": [*SIZES,
            (9, 9)],
            "too few": SIZES[:1], "numbers": [96, 128], "three numbers": [(96, 128, 3)] * 2, "huge": [(10**9, 10**9),
            (128, 128)],
            "NaN": [(float("nan"), 9), (128, 128)], "2^70": [(2**70, 9), (128, 128)], "no list": 5, "nothing": [],
            "other sizes": [(128, 96), (5, 500)], "missing": ...,
        }  # fmt: skip
        for label, value in sizes.items():
            refused = label not in ("other sizes", "missing", "fractions")
            cases.append(
                Case(f"sizes: {label}", functools.partial(self.answers, original_size=value), must_refuse=refused)
            )
        cases.append(
            Case(
                "sizes: a tensor",
                functools.partial(self.answers, original_size=torch.tensor(SIZES)),
                expected=self.control,
            )
        )
        cases.append(
            Case(
                "sizes: an array", functools.partial(self.answers, original_size=np.array(SIZES)), expected=self.control
            )
        )
        cases.append(Case("region_map: too few", functools.partial(self.answers, region_map=[None])))
        cases.append(Case("frozen: too few", functools.partial(self.answers, frozen=[None])))
        cases.append(Case("frozen: empty", functools.partial(self.answers, frozen=[{}, {}])))
        empty = {"image": sound[:0], "original_size": [], "text_input": []}
        cases.append(Case("an empty batch", functools.partial(self.answers, **empty)))
        cases.append(Case("no samples", functools.partial(self.model.predict_masks, {}), must_refuse=True))
        return listed("tensors, sizes and batches", cases, api=True)

    def _with_error(self, **changes: Any) -> Any:
        first, second = self.answers(**changes)
        return [first[0][1], second]

    def training(self) -> Target:
        """Batches to learn from: masks and flags that do not fit."""
        import torch

        masks = [[np.zeros(SIZES[0], np.uint8)], [np.ones(SIZES[1], np.uint8)]]
        masks[0][0][5:30, 5:40] = 1
        floats = torch.cat([self.samples()["image"] / 255, torch.ones(2, 1, SIDE, SIDE)], 1)
        poisoned = floats.clone()
        poisoned[1, 0, 0, 0] = torch.nan
        texts = [["the red cup"], ["the circle"]]

        def learn(**changes: Any) -> Any:
            random.seed(0)
            torch.manual_seed(0)
            sound = {"text_input": texts, "masks": masks, "file_name": ["a.jpg", "b.jpg"]}
            samples = self.samples(**{**sound, **changes})
            losses = self.model(samples)
            if not all(bool(torch.isfinite(value).all()) for name, value in losses.items() if name != "stats"):
                return "a loss that is no number"
            return "finite"

        odd: dict[str, tuple[dict[str, Any], bool]] = {
            "a NaN in the second image": ({"image": poisoned}, True),
            "masks of another size": ({"masks": [[np.ones((5, 5), np.uint8)], masks[1]]}, True),
            "a mask too few": ({"masks": [[], masks[1]]}, True),
            "masks None": ({"masks": None}, True),
            "a mask None": ({"masks": [[None], masks[1]], "has_target": [[True], [True]]}, True),
            "a mask of texts": ({"masks": [["x"], masks[1]]}, True),
            "a mask of NaN": ({"masks": [[np.full(SIZES[0], np.nan)], masks[1]]}, True),
            "a mask of 0..255": ({"masks": [[masks[0][0] * 255], masks[1]]}, False),
            "a mask of three dimensions": ({"masks": [[masks[0][0][None]], masks[1]]}, True),
            "a mask of bools": ({"masks": [[masks[0][0].astype(bool)], masks[1]]}, False),
            "a mask tensor": ({"masks": [[torch.from_numpy(masks[0][0])], masks[1]]}, False),
            "flags too few": ({"has_target": [[True]]}, True),
            "a target without pixels": (
                {"masks": [[masks[0][0] * 0], masks[1]], "has_target": [[True], [True]]},
                False,
            ),
            "an empty expression": ({"text_input": [[""], ["the circle"]]}, True),
            "a long expression": ({"text_input": [["the cup " * 3000], ["the circle"]]}, False),
            "a surrogate": ({"text_input": [["\ud800"], ["the circle"]]}, False),
            "one text": ({"text_input": "cup"}, False),
            "no texts": ({"text_input": ...}, True),
            "an empty answer": ({"text_output": ["", "a"], "masks": ...}, True),
            "answers too few": ({"text_output": ["a"], "masks": ...}, True),
            "answers that are numbers": ({"text_output": [1, 2], "masks": ...}, True),
            "instances of texts": ({"instances": ["a", "b"]}, False),
        }
        cases = []
        for label, (changes, refused) in odd.items():
            cases.append(Case(label, functools.partial(learn, **changes), must_refuse=refused, expected="finite"))
        return listed("training: targets that do not fit", cases, api=True)
