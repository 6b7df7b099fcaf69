#!/usr/bin/env bash
# Check the lower bounds of setup.py: install exactly them into an environment of their own, and run the fast tests there.
#
#   bash run_scripts/test_lower_bounds.sh [--venv FOLDER] [PYTEST ARGUMENTS ...]
#
#   --venv FOLDER   make the environment there and keep it (7 GB); one that is there is brought to the bounds and reused.
#                   Without it, a temporary folder that is deleted at the end.
# Every `name>=1.2` of setup.py, extras included, is installed as `name==1.2`; what those pull in is the newest that fits.
# pip's own settings say where from: with an index of CPU builds among them, torch comes without CUDA.
# The tests run as in test.sh; `-m ""` among the arguments runs the slow ones too, and file names run only those.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV_MB=8000 # 6.7 GB when done, and what pip unpacks on the way

LEFT_OUT=(
  # They hold the environment to requirements*.txt and constraints.txt.
  tests/test_packaging.py::test_environment_holds_the_pins
  tests/test_packaging.py::test_constraints_hold_only_what_is_pulled_in
  # Bit for bit as recorded, with parts whose weights the pinned torch draws from a seed: torch 2.8 draws others.
  tests/test_released_0_1.py::test_a_checkpoint_computes_the_same
  tests/test_released_0_1.py::test_a_feature_cache_is_found_read_and_written_the_same
  tests/runners/test_released_checkpoints.py::test_an_old_training_goes_on
  # tests/devices.py needs the pinned torch; elsewhere it skips the test, here it is in a child process.
  tests/runners/test_logical_cuda.py::test_a_run_stays_on_its_device
  # On a CPU (gloo), torch 2.8 keeps the time limit that the process group was made with.
  tests/runners/test_distributed.py::test_a_lost_process_ends_the_wait_of_the_others
  # Pillow before 13 cannot read the YCbCr TIFF that it writes.
  "tests/common/test_images.py::test_modes[pillow-YCbCr]"
  "tests/common/test_images.py::test_modes[after lavis-YCbCr]"
)

if help_wanted "$@"; then exit; fi

venv=""
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --venv)
      [ $# -gt 1 ] || fail "--venv needs a folder."
      venv="$2"
      shift
      ;;
    --venv=*) venv="${1#--venv=}" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

if [ -z "$venv" ]; then
  scratch="$(mktemp -d "${TMPDIR:-/tmp}/lavis_svp_lower_bounds.XXXXXX")"
  trap 'rm -rf "$scratch"' EXIT
  venv="$scratch/venv"
elif [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
  fail "$venv is not empty, and not an environment. Name a new folder for --venv."
fi
[ "$(realpath -m "$venv")" != "$root/.venv" ] || fail "$venv is the environment of setup.sh. Name a new folder for --venv."

python="$venv/bin/python"
need_npm
if [ ! -x "$python" ]; then
  need_space "$venv" "$VENV_MB" "the packages at their lower bounds"
  make_venv "$venv"
fi

pip=("$python" -m pip install --no-input --disable-pip-version-check)
say "Installing lavis-svp itself, in place (1/3)."
"${pip[@]}" --no-deps -e "$root"
bounds="$venv/lower_bounds.txt"
"$python" - > "$bounds" << 'EOF'
import re
from importlib.metadata import requires

for line in requires("lavis-svp"):  # 'transformers<5,>=4.56', 'onnx>=1.16; extra == "zoo"'
    name, version = re.match(r"([\w.-]+)[^;]*>=([\w.]+)", line).groups()
    print(f"{name}=={version}")
EOF
say "Installing $(sort -u "$bounds" | xargs) (2/3)."
"${pip[@]}" -r "$bounds"
say "Installing LAVIS without its outdated pins (3/3)."
"${pip[@]}" --no-deps -r "$root/requirements-lavis.txt"
fetch_weights_and_photos

cd "$root"
say "Running the fast tests."
"$python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile -m "not slow" -p no:cacheprovider \
  "${LEFT_OUT[@]/#/--deselect=}" "${arguments[@]}"
