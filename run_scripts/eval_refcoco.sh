#!/usr/bin/env bash
# Evaluate one checkpoint on all eight splits: RefCOCO and RefCOCO+ val, testA, testB; RefCOCOg val, test.
#
#   SVP_DATA=/absolute/folder bash run_scripts/eval_refcoco.sh --checkpoint FILE [--nproc N] [--options KEY=VALUE ...]
#
# SVP_DATA is the folder that holds refcoco/, refcoco+/ and refcocog/. Results go to output/svp/eval/<data set>_<split>/
# below the current folder. The YAMLs are projects/svp/eval/refcoco*_tiny.yaml; another model is chosen by options and, if
# its image has another size, IMAGE_SIZE:
#   IMAGE_SIZE=1024 bash run_scripts/eval_refcoco.sh --checkpoint FILE --options model.model_type=refcoco_vicuna7b
# A split that fails ends the script; SPLITS="refcoco:testB refcocog:test" does only these.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ALL="refcoco:val refcoco:testA refcoco:testB refcoco_plus:val refcoco_plus:testA refcoco_plus:testB refcocog:val refcocog:test"

if help_wanted "$@"; then exit; fi
arguments=()
while [ $# -gt 0 ] && [ "$1" != --options ]; do
  arguments+=("$1")
  shift
done
[ $# -eq 0 ] || shift

for split in ${SPLITS:-$ALL}; do
  name="${split%%:*}" type="${split#*:}"
  yaml="$root/projects/svp/eval/${name}_tiny.yaml"
  [ -f "$yaml" ] || fail "SPLITS: there is no data set '$name'. A split is one of: $ALL"
  chosen=("datasets.${name}_seg.type=$type")
  [ -z "${IMAGE_SIZE:-}" ] || chosen+=("datasets.${name}_seg.vis_processor.eval.image_size=$IMAGE_SIZE")
  say "$name $type"
  bash "$root/run_scripts/eval.sh" --cfg-path "$yaml" ${arguments[@]+"${arguments[@]}"} \
    --options "${chosen[@]}" "$@"
done
