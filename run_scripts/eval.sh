#!/usr/bin/env bash
# Evaluate a trained model: the table, one JSON line per expression, and images.
#
#   bash run_scripts/eval.sh
#   bash run_scripts/eval.sh [--nproc N] [--cfg-path FILE.yaml] [--checkpoint FILE] [--options KEY=VALUE ...]
#
# Without arguments: the shipped weights on RefShapes' test split. What train.sh made: --checkpoint output/svp/refshapes_tiny
# Arguments go to `lavis-svp evaluate`; `lavis-svp evaluate --help` explains all of them.
#   --nproc N   start N processes on each machine (one per GPU, or on the CPU); default 1
#   --nnodes M --master-addr HOST [--master-port P] [--node-rank R]   run the same on each of M machines
#   --launcher deepspeed [--hostfile FILE]   let DeepSpeed start the processes, on all machines of FILE
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
if ! given --cfg-path "$@" && ! given --checkpoint "$@"; then
  cd "$root"
  set -- --cfg-path projects/svp/eval/refshapes_seg_tiny.yaml "$@"
fi
run evaluate "$@"
