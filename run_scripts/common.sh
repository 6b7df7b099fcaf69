# Sourced by the other scripts: where things are, how to speak, how to launch. Sets `root` and `python`.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

say() { printf '[lavis-svp] %s\n' "$*"; }

# fail MESSAGE...: one line per argument, on standard error; ends the script.
fail() {
  printf '[lavis-svp] %s\n' "$@" >&2
  exit 1
}

# help_wanted ARGS...: if -h or --help is among the arguments, print the comment at the top of the running script.
help_wanted() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help)
        sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$0"
        return 0
        ;;
    esac
  done
  return 1
}

# launch MODULE DEFAULT_YAML ARGS...: set up, then become `python -m MODULE ARGS`, in N processes with --nproc N.
# Paths among ARGS are the caller's; the default run works in the clone, so that its output/ is found there again.
launch() {
  local module="$1" yaml="$2" processes=1 arguments=()
  shift 2
  if help_wanted "$@"; then exit; fi
  while [ $# -gt 0 ]; do
    case "$1" in
      --nproc)
        [ $# -ge 2 ] || fail "--nproc needs a number, as in: --nproc 2"
        processes="$2"
        shift
        ;;
      --nproc=*) processes="${1#--nproc=}" ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  [[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--nproc must be a whole number from 1 on, got '$processes'."
  if [ ${#arguments[@]} -eq 0 ]; then
    cd "$root" || exit
    arguments=(--cfg-path "$yaml")
  fi

  bash "$root/run_scripts/setup.sh"
  if [ "$processes" -eq 1 ]; then
    exec "$python" -m "$module" "${arguments[@]}"
  fi
  exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" -m "$module" "${arguments[@]}"
}
