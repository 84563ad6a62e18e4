#!/usr/bin/env bash
# The study of docs/study.md: methods on real text, each at its own learning rate, with several seeds; goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$MOECT_ROOT"
exec moect study configs/study/study.yaml "$@"
