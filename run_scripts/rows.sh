# Sourced by ablation.sh and compare.sh: train and evaluate the YAMLs of a folder of projects/svp/, one after another.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# row_options ROW: what a script adds to a row's options; prints one or nothing. run_rows' caller may define its own.
row_options() { :; }

# run_rows KIND SUFFIX ARGS...: train the rows among ARGS (all of them without any) of projects/svp/KIND/; results go to
# output/svp/KIND/[INTO/]ROW SUFFIX[_seedN]/ below the current folder. A row that has its result is left out.
run_rows() {
  local kind="$1" suffix="$2" folder="$root/projects/svp/$1" rows=() seeds="" into="" arguments=() row seed output
  local chosen extra yaml
  shift 2
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
      --into=*) into="${1#*=}" ;;
      --into)
        [ $# -ge 2 ] || fail '--into needs a value, as in: --into crowded'
        into="$2"
        shift
        ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  case "$into" in *[!A-Za-z0-9_]*) fail "--into takes letters, digits and _, got '$into'." ;; esac
  [ $# -eq 0 ] || shift
  case "$*" in *run.output_dir=* | *run.seed=*) fail "Rows have their own output_dir; seeds are given by --seeds." ;; esac
  if [ ${#rows[@]} -eq 0 ]; then
    for yaml in "$folder"/*.yaml; do rows+=("$(basename "$yaml" .yaml)"); done
  fi

  for row in "${rows[@]}"; do
    for seed in ${seeds:-own}; do
      output="output/svp/$kind/${into:+$into/}$row$suffix" chosen=()
      if [ "$seed" != own ]; then
        whole --seeds "$seed" 0
        output+="_seed$seed" chosen=("run.seed=$seed")
      fi
      if compgen -G "$output/result/metrics_test_*.json" > /dev/null; then
        say "$output has its result."
        continue
      fi
      say "$output"
      extra="$(row_options "$row")" # a word or nothing
      [ -z "$extra" ] || chosen+=("$extra")
      bash "$root/run_scripts/train.sh" --cfg-path "$folder/$row.yaml" ${arguments[@]+"${arguments[@]}"} \
        --options "run.output_dir=$output" ${chosen[@]+"${chosen[@]}"} "$@"
    done
  done
}
