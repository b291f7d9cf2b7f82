#!/usr/bin/env bash
# Set up the CPU environment: a virtual environment with torch, the complete lock and this package.
#
#   environments/cpu/install.sh          PYTHON=python3.12 and VENV=DIR choose the interpreter and the folder
#
# A stamp is written last and says what the environment was made from. No stamp, or another one: made anew from nothing,
# so an interrupted set-up is never taken for a whole one. `make run` and `make test` call this first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TORCH=torch==2.13.0
LOCK=environments/cpu/requirements.txt
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

stop() { echo "set-up stopped: $*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] || stop "the pinned wheels are for Linux x86_64, this is $(uname -sm); use a container or a virtual machine"
command -v "$PYTHON" >/dev/null || stop "no '$PYTHON' here; install Python 3.11 and name it: make PYTHON=/path/to/python3.11 ..."
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || stop "'$PYTHON' does not start; name another one: make PYTHON=/path/to/python3.11 ..."
case $version in
  3.11 | 3.12 | 3.13) ;;
  *) stop "'$PYTHON' is Python $version, this needs 3.11, 3.12 or 3.13; name one: make PYTHON=python3.11 ..." ;;
esac

# What the environment depends on. It holds absolute paths, hence the folder; `pip install -e` reads pyproject.toml.
made_from="$version $PWD $VENV $TORCH $(sha256sum <"$LOCK")"
package=$(sha256sum <pyproject.toml)

exec 9>.venv.lock
flock -n 9 || { echo "another set-up of $PWD is running, waiting for it"; flock 9; }

stamp=$VENV/.made-from
if [ "$(cat "$stamp" 2>/dev/null)" = "$made_from
$package" ]; then
  exit 0
fi

quiet=()
[ -t 1 ] || quiet=(-qq) # progress bars and warnings are for people, errors are for everyone
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@" "${quiet[@]}"; }
step() { echo "[set-up $SECONDS s] $*"; }

if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$made_from" ]; then
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || stop "'$PYTHON' has no venv module; on Debian and Ubuntu: apt install python$version-venv"
  step "virtual environment $VENV with Python $version"
  # only what a set-up made is deleted: VENV may name something else by mistake
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then stop "$VENV exists and is no virtual environment; move it away"; fi
  rm -rf "$VENV"
  "$PYTHON" -m venv "$VENV"
  step "$TORCH (without a CPU build on the package index this is the CUDA build, several GB: see environments/cpu/README.md)"
  pip install "$TORCH"
  step "the lock, $(grep -c '^[a-zA-Z]' "$LOCK") packages"
  pip install --no-deps -r "$LOCK"
fi
step "this package, editable"
rm -f "$stamp"
pip install --no-deps --no-build-isolation --editable .
printf '%s\n%s\n' "$made_from" "$package" >"$stamp.new"
mv "$stamp.new" "$stamp"
step "done: $VENV"
