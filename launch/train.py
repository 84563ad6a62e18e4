"""Train or resume a run; the same as `moect train`.

deepspeed launch/train.py --config configs/X.yaml [section.key=value …]
python launch/train.py --config configs/X.yaml [section.key=value …]        one process
"""

from __future__ import annotations

import sys

from moect.cli import process

if __name__ == "__main__":
    process(["train", *sys.argv[1:]])
