"""Where a measurement was made: software and machine, for whoever reads the numbers later."""

from __future__ import annotations

import platform


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import torch
    import transformers

    import moect

    return {
        "moect": moect.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
    }


def machine(device: str) -> dict[str, str | int]:
    """The processor, its instructions as PyTorch uses them, the threads, and the GPU where one is used."""
    import torch

    found: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["gpu bytes"] = properties.total_memory
    return found


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()  # an Arm machine gives no name there
