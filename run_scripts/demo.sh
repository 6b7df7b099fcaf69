#!/usr/bin/env bash
# Segment what an expression names, with the newest checkpoint that train.sh made; writes a picture.
#
#   bash run_scripts/demo.sh [IMAGE] "EXPRESSION"
#
# Without an image it takes one of the built-in pictures.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
[ $# -ge 1 ] || fail "An expression is missing." "See: bash run_scripts/demo.sh --help"

bash "$root/run_scripts/setup.sh"
exec "$python" -m lavis_svp.demo "$@"
