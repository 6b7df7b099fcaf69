#!/usr/bin/env bash
# Check and time everything on this machine's GPU in less than 15 minutes; the JSON at the end belongs to a bug report.
#
#   bash run_scripts/gpu_check.sh [--device cuda:0] [--only SECTION ...] [--out FILE.json]
#
# `--device cpu` runs all of it at small size, without a GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi

bash "$root/run_scripts/setup.sh"
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
