#!/usr/bin/env bash
# Train and evaluate the ablation of SVP, one row after another: the YAMLs of projects/svp/ablation/.
#
#   bash run_scripts/ablation.sh [ROW ...] [--seeds "42 43"] [--nproc N] [--options KEY=VALUE ...]
#
# A ROW is the name of a YAML; without any, all of them are run. What else is given goes to train.sh with every row.
# Results go to output/svp/ablation/ROW/ below the current folder, with --seeds to ROW_seed42/ and so on. A row that has
# its result is left out, an interrupted one goes on: the same command again continues. A row that fails ends the script.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi
folder="$root/projects/svp/ablation"
rows=() seeds="" arguments=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
  [ -f "$folder/$1.yaml" ] || fail "There is no row '$1'. Rows:" "$(cd "$folder" && printf '  %s\n' *.yaml)"
  rows+=("$1")
  shift
done
while [ $# -gt 0 ] && [ "$1" != --options ]; do
  case "$1" in
    --cfg-path | --cfg-path=*) fail "Name a row in place of --cfg-path." ;;
    --seeds=*) seeds="${1#*=}" ;;
    --seeds)
      [ $# -ge 2 ] || fail '--seeds needs a value, as in: --seeds "42 43"'
      seeds="$2"
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
case "$*" in *run.output_dir=* | *run.seed=*) fail "Rows have their own output_dir; seeds are given by --seeds." ;; esac
if [ ${#rows[@]} -eq 0 ]; then
  for yaml in "$folder"/*.yaml; do rows+=("$(basename "$yaml" .yaml)"); done
fi

for row in "${rows[@]}"; do
  for seed in ${seeds:-own}; do
    output="output/svp/ablation/$row" chosen=()
    if [ "$seed" != own ]; then
      whole --seeds "$seed" 0
      output+="_seed$seed" chosen=("run.seed=$seed")
    fi
    if compgen -G "$output/result/metrics_test_*.json" > /dev/null; then
      say "$output has its result."
      continue
    fi
    say "$output"
    bash "$root/run_scripts/train.sh" --cfg-path "$folder/$row.yaml" ${arguments[@]+"${arguments[@]}"} \
      --options "run.output_dir=$output" ${chosen[@]+"${chosen[@]}"} "$@"
  done
done
