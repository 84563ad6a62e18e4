#!/usr/bin/env bash
# From nothing to a trained, measured, resumed and exported model, on a laptop CPU, in minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec python "$MOECT_ROOT/launch/quickstart.py" "$@"
