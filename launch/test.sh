#!/usr/bin/env bash
# From nothing to a green test suite: linting, formatting, tests. Arguments go on to pytest:
# Two tests run side by side; `-n 0` runs them one by one.
#   bash launch/test.sh -k resume          bash launch/test.sh -m slow          bash launch/test.sh -n 0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
cd "$MOECT_ROOT"

# One thread: sums in a fixed order, so that tests may compare bits. No network, whatever is configured.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
nvidia-smi -L >/dev/null 2>&1 || export DS_ACCELERATOR=cpu

ruff check .
ruff format --check .
exec python -m pytest -m "not slow" -n 2 "$@"
