"""`moect export` on the screen: what it found, what it wrote, what to do next."""

from __future__ import annotations

from pathlib import Path

from moect.errors import ExportError


def run(run_folder: Path, options: dict, adapter: bool, push_to: str | None, public: bool) -> None:
    """Export, tell of it, and push where asked.

    Args:
        run_folder: the run's folder.
        options: fields of `ExportOptions`.
        adapter: write what was trained alone.
        push_to: `ORGANISATION/NAME` on the hub.
        public: of a repository that is made now.

    Raises:
        MoectError: whatever the user can put right.
    """
    from moect.export.push import check_name, push

    if push_to:
        check_name(push_to)
    elif public:
        raise ExportError("--public says nothing without --push ORGANISATION/NAME")
    folder = (_export_adapter if adapter else _export)(Path(run_folder), options)
    print(f"wrote {folder}")
    if push_to:
        print(f"pushed to {push(folder, push_to, public)}")


def _export(run_folder: Path, options: dict) -> Path:
    from moect.export.run import ExportOptions, export_run

    if options["pickle"] and not options["instruct"]:
        raise ExportError("--pickle says nothing without --instruct-delta: a base is read from safetensors only")
    export = export_run(run_folder, ExportOptions(**options))
    print(f"target    {export.target}")
    print(f"verified  {export.comparison.sentence() if export.comparison else 'no (--no-verify), its files only'}")
    return export.folder


def _export_adapter(run_folder: Path, options: dict) -> Path:
    from moect.export.adapter import write_adapter
    from moect.export.source import open_run

    names = {"target": "--target", "instruct": "--instruct-delta", "pickle": "--pickle"}
    unused = [flag for name, flag in names.items() if options[name]] + ["--no-verify"] * (not options["verify"])
    if unused:
        raise ExportError(f"--adapter: {' and '.join(unused)} say nothing for it; leave them out")
    folder = Path(options["output"] or run_folder / "adapter")
    write_adapter(open_run(run_folder, options["checkpoint"], options["dtype"]), folder)
    return folder
