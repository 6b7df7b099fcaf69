"""Kinds of GPU: how fast and how large they are at most."""

from __future__ import annotations

from dataclasses import dataclass

from lavis_svp.common.registry import unknown_name

_AMPERE = "NVIDIA A100 data sheet: BF16 tensor core, dense"
_HOPPER = "NVIDIA {} data sheet: 1,979 TFLOPS BF16 tensor core with sparsity, half of it dense"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Args:
        name: as given to ``--gpu``.
        tflops: peak of dense bf16 products with fp32 sums, 10^12 operations a second.
        memory_gb: memory in 10^9 bytes.
        source: where the numbers come from.
    """

    name: str
    tflops: float
    memory_gb: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 312.0, 40.0, _AMPERE),
        Gpu("a100-80g", 312.0, 80.0, _AMPERE),
        Gpu("h100-80g", 989.5, 80.0, _HOPPER.format("H100 SXM")),
        Gpu("h200-141g", 989.5, 141.0, _HOPPER.format("H200 SXM")),
        Gpu("l40s-48g", 362.05, 48.0, "NVIDIA L40S data sheet: BFLOAT16 tensor core, dense"),
        Gpu("a40-48g", 149.7, 48.0, "NVIDIA A40 data sheet: BF16 tensor core with FP32 sums, dense"),
        Gpu("rtx4090-24g", 165.2, 24.0, "NVIDIA Ada white paper: BF16 tensor core with FP32 sums, dense"),
        Gpu("rtx3090-24g", 71.0, 24.0, "NVIDIA GA102 white paper: BF16 tensor core with FP32 sums, dense"),
    )
}


def get_gpu(name: str) -> Gpu:
    """A kind of GPU by name.

    Raises:
        UnknownNameError: no such kind; lists those there are.
    """
    if name not in GPUS:
        raise unknown_name("kind of GPU", name, GPUS)
    return GPUS[name]
