"""Records of a benchmark as tables that a person reads."""

from __future__ import annotations

from moect.bench.peers import PREFIX

Record = dict  # one shape, dtype and contestant: what `moect.bench.dispatch.run` returns under "results"

RIVAL = PREFIX + "grouped_mm"  # whose memory is the measure


def aligned(heading: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Columns as wide as what they hold, a rule below the heading; all but the first `left` are figures."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        justified = (c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(justified).rstrip()

    lines = [line(heading), *map(line, rows)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render_case(records: list[Record]) -> str:
    """The contestants of one shape and dtype, in the order they were given; those left out are not in it."""
    timed = [record for record in records if record["reason"] is None]
    floor = timed[0]
    rival = next((r["peak_extra_bytes"] for r in timed if r["contestant"] == RIVAL), None)
    heading = ["", "forward ms", "x floor", "forward+backward ms", "x floor", "memory MiB", f"x {RIVAL}", "rounds"]
    dense = floor["share_of_dense"] is not None
    rows = []
    for record in timed:
        name = record["contestant"] + (" (auto)" if record["auto"] else "")
        row = [name]
        for key in ("forward_ms", "forward_backward_ms"):
            row += [_milliseconds(record[key]), f"{record[key] / floor[key]:.2f}"]
        memory = record["peak_extra_bytes"]
        row += ["" if memory is None else f"{memory / 2**20:.1f}", _ratio(memory, rival), str(record["rounds"])]
        rows.append(row + ([f"{100 * record['share_of_dense']:.0f}%"] if dense else []))
    return aligned(heading + (["of dense"] if dense else []), rows)


def render_closing(cases: list[list[Record]]) -> str:
    """A line a case: the backend that `auto` takes, against the floor and the best of transformers."""
    heading = ["T,D,F,E,K", "dtype", "auto", "x floor", "best of hf", "x best of hf", f"memory x {RIVAL}"]
    rows = []
    for records in cases:
        timed = {r["contestant"]: r for r in records if r["reason"] is None}
        floor = records[0]
        row = [",".join(map(str, floor["shape"].values())), floor["dtype"]]
        ours = next((r for r in timed.values() if r["auto"]), None)
        best = min((r for r in timed.values() if r["kind"] == "transformers"), key=_both)
        if ours is None:
            row += ["not timed", "", best["contestant"], "", ""]
        else:
            memory = _ratio(ours["peak_extra_bytes"], timed.get(RIVAL, {}).get("peak_extra_bytes"))
            row += [ours["contestant"], f"{_both(ours) / _both(floor):.2f}"]
            row += [best["contestant"], f"{_both(ours) / _both(best):.2f}", memory]
        rows.append(row)
    return aligned(heading, rows, left=3)


def _both(record: Record) -> float:
    return record["forward_backward_ms"]


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: int | None, base: int | None) -> str:
    return "" if value is None or not base else f"{value / base:.2f}"
