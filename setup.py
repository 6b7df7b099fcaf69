"""Packaging of lavis-svp. Only ``lavis_svp`` is installed: LAVIS's wheel already claims ``projects`` and ``tests``."""

from pathlib import Path

from setuptools import find_packages, setup

# LAVIS is missing here on purpose: its pins cannot be met together with these (see requirements-lavis.txt). Without it
# lavis_svp.superpixels, .projectors and .metrics work.
# A lower bound is a release with which the fast tests pass, all others of this file at their bounds beside it:
# run_scripts/test_lower_bounds.sh. What is tested daily is requirements.txt. A comment says what is missing below a
# bound.
CORE = [
    "filelock>=3.16",
    "numpy>=1.26",
    "omegaconf>=2.3",
    "opencv-python-headless>=4.11.0.86",
    "peft>=0.13",
    "pillow>=10.1",  # ImageFont.load_default(size)
    "pycocotools>=2.0.7",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4.3",  # transformers 4.57 asks for it
    "scikit-image>=0.22",
    "scipy>=1.11.1",  # 1.11.0 was withdrawn
    "segment-anything>=1.0",
    "timm>=1.0.21",  # TinyVit on the meta device, which lavis-svp plan uses
    "tokenizers>=0.22",  # transformers 4.57 asks for it
    "torch>=2.8",  # without a GPU, deepspeed does not import beside the triton of torch 2.7
    "torchvision>=0.23",  # the one for torch 2.8; segment-anything imports it, which its wheel does not say
    "tqdm>=4.66",
    # 4.57: siglip2_vision_model, nested lists of images, layer_types of Qwen2-VL. 4.57.6: until 4.57.5 a configuration
    # of Qwen2-VL is saved with the model_type of its language model. 5 moves what LAVIS imports.
    "transformers>=4.57.6,<5",
    "webdataset>=0.2.96",  # mtime= of TarWriter (0.2.33), empty_check= of WebDataset
]

EXTRAS = {
    # What LAVIS imports; then `pip install --no-deps salesforce-lavis==1.0.2`.
    "lavis": [
        "decord>=0.6",
        "einops>=0.7",
        "fairscale>=0.4.4",
        "ftfy>=6",  # by its CLIP models only
        "iopath>=0.1.10",
        "pandas>=2.2",
        "pycocoevalcap>=1.2",
        "sentencepiece>=0.2.2",  # by T5's tokenizer; 0.2.0 crashes beside protobuf's library
        "spacy>=3.7",
    ],
    # Converting the embedded weights, and importing checkpoints of GLaMM and LISA.
    "zoo": ["gguf>=0.10", "onnx>=1.16", "sentencepiece>=0.2.2"],
    # Read-outs and the no-target fit (lavis-svp probe).
    "probes": ["scikit-learn>=1.3"],
    "deepspeed": ["deepspeed>=0.19.8"],  # below: faults under ZeRO-3, with gloo, beside torch_autocast, with NaN
    # model.language.quantization: 8bit or 4bit.
    "quantize": ["bitsandbytes>=0.47"],  # 8bit on a CPU
    # Curves and images besides log.txt (run.log_to).
    "log": ["tensorboard>=2.18"],
    # Running the tests. What checks the code is only right in the exact version: requirements-dev.txt.
    "dev": ["hypothesis>=6.100", "onnxruntime>=1.18", "pytest>=8", "pytest-xdist>=3.6.1"],
}

readme = Path(__file__).parent / "README.md"

setup(
    name="lavis-svp",
    version="0.6.0",
    description="Semantic superpixels as the visual tokens of a multimodal LLM, for referring segmentation in LAVIS",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE", "NOTICE.md"],
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["lavis_svp", "lavis_svp.*"]),
    package_data={"lavis_svp": ["**/*.yaml", "**/*.json", "weights/*.safetensors", "weights/*.md"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lavis-svp=lavis_svp.cli.main:main"]},
)
