#!/usr/bin/env bash
# Train. Without arguments: set up what is missing, train the tiny SVP model on RefShapes, evaluate it, print the
# table and write images. Once set up, that takes 21 minutes on two otherwise idle CPU cores.
#
#   bash run_scripts/train.sh
#   bash run_scripts/train.sh [--nproc N] --cfg-path FILE.yaml [--options KEY=VALUE ...]
#   bash run_scripts/train.sh [--nproc N] --stages FIRST.yaml SECOND.yaml ... [--options KEY=VALUE ...]
#
# Arguments go to `lavis-svp train`; `lavis-svp train --help` explains all of them.
#   --nproc N   start N processes on each machine (one per GPU, or on the CPU); default 1
#   --nnodes M --master-addr HOST [--master-port P] [--node-rank R]   run the same on each of M machines
#   --launcher deepspeed [--hostfile FILE]   let DeepSpeed start the processes, on all machines of FILE
#   --stages    train one after the other, each from the weights of the one before
# Run again after an interruption, the same command continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
if ! given --cfg-path "$@" && ! given --stages "$@"; then
  cd "$root"
  set -- --cfg-path projects/svp/train/refshapes_tiny.yaml "$@"
fi
run train "$@"
