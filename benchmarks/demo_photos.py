"""Run the demo on photographs of RefPhotos drawn at random, and lay its images out on one sheet.

    python benchmarks/demo_photos.py --out docs/figures/demo_photos.png

Of each photograph one of the expressions that have a target is drawn. The images are those that
``bash run_scripts/demo.sh PHOTOGRAPH "EXPRESSION" --out FILE`` writes; what it prints is shown, too.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from gallery import COLOURS
from PIL import Image

from lavis_svp.cli.segment import segment
from lavis_svp.common.paths import cache_root
from lavis_svp.common.visualization import contact_sheet, save_png
from lavis_svp.datasets.refcoco import RefCOCO
from lavis_svp.datasets.refcoco_writer import images_folder, instances_path, refs_path
from lavis_svp.datasets.refphotos.build import build_refphotos

NAME = "refphotos"
COUNT, SEED = 5, 0


def draw(root: Path, count: int, seed: int) -> list[tuple[Path, str]]:
    """Photographs and an expression of each that has a target; the same for the same seed."""
    images = RefCOCO(instances_path(root, NAME), refs_path(root, NAME)).images("test")
    rng = random.Random(seed)
    chosen = rng.sample(sorted(images, key=lambda image: image.file_name), count)
    folder = images_folder(root, NAME)
    return [
        (folder / image.file_name, rng.choice([one.text for one in image.expressions if one.kind != "no_target"]))
        for image in chosen
    ]


def main() -> None:
    """Read the command line, run the demo, lay out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the image to write")
    parser.add_argument("--count", type=int, default=COUNT, help=f"photographs (default {COUNT})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the draw (default {SEED})")
    parser.add_argument("--root", type=Path, default=cache_root() / "data", help="data folder")
    args = parser.parse_args()
    build_refphotos(args.root)
    panels = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (photograph, expression) in enumerate(draw(args.root, args.count, args.seed)):
            print(f'\n{photograph.name} "{expression}"', flush=True)
            out = Path(folder) / f"{number}.png"
            segment(str(photograph), expression, None, out)
            with Image.open(out) as drawn:
                panels.append(drawn.convert("RGB"))
    print(save_png(args.out, contact_sheet(panels).quantize(COLOURS, dither=Image.Dither.NONE)))


if __name__ == "__main__":
    main()
