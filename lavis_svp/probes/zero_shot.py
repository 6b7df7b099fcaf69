"""What stands beside a model's scores: what the image classifier alone finds, and how far regions and SAM can reach.

Nothing here is trained. An expression's first known noun stands for it; the region where the classifier gives that noun
the largest probability is the pick, and the regions with nearly as much of it are the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lavis_svp.common.images import nearest
from lavis_svp.language.nouns import NounFinder
from lavis_svp.metrics.report import NO_TARGET
from lavis_svp.models.outputs import EncodedImages
from lavis_svp.probes.session import Session
from lavis_svp.segmentation.targets import mask_centre
from lavis_svp.superpixels.evaluation import single_ceiling, union_ceiling
from lavis_svp.superpixels.region_map import RegionMap
from lavis_svp.vision.classifier import ClassNouns
from lavis_svp.vision.geometry import logits_to_original

NEARLY = 0.7
"""A region joins the mask from this share of the best region's probability on."""
MOST_JOINED = 4
INSIDE = 0.5
"""Share of a region's area from which on it lies in an object: as for ``pick_correct``."""
FIGURES = ("chance", "pick", "iou", "single", "union", "sam_at_centre", "known")


def zero_shot_rows(session: Session) -> list[dict[str, Any]]:
    """One row for each expression of the session's split.

    Returns:
        rows with ``kind``, ``expression``, ``tags`` and ``area_share``; for expressions with a target the numbers of
        ``FIGURES``; and ``evidence``, the best region's probability of the noun (None without a known noun).

    Raises:
        ValueError: the model has no image classifier, or its tokens are not superpixels.
    """
    if not session.model.options.reads_classes:
        raise ValueError(
            "The probe zero-shot asks the image classifier, and this model has none: use model_type tiny_photos, or "
            "set model.seg_prompt.pointer_nouns: true."
        )
    nouns = ClassNouns.load()
    finder = NounFinder(nouns.nouns)
    rows = []
    for samples in tqdm(session.held_out(), desc="Looking", unit="batch", mininterval=1):
        encoded = session.model.encode(samples)
        if encoded.visual.order is None or encoded.vision.region_maps is None:
            raise ValueError("The probe zero-shot needs a projector whose tokens are superpixels.")
        for index in range(len(encoded.counts)):
            rows += list(_rows_of_image(session.model, samples, encoded, index, nouns, finder))
    return rows


def _rows_of_image(
    model: Any, samples: Mapping[str, Any], encoded: EncodedImages, index: int, nouns: ClassNouns, finder: NounFinder
) -> Iterator[dict[str, Any]]:
    assert encoded.vision.region_maps is not None and encoded.visual.classes is not None
    regions, count = encoded.vision.region_maps[index], encoded.counts[index]
    order = encoded.visual.on_host.order
    assert order is not None
    in_order = torch.tensor(order[index]).clamp_min(0).argsort()
    classes = encoded.visual.classes[index, :count].cpu()[in_order]  # (S, K), by the number of the region
    tags = samples.get("tags")
    for number, text in enumerate(samples["text_input"][index]):
        kind, target = samples["kinds"][index][number], np.asarray(samples["masks"][index][number])
        found = finder.find(text)
        scores = nouns.log_probs_of(nouns.nouns[found[0].index], classes).exp().numpy() if found else None  # (S,)
        row = {
            "kind": kind,
            "expression": text,
            "tags": dict(tags[index][number]) if tags is not None else {},
            "evidence": None if scores is None else float(scores.max()),
        }
        if kind != NO_TARGET and target.any():
            row |= region_figures(regions, target, scores)
            row["sam_at_centre"] = sam_at_centre(model, encoded, index, target)
            row["area_share"] = float(target.mean())
            row["known"] = float(bool(found))
        yield row


def region_figures(regions: RegionMap, target: np.ndarray, scores: np.ndarray | None) -> dict[str, float]:
    """Chance, the pick and the mask of some scores, and the ceilings of regions.

    Args:
        regions: S regions.
        target: (H, W) 0/1 of their image at any resolution.
        scores: (S,) larger for regions that fit better; None: nothing is known, and the pick is chance.
    """
    small = nearest(target, regions.labels.shape) > 0
    area = np.maximum(regions.areas, 1)
    inside = np.bincount(regions.labels[small & (regions.labels >= 0)], minlength=regions.count) / area >= INSIDE
    chance = float(inside.mean())
    pick, iou = chance, 0.0
    if scores is not None:
        best = np.argsort(-scores, kind="stable")[:MOST_JOINED]
        joined = np.isin(regions.labels, best[scores[best] >= NEARLY * scores.max()])
        pick, iou = float(inside[best[0]]), float((joined & small).sum() / (joined | small).sum())
    return {
        "chance": chance,
        "pick": pick,
        "iou": iou,
        "single": single_ceiling(regions, target)[0],
        "union": union_ceiling(regions, target)[0],
    }


@torch.no_grad()
def sam_at_centre(model: Any, encoded: EncodedImages, index: int, target: np.ndarray) -> float:
    """IoU of what the untrained SAM decoder makes of a point at the target's centre, the one of three it rates best.

    Args:
        model: a ``svp_ris``.
        encoded: its images.
        index: of the image.
        target: (H, W) 0/1.
    """
    geometry, device = encoded.vision.geometry[index], encoded.vision.sam.device
    side = encoded.vision.sam.shape[-1]
    centre = mask_centre(target, geometry).to(device)  # (2,) x and y, in shares of SAM's side
    prompt_encoder, decoder = model.extractor.sam_prompt_encoder, model.extractor.sam_mask_decoder
    pixels = centre * prompt_encoder.input_image_size[0]
    point = (pixels[None, None], torch.ones(1, 1, dtype=torch.int, device=device))
    sparse, dense = prompt_encoder(points=point, boxes=None, masks=None)
    logits, quality = decoder(
        image_embeddings=encoded.vision.sam[index : index + 1],
        image_pe=prompt_encoder.get_dense_pe()[..., :side, :side],
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense[..., :side, :side],
        multimask_output=True,
    )  # (1, 3, 4h, 4w), (1, 3)
    best: Tensor = logits[:, int(quality.argmax())]  # (1, 4h, 4w)
    mask = (logits_to_original(best, geometry)[0] > 0).cpu().numpy()
    return float((mask & (target > 0)).sum() / max(1, (mask | (target > 0)).sum()))


def zero_shot_table(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means of all expressions with a target, of each kind, and of each value of their tags."""
    rows = [row for row in rows if "chance" in row]
    groups: dict[str, list[Mapping[str, Any]]] = {"all": rows}
    for row in rows:
        groups.setdefault(f"kind {row['kind']}", []).append(row)
        for tag, value in row["tags"].items():
            groups.setdefault(f"{tag} {value}", []).append(row)
    ordered = ["all", *sorted(set(groups) - {"all"})]
    return {
        name: {"count": len(groups[name]), **{key: float(np.mean([r[key] for r in groups[name]])) for key in FIGURES}}
        for name in ordered
        if groups[name]
    }


def format_zero_shot(table: Mapping[str, Mapping[str, float]]) -> str:
    """The table for a screen."""
    lines = [f"{'group':24}{'count':>7}" + "".join(f"{name:>15}" for name in FIGURES)]
    lines += [
        f"{name:24}{int(row['count']):>7}" + "".join(f"{row[key]:>15.3f}" for key in FIGURES)
        for name, row in table.items()
    ]
    return "\n".join(lines)
