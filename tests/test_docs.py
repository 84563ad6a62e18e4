"""The documentation cannot rot: what it says about keys, commands, files and names is held against the code."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from moect.cli import _parser
from moect.config import RunConfig, config_from_dict, config_to_yaml, load_config, unused_keys
from moect.config_reference import COMMAND, PAGE, keys, reference
from moect.data_config import FilterConfig
from moect.monitor_config import TaskConfig
from moect.stages import load_stages

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = keys()
SECTIONS = "|".join(field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(KEYS[field.name]))
FILE_KINDS = ("safetensors", "json", "jsonl", "yaml", "py", "md")
COMMANDS = ("moect ", "deepspeed ", "python launch/", "bash launch/", "python -m moect", "sbatch ", "kubectl ")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


each_page = pytest.mark.parametrize("page", PAGES, ids=names(PAGES))


def prose(text: str) -> str:
    """A page without its code blocks, fenced or indented."""
    return re.sub(r"(?m)^ {4}.*$", "", re.sub(r"(?ms)^```.*?^```$", "", text))


def spans(text: str) -> list[str]:
    """What stands in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def code_lines(text: str) -> list[str]:
    """The lines of code blocks, fenced or indented, without their indentation."""
    fenced = "\n".join(re.findall(r"(?ms)^```\w*\n(.*?)^```$", text))
    return [line.strip() for line in fenced.splitlines() + re.findall(r"(?m)^ {4}(.*)$", text)]


def commands(text: str) -> list[list[str]]:
    """Commands of a page, as words; placeholders in square brackets are left out."""
    lines = [line.removeprefix("$ ") for line in code_lines(text) + spans(text)]
    return [
        shlex.split(re.sub(r"\[[^]]*[=…][^]]*\]", "", line), comments=True)
        for line in lines
        if line.startswith(COMMANDS)
    ]


def check_command(words: list[str]) -> None:
    """Fail on a command that would not be understood."""
    if words[0] != "moect":
        for script in (word for word in words if re.match(r"(launch|configs)/\w", word)):
            assert (ROOT / script).is_file(), f"there is no {script}"
        if "-m" in words and words[0] == "python":
            assert importlib.util.find_spec(words[words.index("-m") + 1]), f"there is no module for {words}"
    if "launch/train.py" in words:
        if words[0] == "deepspeed":
            check_launcher(words[1 : words.index("launch/train.py")])
        words = ["moect", "train", *words[words.index("launch/train.py") + 1 :]]
    elif "launch/slurm.sbatch" in words:
        words = ["moect", "train", "--config", *words[words.index("launch/slurm.sbatch") + 1 :]]
    if words[0] != "moect":
        return
    subcommands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert words[1] in subcommands, f"moect has no command {words[1]!r}"
    if len(words) == 2:  # the name of a command, not a call
        return
    try:
        arguments = _parser().parse_args(words[1:])
    except SystemExit:
        pytest.fail(f"not understood: {' '.join(words)}")
    for override in getattr(arguments, "overrides", []):
        check_setting(*override.split("=", 1))
    if (config := getattr(arguments, "config", None)) and config.parts[0] == "configs":
        load_stages(ROOT / config, arguments.overrides)


def check_launcher(options: list[str]) -> None:
    """Fail on options that DeepSpeed's launcher does not have."""
    from deepspeed.launcher.runner import parse_args

    try:
        parse_args([*options, "script.py"])
    except SystemExit:
        pytest.fail(f"deepspeed does not understand: {' '.join(options)}")


def check_setting(key: str, value: str | None) -> None:
    """Fail on a key that does not exist, or a value that it cannot have."""
    key = re.sub(r"^stages\.[\w-]+\.", "", key)  # of one stage
    assert key.removesuffix("[]") in KEYS, f"no key {key!r}"
    if value is not None and value != "…":
        TypeAdapter(KEYS[key]).validate_python(yaml.safe_load(value))


def check_links(page: Path, text: str) -> int:
    """Fail on a link or image within the project that leads nowhere; return the number of those that lead somewhere."""
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if not re.match(r"[a-z]+:", t)]
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, target
    return len(targets)


def settings(text: str) -> list[tuple[str, str | None]]:
    """`section.key`, `section.key: value` and `section.key=value` in backticks."""
    found = []
    for span in spans(text):
        for setting in [span] if ": " in span else span.split():
            match = re.fullmatch(rf"((?:{SECTIONS})\.[a-z_]+(?:\[\])?(?:\.[a-z_]+)?)(?:(?:=|: )(.+))?", setting)
            if match and match[1].rpartition(".")[2] not in FILE_KINDS:
                found.append((match[1], match[2]))
    return found


def test_configuration_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == reference(), f"docs/configuration.md is stale: run `{COMMAND}`"


