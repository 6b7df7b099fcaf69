#!/usr/bin/env bash
# Segment what an expression names, with the shipped weights; writes an image.
#
#   bash run_scripts/demo.sh [IMAGE] "EXPRESSION" [--checkpoint FILE] [--out IMAGE.png]
#
# Without an image it draws a scene of its own. What train.sh made: --checkpoint output/svp/refshapes_tiny
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
[ $# -ge 1 ] || fail "An expression is missing." "See: bash run_scripts/demo.sh --help"

run segment "$@"
