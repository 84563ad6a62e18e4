"""moect: teach a pretrained language model new languages by an appended mixture of experts.

Importing it is cheap (neither torch nor transformers is loaded) and makes exported models known to transformers:

    import moect
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("runs/NAME/export")
    model = moect.load("BASE", "runs/NAME/adapter")   # a base and what was trained for it
"""

import importlib

from moect._register import register

__version__ = "0.1.0"

register()


def __getattr__(name: str):  # moect.append_moe and the like, without importing torch for everybody
    if name.startswith("_"):
        raise AttributeError(f"module 'moect' has no attribute {name!r}")
    if name == "load":
        return importlib.import_module("moect.export.adapter").load
    model = importlib.import_module("moect.model")
    if name not in model.__all__:
        raise AttributeError(f"module 'moect' has no attribute {name!r}")
    return getattr(model, name)
