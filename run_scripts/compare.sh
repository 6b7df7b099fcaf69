#!/usr/bin/env bash
# Train and evaluate the comparison of projectors, one row after another: the YAMLs of projects/svp/comparison/.
#
#   bash run_scripts/compare.sh [ROW ...] [--seeds "42 43 44"] [--budget steps|time] [--into NAME] \
#     [--options KEY=VALUE ...]
#
# --budget steps (the default): every row trains as many steps as its YAML says. --budget time: as many as `svp` would take
# the time for, by the step times measured side by side in benchmarks/results/step_times.json; so the number is the same on any
# machine. Results go to output/svp/comparison/[NAME/]ROW_BUDGET[_seedN]/; benchmarks/comparison.py makes
# benchmarks/reports/comparison.md of them. A row that has its result is left out, an interrupted one goes on: the same command again
# continues. --into keeps rows with other --options apart.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
run compare "$@"
