"""The section of a report about routing: which tokens reach the experts, which experts they go to."""

from __future__ import annotations

from moect.monitor.reporting.experts import DEAD, OVERLOADED, Expert, odd_experts, unit_of_weight
from moect.monitor.reporting.figures import role, share_text
from moect.monitor.reporting.page.content import Block, Picture, Section, Table, Text, compact
from moect.monitor.reporting.page.measured import Measured
from moect.monitor.reporting.pictures.heat_maps import plot_by_block, plot_load, plot_open, plot_specialists

MOST_NAMED = 12  # experts of a kind


def routing(m: Measured) -> Section | None:
    """Load, entropy and gates as pictures; dead and overloaded experts by name."""
    routed = [row for row in m.last if row.get("expert_load")]
    if not routed:
        return None
    dead, overloaded = odd_experts(routed)
    gated = any(row.get("open_share") is not None for row in m.run.rows)
    gated_words = " and by the share of their tokens that reach the experts" if gated else ""
    few, many = f"less than {100 * DEAD:.0f}%", f"more than {OVERLOADED:.0f} times"
    blocks: list[Block] = [
        Text(_named("dead", dead, f"gets {few} of an even share of the assignments over all texts")),
        Text(_named("overloaded", overloaded, f"gets {many} an even share")),
        Picture(
            plot_load(routed, m.plots / "load.png"),
            f"Load of each expert over all texts, by block. {len(dead)} dead, {len(overloaded)} overloaded.",
            f"Texts weigh by their {unit_of_weight(routed)}{gated_words}. Crosses are dead experts, rings overloaded "
            "ones. Grey: no token reached the block, or it has fewer experts.",
        ),
    ]
    if max(map(len, routed[0]["expert_load"])) > 1:
        blocks.append(
            Picture(
                plot_specialists(routed, m.labels, m.plots / "specialists.png"),
                "Load of each expert by text, in the first, the middle and the last block with a module.",
                "An expert that stands out in one language's row alone has become that language's own.",
            )
        )
    if gated:
        blocks += _open_curves(m)
    panels = [("gate_by_block", "Weight of the frozen FFN")] if any(row.get("gate_by_block") for row in routed) else []
    panels += [("load_entropy", "Evenness of load (1: all alike)")]
    if any(row.get("router_entropy") for row in routed):
        panels.append(("router_entropy", "Router's uncertainty (0: it is sure)"))
    frozen = panels[0][0] == "gate_by_block"
    weight = " The weight of the frozen FFN is 1 where the experts do not matter." if frozen else ""
    blocks.append(
        Picture(
            plot_by_block(routed, panels, m.labels, m.plots / "routing.png"),
            "Heat maps of texts by blocks: " + ", ".join(title for _, title in panels) + ".",
            "Entropies are shares of their greatest value. Grey: no token of the text reached the block." + weight,
        )
    )
    if any("gate" in row for row in routed):
        blocks.append(_gate_table(m))  # last: pictures stand side by side where the page is wide
    return Section("routing", "Routing", blocks)


def _named(kind: str, experts: list[Expert], rule: str) -> str:
    if not experts:
        return f"No expert is {kind}: none {rule}."
    names = "; ".join(map(str, experts[:MOST_NAMED]))
    more = f"; and {len(experts) - MOST_NAMED} more" if len(experts) > MOST_NAMED else ""
    count = "1 expert is" if len(experts) == 1 else f"{len(experts)} experts are"
    return f"{count} {kind} ({'each ' if len(experts) > 1 else ''}{rule}): {names}{more}."


def _gate_table(m: Measured) -> Table:
    lines = [
        [
            m.labels.written(row),
            name,
            share_text(row.get("open_share"), 2),
            f"{row['gate']:.4f}" if "gate" in row else "",
        ]
        for name in ("old", "new")
        for row in role(m.last, name)
    ]
    return compact(Table(["text", "role", "tokens that pass the gate", "mean gate value"], lines, 2))


def _open_curves(m: Measured) -> list[Block]:
    if len({row["step"] for row in m.course}) < 2:
        return []
    path = plot_open(m.course, m.labels, m.plots / "open.png")
    alt = "Share of each text's tokens that the language gate lets through, by step."
    return [Picture(path, alt, "Old languages belong at the bottom, new ones at the top.")]
