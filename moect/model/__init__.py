"""The appended module, and nothing about training.

from moect.model import MoeConfig, append_moe, remove_moe, base_only, ForwardRecord
"""

from moect.model.append import append_moe, base_only, is_appended, module_state, modules_of, remove_moe
from moect.model.record import ForwardRecord
from moect.moe_config import MoeConfig

__all__ = [
    "ForwardRecord",
    "MoeConfig",
    "append_moe",
    "base_only",
    "is_appended",
    "module_state",
    "modules_of",
    "remove_moe",
]
