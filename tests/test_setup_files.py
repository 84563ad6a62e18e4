"""What a checkout promises about itself: its pins, its scripts, its top level."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    *("setup.py", "README.md", "LICENSE", "constraints.txt", "pyproject.toml", "MANIFEST.in"),
    *("moect", "configs", "launch", "tests", "docs"),
}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line).groups()
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


@pytest.fixture
def setup_arguments(monkeypatch) -> dict:
    caught = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return caught


def direct_requirements(setup_arguments: dict) -> list[Requirement]:
    extras = [line for lines in setup_arguments["extras_require"].values() for line in lines]
    return [Requirement(line) for line in setup_arguments["install_requires"] + extras]


def test_every_requirement_is_pinned_within_its_range(setup_arguments, pins):
    requirements = direct_requirements(setup_arguments)
    assert len(requirements) > 14
    for requirement in requirements:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_everything_that_a_requirement_needs_is_pinned_too(setup_arguments, pins):
    waiting, seen = direct_requirements(setup_arguments), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras := frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, extras))
        assert name in pins, f"{requirement} is not in constraints.txt"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            applies = not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras | {""})
            already_pinned = any(s.operator in ("==", "===") for s in needed.specifier)  # as torch does with nvidia-*
            if applies and not (already_pinned and canonicalize_name(needed.name) not in pins):
                waiting.append(needed)
    assert {"sympy", "huggingface-hub", "docopt", "iniconfig"} <= {name for name, _ in seen}


def test_the_build_tools_are_pinned(pins):
    assert {"pip", "setuptools", "wheel", "ninja", "packaging"} <= set(pins)


def test_the_installed_package_has_all_of_its_subpackages(setup_arguments):
    folders = {path.parent for path in (ROOT / "moect").rglob("*.py") if "__pycache__" not in path.parts}
    assert {"moect", "moect.data", "moect.model"} <= set(setup_arguments["packages"])
    assert {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders} == set(
        setup_arguments["packages"]
    )


def test_every_shell_script_parses():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    assert {"_setup.sh", "quickstart.sh", "test.sh"} <= {script.name for script in scripts}
    for script in scripts:
        result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")


def test_ci_runs_the_test_command_and_can_be_executed():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "bash launch/test.sh"


def test_the_top_level_holds_nothing_but_what_belongs_there():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git, or not a git checkout: what belongs to it cannot be told from what a run left")
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {name.split("/")[0] for name in listing.stdout.split("\0") if name}
    assert {"setup.py", "moect", "launch", "tests"} <= names
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_train_script_passes_everything_on_from_any_folder(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", "--local_rank=0", "--config", "nothing.yaml", "train.steps=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("moect: error: nothing.yaml: No such file")
    assert len(result.stderr.splitlines()) == 1
