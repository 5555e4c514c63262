#!/usr/bin/env bash
# bash scripts/check_release.sh [FOLDER]
# Builds sdist and wheel of the last commit, checks them by twine, installs the wheel alone in a new environment, and uses
# it where no clone is: check, convert, load, push to a Hub on the loopback interface and load from it, configs by name,
# experiments. FOLDER: keeps what was built. Ten minutes on two cores, most of them for downloads; leaves nothing else.
set -euo pipefail
keep="${1:-}"
case "$keep" in "" | /*) ;; *) keep="$PWD/$keep" ;; esac
cd "$(dirname "$0")/.."
here="$(mktemp -d)"
trap 'rm -rf "$here"' EXIT
python="${PYTHON:-python3}"
quiet() { "$@" > "$here/log" 2>&1 || { cat "$here/log" >&2; echo "FAILED: $*" >&2; exit 1; }; }
say() { echo "== $*"; }

say "build and twine check"
"$python" -m venv "$here/builder"
quiet "$here/builder/bin/python" -m pip install -q --disable-pip-version-check build twine
mkdir "$here/source"
git archive HEAD | tar x -C "$here/source"
quiet "$here/builder/bin/python" -m build --outdir "$here/dist" "$here/source"
"$here/builder/bin/twine" check --strict "$here"/dist/*
[ -z "$keep" ] || { mkdir -p "$keep" && cp "$here"/dist/* "$keep"; }

say "the wheel alone in a new environment"
"$python" -m venv "$here/clean"
bin="$here/clean/bin"
# torch first and pinned, as in scripts/setup.sh; then the wheel with whatever it says it needs.
quiet "$bin/python" -m pip install -q --disable-pip-version-check -c scripts/constraints.txt torch
quiet "$bin/python" -m pip install -q --disable-pip-version-check "$here"/dist/*.whl
cp tests/hub/endpoint.py scripts/use_release.py "$here"
mkdir "$here/elsewhere"
cd "$here/elsewhere"
unset PYTHONPATH
PATH="$bin:$PATH" TOKENIZERS_PARALLELISM=false "$bin/python" "$here/use_release.py" "$here/endpoint.py"
say "all is well"
