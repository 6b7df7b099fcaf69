#!/usr/bin/env bash
# Train and evaluate the ablation of SVP, one row after another: the YAMLs of projects/svp/ablation/.
#
#   bash run_scripts/ablation.sh [ROW ...] [--seeds "42 43"] [--nproc N] [--into NAME] [--options KEY=VALUE ...]
#
# A ROW is the name of a YAML; without any, all of them are run. Other arguments go to `lavis-svp train` with every row.
# Results go to output/svp/ablation/[NAME/]ROW/ below the current folder, with --seeds to ROW_seed42/ and so on; --into
# keeps rows with other --options apart. A row that has its result is left out, an interrupted one goes on: the same command
# again continues. A row that fails ends the script.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
run ablation "$@"
