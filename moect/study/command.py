"""`moect study`: run a study, or say what is left, or write what it came to."""

from __future__ import annotations

from pathlib import Path

from moect.study.page import fill_page
from moect.study.plan import Study
from moect.study.results import collect, read_results, write_results
from moect.study.runner import Runner


def run(
    file: Path,
    at_once: int | None,
    only: list[str],
    listing: bool,
    known: Path | None,
    results: Path | None,
    page: Path | None,
) -> None:
    """Do what the command line says.

    Args:
        file: the study's.
        at_once: runs side by side; None: see `Runner`.
        only: patterns of runs; empty: all.
        listing: only say what can be run now.
        known: results whose runs need not be run again.
        results: only write the results there, beside those that are there already of the same runs.
        page: only fill this page, from the `known` results, or those beside it.
    """
    earlier = [path for path in (results, known) if path and (path == known or path.exists())]
    records = [record for path in earlier for record in read_results(path)["runs"]]
    study = Study(file, records)
    if results:
        found = collect(study)
        write_results(found, results)
        kept = {(run["name"], run["made_of"]) for run in found["runs"]}
        lost = len({record["name"] for record in records if (record["name"], record["made_of"]) not in kept})
        told = f"; left out {lost} that this study does not have, or has with other values" * bool(lost)
        print(f"wrote {results}: {len(found['runs'])} runs{told}")
    elif page:
        for path in fill_page(page, read_results(known or page.with_suffix(".json"))):
            print(f"wrote {path}")
    elif listing:
        print(*(f"{job.kind:<8} {job.name}" for job in Runner(study, at_once, only).jobs()), sep="\n")
    else:
        Runner(study, at_once, only).go()
