#!/usr/bin/env bash
# Set up what is missing, then check the code (ruff, mypy) and run the tests.
#
#   bash run_scripts/test.sh [--all] [PYTEST ARGUMENTS ...]
#
#   --all   the slow tests too
# The tests run in up to 4 processes, a file in one of them; `-n 0` runs them in a single one (for --pdb and -s).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if help_wanted "$@"; then exit; fi

marks="not slow"
command=("$python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile)
for argument in "$@"; do
  if [ "$argument" = --all ]; then marks=""; else command+=("$argument"); fi
done

bash "$root/run_scripts/setup.sh"
cd "$root"

# quietly NAME COMMAND...: show the output only when the command fails.
quietly() {
  local name="$1" output
  shift
  output="$("$@" 2>&1)" || fail "$name found faults:" "$output"
  say "$name: nothing to complain about."
}
quietly "ruff check" "$python" -m ruff check .
quietly "ruff format" "$python" -m ruff format --check .
quietly "mypy" "$python" -m mypy

exec "${command[@]}" -m "$marks"
