#!/usr/bin/env bash
# Segment what an expression names, with the shipped weights; prints where the resulting image is.
#
#   bash run_scripts/demo.sh
#   bash run_scripts/demo.sh [IMAGE] "EXPRESSION" [--checkpoint FILE] [--out IMAGE.png]
#
# Without an image it takes a photograph of a cat; without an expression it looks for "the cat" in it.
# The shipped model of drawn shapes: "the large red square" --model-type tiny
# What train.sh made: --checkpoint output/svp/refshapes_tiny
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
[ $# -ge 1 ] || set -- "the cat"

run segment "$@"
