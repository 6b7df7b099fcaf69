"""Write the tables of docs/plan.md from plans that are made anew.

    python benchmarks/plan_tables.py         rewrite both blocks
    python benchmarks/plan_tables.py check   exit code 1 if the document differs

Nothing is measured: the numbers follow from the YAMLs and the code, the same on every machine.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lavis_svp.plan.estimate import Assumptions, Plan, make_plan
from lavis_svp.plan.gpus import get_gpu
from lavis_svp.plan.report import markdown
from lavis_svp.plan.settings import from_model_type

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "plan.md"
EXAMPLE = "refcoco_vicuna7b"
TYPES = (
    "pretrain_vicuna7b",
    "refcoco_vicuna7b",
    "glamm_vicuna7b",
    "glamm_dinov2_vicuna7b",
    "refcoco_qwen2_5_7b",
    "refcoco_llama3_8b",
)
GPU, COUNT = "a100-80g", 8


def plan_of(model_type: str) -> Plan:
    """The plan of a type under GLaMM's recipe."""
    return make_plan(*from_model_type(model_type), get_gpu(GPU), COUNT, Assumptions())


def example() -> str:
    """The whole plan of the paper's second stage."""
    return markdown(plan_of(EXAMPLE))


def overview() -> str:
    """A line for each full-scale type."""
    lines = ["| type | tokens | parameters | that train | TFLOP a training image | GB a GPU | steps | hours |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in TYPES:
        plan = plan_of(name)
        time, peak = plan.duration, plan.memory.peak
        whole, cost = plan.parameters["whole model"], sum(part.training for part in plan.costs.values())
        lines.append(
            f"| `{name}` | {plan.tokens} | {whole.total / 1e9:.3f} G | {whole.trained / 1e6:.1f} M "
            f"| {cost / 1e12:.1f} | {peak / 1e9:.1f} | {time.steps:,} | {time.hours:.1f} |"
        )
    return "\n".join(lines)


def block(name: str) -> str:
    """What stands in the document between the markers of a block."""
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)\n<!-- {name}:end -->", DOCUMENT.read_text(), re.DOTALL)
    if not found:
        raise ValueError(f"{DOCUMENT} lacks the markers of the block '{name}'.")
    return found[1]


def main() -> None:
    """Rewrite the document, or compare it."""
    text = DOCUMENT.read_text()
    fresh = text
    for name, content in (("example", example()), ("overview", overview())):
        begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
        fresh = fresh.replace(f"{begin}{block(name)}{end}", f"{begin}{content}{end}")
    if sys.argv[1:] == ["check"]:
        sys.exit(0 if fresh == text else "docs/plan.md differs: run python benchmarks/plan_tables.py")
    DOCUMENT.write_text(fresh)


if __name__ == "__main__":
    main()
