#!/usr/bin/env bash
# Segment what an expression names, with the shipped weights; prints where the resulting image is.
#
#   bash run_scripts/demo.sh
#   bash run_scripts/demo.sh [IMAGE] "EXPRESSION" [--checkpoint FILE] [--out IMAGE.png]
#
# Without an image it draws a scene of its own; without an expression it looks for "the large red square" in it.
# What train.sh made: --checkpoint output/svp/refshapes_tiny
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
[ $# -ge 1 ] || set -- "the large red square"

run segment "$@"
