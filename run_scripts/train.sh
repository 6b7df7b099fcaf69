#!/usr/bin/env bash
# Train. Without arguments: set up what is missing, train the tiny SVP model on RefShapes, evaluate it, print the
# table and write pictures.
#
#   bash run_scripts/train.sh
#   bash run_scripts/train.sh [--nproc N] --cfg-path FILE.yaml [--options KEY=VALUE ...]
#
# With arguments it is the LAVIS launch: they go to `python -m lavis_svp.train` as they are.
#   --nproc N   start N processes (one per GPU, or on the CPU); default 1
# Run again after an interruption, the same command continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch lavis_svp.train projects/svp/train/refshapes_tiny.yaml "$@"
