"""Which targets there are, what each says to a model, and which is the best."""

from __future__ import annotations

from moect.errors import ExportError
from moect.export.targets.base_form import BaseForm
from moect.export.targets.form import Subject, Support, Target
from moect.export.targets.glm4_moe import Glm4Moe
from moect.export.targets.granitemoeshared import GraniteMoeShared
from moect.export.targets.mixtral import Mixtral
from moect.export.targets.own import Own
from moect.export.targets.qwen2_moe import Qwen2Moe
from moect.export.targets.qwen3_moe import Qwen3Moe

# the best first: stock architectures, which engines serve without code of ours
TARGETS: tuple[Target, ...] = (
    *(Glm4Moe(), Qwen2Moe(), GraniteMoeShared(), Mixtral(), Qwen3Moe()),
    *(Own(), BaseForm()),
)
NAMES = tuple(target.name for target in TARGETS)


def answers(subject: Subject) -> dict[str, Support]:
    """What each target says, by its name."""
    return {target.name: target.supports(subject) for target in TARGETS}


def choose(name: str, subject: Subject) -> Target:
    """The target of that name; of `auto` the best.

    Raises:
        ExportError: it cannot hold the model; says why, and which can.
    """
    supports = answers(subject)
    can = [target for target in TARGETS if supports[target.name].reason is None]
    if name == "auto":
        return min(can, key=lambda target: (isinstance(target, Own), not supports[target.name].bitwise))
    target = next((t for t in TARGETS if t.name == name), None)
    others = ", ".join(t.name for t in can)
    if target is None:
        raise ExportError(f"export target {name}: there is no such target; this model can be written as {others}")
    if reason := supports[name].reason:
        raise ExportError(f"export target {name}: {reason}; this model can be written as {others}")
    return target


def describe(subject: Subject, name: str = "auto") -> list[str]:
    """What will be written, and what each target answers, for people; those of one answer in one line.

    Raises:
        ExportError: the target of that name cannot hold the model.
    """
    chosen, lines, refused = choose(name, subject), [], {}
    for target, support in answers(subject).items():
        if support.reason:
            if target != BaseForm.name:  # says nothing that the others do not
                refused.setdefault(support.reason, []).append(target)
            continue
        lines.append(f"{target}: {'bit for bit' if support.bitwise else 'to rounding'}")
        if target == chosen.name:
            lines.insert(0, f"as {lines.pop()}{f'; {support.note}' if support.note else ''}")
    return [*lines, *(f"not {', '.join(targets)}: {reason}" for reason, targets in refused.items())]
