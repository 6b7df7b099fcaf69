"""Packaging of lavis-svp. Only ``lavis_svp`` is installed: LAVIS's wheel already claims ``projects`` and ``tests``."""

from pathlib import Path

from setuptools import find_packages, setup

# LAVIS is missing here on purpose: its pins cannot be met together with these (see requirements-lavis.txt). Without it
# lavis_svp.superpixels, .projectors and .metrics work. Lower bounds say what the code needs; what is tested is
# requirements.txt.
CORE = [
    "filelock>=3.12",
    "numpy>=1.26",
    "omegaconf>=2.3",
    "opencv-python-headless>=4.11",
    "peft>=0.13",
    "pillow>=10",
    "pycocotools>=2.0.7",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "scikit-image>=0.22",
    "scipy>=1.11",
    "segment-anything>=1.0",
    "timm>=1.0",
    "tokenizers>=0.20",
    "torch>=2.6",
    "torchvision>=0.21",
    "tqdm>=4.66",
    "transformers>=4.56,<5",  # dtype= of from_pretrained, DINOv3ViTModel
    "webdataset>=0.2",
]

EXTRAS = {
    # What `import lavis` needs; then `pip install --no-deps salesforce-lavis==1.0.2`.
    "lavis": [
        "decord>=0.6",
        "einops>=0.7",
        "fairscale>=0.4.4",
        "ftfy>=6",
        "iopath>=0.1.10",
        "matplotlib>=3.8",
        "pandas>=2.2",
        "pycocoevalcap>=1.2",
        "sentencepiece>=0.2",
        "spacy>=3.7",
    ],
    # Converting the embedded weights, and importing checkpoints of GLaMM and LISA.
    "zoo": ["accelerate>=1.0", "gguf>=0.10", "onnx>=1.16", "sentencepiece>=0.2"],
    # Read-outs and the no-target fit (lavis-svp probe).
    "probes": ["scikit-learn>=1.3"],
    "deepspeed": ["deepspeed>=0.16"],
    # Curves and images besides log.txt (run.log_to).
    "log": ["tensorboard>=2.18"],
    "dev": ["hypothesis>=6.100", "mypy>=1.13", "onnxruntime>=1.18", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9"],
}

readme = Path(__file__).parent / "README.md"

setup(
    name="lavis-svp",
    version="0.2.0",
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
