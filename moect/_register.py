"""Make our models and expert kernels known to transformers, whichever of the two packages is imported first.

transformers keeps its registries in modules that it loads on demand. Where one is loaded already, registering is a
call. Where it is not, a finder in front of `sys.meta_path` waits for it and registers once it has run, so that
`import moect` itself loads nothing.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


def register() -> None:
    """Register with transformers' registries now, or as they are imported; a second call changes nothing."""
    for name, action in _ACTIONS.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            action(module)
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Finds the registry modules where Python would, and runs our action after their own code."""

    def find_spec(self, name, path, target=None):
        if name not in _ACTIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_then_register(module):
            exec_module(module)
            _ACTIONS[name](module)

        spec.loader.exec_module = exec_then_register
        return spec


def _register_config(configuration_auto) -> None:
    from moect.model.configuration_moect import MoectConfig

    configuration_auto.AutoConfig.register(MoectConfig.model_type, MoectConfig, exist_ok=True)


def _register_model(modeling_auto) -> None:
    from moect.model.configuration_moect import MoectConfig
    from moect.model.modeling_moect import MoectForCausalLM, MoectModel

    modeling_auto.AutoModel.register(MoectConfig, MoectModel, exist_ok=True)
    modeling_auto.AutoModelForCausalLM.register(MoectConfig, MoectForCausalLM, exist_ok=True)


def _register_experts(moe) -> None:
    from moect.dispatch.transformers_experts import NAME, moect_experts_forward

    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, moect_experts_forward)


_ACTIONS = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.integrations.moe": _register_experts,
}