def test_every_key_of_a_written_out_configuration_has_a_line_with_its_help():
    lines = re.findall(r"(?m)^\| `([^`]+)` \| .+ \| .+ \| (.+) \|$", reference())
    config = yaml.safe_load(config_to_yaml(load_config(ROOT / "configs" / "quickstart.yaml")))
    wanted = set()
    for name, value in config.items():
        nested = isinstance(value, dict)
        wanted |= {f"{name}.{key}" for key in value} if nested else {name}
    for name, like in (("train", "train"), ("evaluation", "evaluation"), ("calibration", "evaluation")):
        wanted |= {f"data.{name}[].{key}" for key in config["data"][like][0]}
        wanted |= {f"data.{name}[].filter.FIELD.{f.name}" for f in dataclasses.fields(FilterConfig)}
    wanted |= {f"monitor.tasks[].{f.name}" for f in dataclasses.fields(TaskConfig)}
    assert {key for key, _ in lines} == wanted and len(lines) == len(wanted) > 60
    assert dict(lines)["loss.z"] == "weight of the router z-loss"


def test_the_worked_example_of_the_data_page_is_a_configuration():
    (block,) = re.findall(r"(?ms)^```yaml\n(name: .*?)^```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"))
    config = config_from_dict(yaml.safe_load(block))
    assert config.data.packing == "best-fit" and len(config.data.train) == 7 and not unused_keys(config)


def test_types_and_defaults_are_written_as_yaml():
    page = reference()
    assert "| `train.zero_stage` | `0`, `1`, `2`, `3` | `2` |" in page
    assert "| `monitor.window` | integer or null | `null` |" in page
    assert "| `data.languages` | mapping of text to `old`, `new`, `learnt` | `{}` |" in page


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_every_shipped_configuration_is_valid(path):
    assert all(config.data.train for config in load_stages(path))


def test_every_preset_of_the_quick_start_is_there():
    assert {"quickstart-base.yaml", "quickstart.yaml", "extend.yaml"} <= {path.name for path in CONFIGS}


@each_page
def test_every_link_and_image_leads_somewhere(page):
    assert check_links(page, page.read_text(encoding="utf-8"))


@each_page
def test_every_command_is_understood(page):
    for words in commands(page.read_text(encoding="utf-8")):
        check_command(words)


@each_page
def test_every_key_and_value_that_is_mentioned_exists(page):
    for key, value in settings(page.read_text(encoding="utf-8")):
        check_setting(key, value)


@each_page
def test_every_file_of_the_project_that_is_mentioned_is_there(page):
    for span in spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(moect|launch|configs|tests|docs)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"there is no {span}"


@each_page
def test_every_python_example_compiles_and_imports_what_there_is(page):
    imports = []
    for block in re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text(encoding="utf-8")):
        nodes = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.ImportFrom)]
        imports += [ast.unparse(n) for n in nodes if n.module.split(".")[0] == "moect"]
    for statement in imports:  # in a fresh process, as a reader would: what is imported already hides mistakes
        result = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, f"{statement}\n{result.stderr[-500:]}"


def test_the_pages_give_these_checks_something_to_check():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {"train", "export"} <= {key.partition(".")[0] for key, _ in settings(text)}
    assert len(settings(text)) > 100
    assert len(commands(text)) > 8
    assert {words[1] for words in commands(text) if words[0] == "moect"} >= {"plan", "export", "generate", "compare"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("    moect trian --config configs/extend.yaml", "no command 'trian'"),
        ("    moect export runs/x --dtpye bf16", "not understood"),
        ("    deepspeed --hostfiel hosts launch/train.py --config my.yaml", "deepspeed does not understand"),
        ("    sbatch --nodes=4 launch/slurm.sbatch configs/none.yaml", "no configs/none.yaml"),
        ("    sbatch launch/slurm.sbatch configs/extend.yaml train.rl=1", "no key 'train.rl'"),
        ("    $ deepspeed launch/train.py --config configs/extend.yaml train.rl=1", "no key 'train.rl'"),
        ("```bash\nbash launch/quickstrat.sh  # go\n```", "no launch/quickstrat.sh"),
        ("see `python -m moect.nothing`", "no module"),
        ("set `moe.exprets`", "no key 'moe.exprets'"),
        ("set `moe.router: sigmod`", "'softmax' or 'sigmoid'"),
        ("set `train.steps=many`", "valid integer"),
        ("[here](nowhere.md)", "leads nowhere"),
        ("[here](concepts.md#nowhere)", "nowhere"),
    ],
)
def test_these_checks_find_what_is_wrong(text, problem):
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception), match=re.escape(problem)):
        check_links(ROOT / "docs" / "page.md", text)
        for words in commands(text):
            check_command(words)
        for key, value in settings(text):
            check_setting(key, value)
