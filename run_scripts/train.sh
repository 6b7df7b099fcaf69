#!/usr/bin/env bash
# Train. Without arguments: set up what is missing, train the tiny SVP model on RefShapes, evaluate it, print the
# table and write images.
#
#   bash run_scripts/train.sh
#   bash run_scripts/train.sh [--nproc N] --cfg-path FILE.yaml [--options KEY=VALUE ...]
#   bash run_scripts/train.sh [--nproc N] --stages FIRST.yaml SECOND.yaml ... [--options KEY=VALUE ...]
#
# With arguments it is the LAVIS launch: they go to `python -m lavis_svp.train` as they are.
#   --nproc N   start N processes on each machine (one per GPU, or on the CPU); default 1
#   --nnodes M --master-addr HOST [--master-port P] [--node-rank R]   run the same on each of M machines
#   --launcher deepspeed [--hostfile FILE]   let DeepSpeed start the processes, on all machines of FILE
#   --stages    train one after the other, each from the weights of the one before (`python -m lavis_svp.stages`)
# Run again after an interruption, the same command continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for argument in "$@"; do
  if [ "$argument" = --stages ]; then
    if help_wanted "$@"; then exit; fi
    bash "$root/run_scripts/setup.sh"
    exec "$python" -m lavis_svp.stages --launch "bash $(printf %q "$root/run_scripts/train.sh")" "$@"
  fi
done
launch lavis_svp.train projects/svp/train/refshapes_tiny.yaml "$@"
