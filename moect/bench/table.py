"""Records of a benchmark as tables that a person reads."""

from __future__ import annotations

from moect.bench.peers import IMPLEMENTATIONS, PREFIX
from moect.tables import aligned

Record = dict  # one shape, dtype and contestant: what `moect.bench.dispatch.run` returns under "results"

RIVAL = PREFIX + "grouped_mm"  # whose memory is the measure
MEMORY_HEADINGS = [f"memory x {RIVAL}", f"beyond results x {RIVAL}"]
BELOW_CLOSING = f"best of hf: the fastest of {', '.join(IMPLEMENTATIONS)}"


def render_case(records: list[Record], dense: bool) -> str:
    """The contestants of one shape and dtype, in the order they were given; those left out are not in it.

    Args:
        dense: with a column of shares of the dense rate; it is empty in dtypes whose rate that is not.
    """
    timed = [record for record in records if record["reason"] is None]
    floor = timed[0]
    rival = next((r for r in timed if r["contestant"] == RIVAL), None)
    heading = ["", "forward ms", "x floor", "forward+backward ms", "x floor", "memory MiB"]
    heading += [f"x {RIVAL}", MEMORY_HEADINGS[1], "rounds"]
    rows = []
    for record in timed:
        name = record["contestant"] + (" (auto)" if record["auto"] else "")
        row = [name]
        for key in ("forward_ms", "forward_backward_ms"):
            row += [_milliseconds(record[key]), f"{record[key] / floor[key]:.2f}"]
        memory = record["peak_extra_bytes"]
        row += ["" if memory is None else f"{memory / 2**20:.1f}", *_memory_ratios(record, rival)]
        share = record["share_of_dense"]
        row += [str(record["rounds"]), "" if share is None else f"{100 * share:.0f}%"]
        rows.append(row if dense else row[:-1])
    return aligned(heading + (["f+b of dense"] if dense else []), rows)


def render_closing(cases: list[list[Record]]) -> str:
    """A line a case: the backend that `auto` takes, against the floor and the best of transformers."""
    heading = ["T,D,F,E,K", "dtype", "auto", "x floor", "best of hf", "x best of hf", *MEMORY_HEADINGS]
    rows = []
    for records in cases:
        timed = {r["contestant"]: r for r in records if r["reason"] is None}
        floor = records[0]
        row = [",".join(map(str, floor["shape"].values())), floor["dtype"]]
        ours = next((r for r in timed.values() if r["auto"]), None)
        best = min((r for r in timed.values() if r["kind"] == "transformers"), key=_both)
        if ours is None:
            row += ["not timed", "", best["contestant"], "", "", ""]
        else:
            row += [ours["contestant"], f"{_both(ours) / _both(floor):.2f}"]
            row += [best["contestant"], f"{_both(ours) / _both(best):.2f}", *_memory_ratios(ours, timed.get(RIVAL))]
        rows.append(row)
    return aligned(heading, rows, left=3)


def _both(record: Record) -> float:
    return record["forward_backward_ms"]


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _memory_ratios(record: Record, rival: Record | None) -> list[str]:
    """Peak memory against the rival's: all of it, and what is beyond the results, which both have to hold."""
    if rival is None or None in (record["peak_extra_bytes"], rival["peak_extra_bytes"]):
        return ["", ""]
    pairs = [[r["peak_extra_bytes"] - results for r in (record, rival)] for results in (0, record["result_bytes"])]
    return [f"{ours / theirs:.2f}" if theirs > 0 else "" for ours, theirs in pairs]
