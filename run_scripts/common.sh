# Sourced by the other scripts: where things are, how to speak, how to run a command. Sets `root` and `python`.
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

# given NAME ARGS...: whether an option NAME, or NAME=..., is among the arguments.
given() {
  local name="$1" argument
  shift
  for argument in "$@"; do
    case "$argument" in "$name" | "$name"=*) return 0 ;; esac
  done
  return 1
}

# run COMMAND ARGS...: set up what is missing, then become `lavis-svp COMMAND ARGS`.
run() {
  bash "$root/run_scripts/setup.sh"
  exec "$python" -m lavis_svp.cli "$@"
}
