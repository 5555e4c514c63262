#!/usr/bin/env bash
# Check this package on a GPU: every kernel against float64, then speed beside flash attention. At most eight minutes on
# one H100-class card, no network; prints the first failures, a table, and writes $OUT/gpu_check.json (out/ without OUT).
#
#   bash scripts/gpu_check.sh [--out FILE] [--seconds N] [--parts LIST] [--only TEXT] [--commit HASH] ...
#
# Results that are kept: --out model_cards/results/gpu_check.json. The status is 1 if anything was wrong. Without a GPU
# the share of Triton's interpreter runs, in three minutes. It takes PYTHON, else .venv, else python3; that Python needs
# torch and Triton.
#
# Where transformers there is older than what setup.cfg asks for and nothing can be fetched, wheels travel along. On a
# machine with network:
#
#   bash scripts/gpu_check.sh --wheels [3.12]      # the Python version of the machine with the GPU
#
# puts them into .gpu_wheels, 13 MB, which git ignores: copy it with the checkout. There the script installs it into
# .gpu_site, for this run alone, over whatever is there. SmolLM2's weights are 90 MB and do not travel; without them a
# random model of its shape is timed. Where git does not travel, say what is checked: --commit "$(git rev-parse HEAD)".
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=.gpu_wheels site=.gpu_site
python="${PYTHON:-}"
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi

if [ "${1:-}" = --wheels ]; then
    rm -rf "$wheels"
    platforms=()
    for number in 28 27 17; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
    # Versions as tested; what these ask for (numpy, tokenizers, safetensors, ...) comes with PyTorch images.
    pins=$(grep -E '^(transformers|gguf)==' scripts/constraints.txt)
    # shellcheck disable=SC2086
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version "${2:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 -d "$wheels" $pins
    ls -l "$wheels"
    exit
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
paths="$PWD"
if compgen -G "$wheels/*.whl" >/dev/null; then
    rm -rf "$site"
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$wheels"/*.whl
    paths="$PWD/$site:$paths"
fi
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m distattn_hf.benchmark.gpu_check "$@"
