"""Every command in a code block of README.md and docs/first-run.md is run, on a tiny base and a little text.

What stands in for what is one table; a block that is neither commands, nor a language that is known here, fails.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import REPOSITORY, WORDS, free_port, make_inputs

README = REPOSITORY / "README.md"
FIRST_RUN = REPOSITORY / "docs" / "first-run.md"

# what a command is replaced by where it cannot run as it is in a test
STAND_INS = {
    "deepspeed launch/train.py": "deepspeed --num_accelerators 1 --master_port {port} launch/train.py",  # free, on CPU
    "cp configs/extend.yaml": "cp tiny.yaml",  # the same file with a few short steps
    "train.stop_after=500": "train.stop_after=3",  # of six
    "source .venv/bin/activate": "true",  # what runs the tests is active already
}
EXEMPT = {
    "bash launch/test.sh": "runs these tests; CI runs it",
    "bash launch/quickstart.sh": "takes minutes; the slow test below runs what it starts, in short",
}
# a block without a language whose first line begins so is no list of commands
PICTURES = ("runs/NAME/",)
SHOWN = ("text", "json", "yaml")
TINY = {
    "train": {"steps": 6, "batch_size": 4, "micro_batch": 2, "warmup": 1, "save_every": 3, "precision": "fp32"},
    "data": {"sequence_length": 32},
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Code blocks of a page in their order, as (language, text): fenced, or indented with the language ""."""
    found, fence = [], None
    before = ""
    for line in page.splitlines():
        indented = line.startswith("    ") or not line
        if match := re.match(r"```(\w*)$", line):
            fence = None if fence is not None else match[1]
            found += [(fence, [])] if fence is not None else []
        elif fence is not None:
            found[-1][1].append(line)
        elif line.startswith("    ") and not before:
            found.append(("", [line[4:]]))
        elif indented and before.startswith("    "):
            found[-1][1].append(line[4:])
        before = line
    return [(language, "\n".join(lines) + "\n") for language, lines in found]


def scripts(page: str) -> list[tuple[str, str]]:
    """The blocks that are to be run, as ("bash" or "python", text).

    Raises:
        ValueError: a block that cannot be told from commands, or holds a command that nobody has.
    """
    found = []
    for language, text in blocks(page):
        if language in SHOWN or (not language and text.startswith(PICTURES)):
            continue
        if language not in ("", "bash", "python"):
            raise ValueError(f"a block of language {language!r}: is it to be run?")
        found.append(("python" if language == "python" else "bash", text))
        for line in text.splitlines() if found[-1][0] == "bash" else []:
            check_known(line)
    return found


def check_known(line: str) -> None:
    """The first word of a line that begins a command is something that bash or this environment can run."""
    if not line.strip() or line.startswith((" ", "#")):  # the body of a loop, or what a \ joined to the line before
        return
    word = line.split()[0]
    known = subprocess.run(["bash", "-c", 'type -- "$1"', "bash", word], capture_output=True, env=environment())
    if known.returncode:
        raise ValueError(f"{word!r} is no command here: {line!r}")


def with_stand_ins(script: str) -> str:
    """A script as it is run here."""
    for command in EXEMPT:
        script = re.sub(rf"(?m)^{re.escape(command)}( +#.*)?$", f": exempt: {command}", script)
    for command, stand_in in STAND_INS.items():
        while command in script:
            script = script.replace(command, stand_in.format(port=free_port()), 1)
    return script


def environment() -> dict[str, str]:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MOECT_DATA")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return env | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the commands touch, the tiny base under the name of the real one, and a reader's own text."""
    for name in ("configs", "launch", "docs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    (tmp_path / "made").mkdir()
    made = make_inputs(tmp_path / "made")
    values = yaml.safe_load((REPOSITORY / "configs" / "extend.yaml").read_text(encoding="utf-8"))
    base = tmp_path / values["model"]["base"]
    base.parent.mkdir(parents=True)
    (made / "base").rename(base)
    for section, changes in TINY.items():
        values[section] |= changes
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    for lang, words in {"en": WORDS["en"], "sw": WORDS["cy"]}.items():
        rng = random.Random(lang)
        texts = (" ".join(rng.choices(words.split(), k=rng.randint(3, 12))) for _ in range(400))
        (tmp_path / f"{lang}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def run_page(page: str, checkout: Path, prelude: str = "") -> str:
    """Run a page's blocks one after another, in one folder; what they print."""
    said = []
    for language, text in scripts(page):
        if language == "python":
            command = [sys.executable, "-c", prelude + text]
        else:
            command = ["bash", "-euo", "pipefail", "-c", with_stand_ins(text)]
        env = environment() | {"HF_HOME": str(checkout / "huggingface")}  # code that an export brings is copied there
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said.append(done.stdout)
    return "\n".join(said)


def prepare_as_the_readme_asks(checkout: Path) -> None:
    """The README says: copy configs/extend.yaml, name your languages and files in it."""
    shutil.copy(checkout / "tiny.yaml", checkout / "my.yaml")
    for lang in ("en", "sw"):
        (checkout / "text" / lang).mkdir(parents=True)
        for part in ("train", "test"):
            shutil.copy(checkout / f"{lang}.jsonl", checkout / "text" / lang / f"{part}.jsonl")


def test_every_command_of_the_readme_runs(checkout):
    prepare_as_the_readme_asks(checkout)
    # `model` of the second example is any base in a training loop of the reader's own
    base = yaml.safe_load((checkout / "tiny.yaml").read_text())["model"]["base"]
    prelude = f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({base!r})\n"
    said = run_page(README.read_text(encoding="utf-8"), checkout, prelude)
    assert "parameters" in said and "finished at step 6" in said and "wrote runs/extend/export" in said


def test_every_command_of_the_first_run_runs(checkout):
    said = run_page(FIRST_RUN.read_text(encoding="utf-8"), checkout)
    assert "stopped as asked" in said and "resumed from" in said and "finished at step 6" in said
    for made in ("report.md", "export/config.json", "export/model.safetensors"):
        assert (checkout / "runs" / "extend" / made).is_file()


def test_the_table_of_stand_ins_holds_nothing_that_no_page_uses():
    pages = README.read_text(encoding="utf-8") + FIRST_RUN.read_text(encoding="utf-8")
    commands = "\n".join(text for language, text in scripts(pages) if language == "bash")
    assert [command for command in (*STAND_INS, *EXEMPT) if command not in commands] == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("Try\n\n    moetc plan --config my.yaml\n\nand see", "'moetc' is no command"),
        ("```bash\nmoect plan\ngo-faster now\n```\n", "'go-faster' is no command"),
        ("```zsh\nmoect plan\n```\n", "language 'zsh'"),
        ("    runs/OTHER/\n        report.md\n", "'runs/OTHER/' is no command"),
    ],
)
def test_a_command_that_is_not_there_is_found(page, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        scripts(page)


def test_a_command_that_fails_is_found(tmp_path):
    with pytest.raises(AssertionError, match="No such file"):
        run_page("```bash\nmkdir made\nmoect plan --config made/nothing.yaml\n```\n", tmp_path)


@pytest.mark.slow
def test_the_quick_start_runs_to_its_end(checkout):
    script = checkout / "launch" / "quickstart.py"
    command = [sys.executable, script, "--quick", "--output", "runs/quick"]
    done = subprocess.run(command, cwd=checkout, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (checkout / "runs" / "quick" / "report.md").is_file()
