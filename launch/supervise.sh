#!/usr/bin/env bash
# A run on several nodes that goes on when one is lost: the same command on every node, from the checkout.
#     bash launch/supervise.sh --config configs/X.yaml [section.key=value …]          --help lists the options
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
[ ! -f "$root/.venv/bin/activate" ] || source "$root/.venv/bin/activate"
command -v deepspeed >/dev/null || {
    echo "supervise: error: no deepspeed here; set the checkout up first, with bash launch/test.sh" >&2
    exit 2
}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m moect.launch "$@"
