"""Bad input through the command itself: exit code 2, one line that names the remedy, nothing written or overwritten."""

import hashlib
import json
import shutil

import pytest
import yaml
from small_runs import checkpoint
from tiny import tiny_config, tiny_model

from moect import distributed
from moect.cli import main
from moect.train.loop import train


@pytest.fixture(autouse=True)
def process_goes_on(monkeypatch):
    """The command leaves the process group when it ends; here other tests still need it."""
    monkeypatch.setattr(distributed, "stop", lambda failed=False: None)


@pytest.fixture
def spoil(place):
    """A folder of inputs of this test's own, to be spoilt, and the plain values of a run on it."""
    folder = place.output / "inputs"
    shutil.copytree(place.inputs, folder)
    values = place.values()
    values["output"] = str(place.output / "runs")
    values["model"]["base"], values["data"]["root"] = str(folder / "base"), str(folder)
    return folder, values


def contents(folder) -> dict[str, str]:
    """Every file below a folder with its digest, but the token cache, which may grow."""
    files = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refusal(capsys, arguments: list[str]) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    code = main(arguments)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("moect: error")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert err.rstrip().endswith(lines[0]), "the line is not the last thing said"
    return lines[0]


def refused_training(capsys, folder, values: dict, *overrides: str) -> str:
    """The line that refuses to train; no file below `folder` has come, gone or changed."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    before = contents(folder)
    line = refusal(capsys, ["train", "--config", str(path), *overrides])
    assert contents(folder) == before
    assert not (folder / "runs" / "run").exists()
    return line


def remove(name):
    return lambda folder, values: (folder / name).unlink()


def write(name, content):
    return lambda folder, values: (folder / name).write_bytes(content)


def change(section, **changes):
    return lambda folder, values: (values[section] if section else values).update(changes)


def gpt2(folder, values):
    tiny_config("gpt2", vocab_size=300).save_pretrained(folder / "base")


def without_old_text(folder, values):
    values["moe"].update(fusion="add", language_gate=True)
    del values["data"]["train"][0], values["data"]["replay"]


def without_tokenizer(folder, values):
    tiny_model("llama", vocab_size=300).save_pretrained(folder / "base")
    without_tokenizer_of_qwen(folder, values)


def without_tokenizer_of_qwen(folder, values):
    for path in (folder / "base").glob("*token*"):
        path.unlink()


def tokenizer_of_another_model(folder, values):
    tiny_model("qwen3", vocab_size=60).save_pretrained(folder / "base")


GOOD = b'{"text": "un dau tri"}\n'
TABLE = {
    "an unknown key": (change("train", batchsize=8), ["unknown key `train.batchsize`", "did you mean `batch_size`?"]),
    "an unknown section": (change(None, trian={}), ["unknown key `trian`", "did you mean `train`?"]),
    "an unknown key of a corpus": (
        lambda folder, values: values["data"]["train"][1].update(limt=3),
        ["unknown key `data.train.1.limt`", "did you mean `limit`?"],
    ),
    "a wrong type": (change("train", steps="many"), ["`train.steps`", "got 'many'"]),
    "a number out of range": (change("train", lr=-1.0), ["`train.lr` is -1.0", "must be positive"]),
    "a value that is none of the choices": (change("train", zero_stage=4), ["`train.zero_stage`", "got 4"]),
    "a missing base": (change("model", base="/nowhere/base"), ["/nowhere/base", "model.base"]),
    "a base without config.json": (remove("base/config.json"), ["base", "config.json"]),
    "a base with damaged config.json": (write("base/config.json", b"{"), ["base"]),
    "a base without weights": (remove("base/model.safetensors"), ["model.base", "cannot be loaded"]),
    "a base with damaged weights": (write("base/model.safetensors", b"\0" * 9), ["model.base", "cannot be loaded"]),
    "a family that cannot be served": (gpt2, ["gpt2", "its FFN has no gate projection", "served: llama"]),
    "a missing corpus": (remove("cy.train.jsonl"), ["cy.train.jsonl: no file matches", "data.root"]),
    "malformed JSON": (
        write("cy.train.jsonl", GOOD * 2 + b'{"text": \n'),
        ["cy.train.jsonl:3: malformed JSON", "mend"],
    ),
    "another encoding": (
        write("cy.train.jsonl", GOOD + '{"text": "tŷ"}\n'.encode("utf-16")),
        ["cy.train.jsonl:2: not UTF-8 (byte 0)", "mend the text"],
    ),
    "an empty corpus": (write("cy.train.jsonl", b"\n"), ["cy.train.jsonl: the corpus is empty"]),
    "a corpus without the field": (
        write("cy.train.jsonl", b'{"txt": "un"}\n'),
        ["cy.train.jsonl:1: no `text`", "name the right field"],
    ),
    "an unknown role": (
        lambda folder, values: values["data"].update(languages={"en": "old", "cy": "newer"}),
        ["data.languages.cy", "'newer'"],
    ),
    "a language without a role": (
        lambda folder, values: values["data"].update(languages={"en": "old"}),
        ["language `cy` has no role", "data.languages"],
    ),
    "a batch larger than the corpus": (
        change("train", batch_size=4096),
        ["`train.batch_size` is 4096 rows", "lower it or `data.sequence_length`, or give more text"],
    ),
    "a batch that does not divide": (change("train", micro_batch=3), ["`train.batch_size` 8", "`train.micro_batch` 3"]),
    "more experts a token than there are": (
        change("moe", top_k=5),
        ["moe.top_k is 5 but there are only 4 experts", "lower moe.top_k"],
    ),
    "a width that the kernels cannot take": (change("moe", width=12), ["moe.width is 12", "multiple of 8"]),
    "a block that the base does not have": (change("moe", layers=[0, 7]), ["moe.layers names block 7", "0 to 2"]),
    "a language gate without old text": (without_old_text, ["moe.language_gate", "old and new languages"]),
    "no tokenizer": (without_tokenizer, ["holds none of tokenizer.json", "set `model.tokenizer`"]),
    "a tokenizer of another model": (tokenizer_of_another_model, ["the model has 60", "model.tokenizer"]),
    "a missing tokenizer": (change("model", tokenizer="/nowhere/tok"), ["tokenizer /nowhere/tok", "model.tokenizer"]),
    "modules that LoRA does not find": (
        lambda folder, values: values.update(method="lora", lora={"targets": ["none_such"]}),
        ["lora.targets", "none_such"],
    ),
    "a missing held-out text": (
        lambda folder, values: ((folder / "en.test.jsonl").unlink(), values.update(monitor={"enabled": True})),
        ["en.test.jsonl: no file matches"],
    ),
    "a stride longer than the window": (
        change("monitor", enabled=True, window=8, stride=9),
        ["monitor.stride is 9", "lower monitor.stride"],
    ),
    "an unknown dispatch": (change("moe", dispatch="warp"), ["moe.dispatch", "warp"]),
    "a dispatch that cannot be used here": (change("moe", dispatch="cuda"), ["moe.dispatch", "the tokens are on cpu"]),
}


def test_a_qwen_without_tokenizer_files_is_refused_for_that(spoil, capsys):
    folder, values = spoil
    without_tokenizer_of_qwen(folder, values)
    assert "model.tokenizer" in refused_training(capsys, folder.parent, values)


@pytest.mark.parametrize("case", TABLE)
def test_training_is_refused_in_one_line_with(spoil, capsys, case):
    folder, values = spoil
    spoiler, parts = TABLE[case]
    spoiler(folder, values)
    line = refused_training(capsys, folder.parent, values)
    assert all(part in line for part in parts), line


def test_the_unspoilt_run_is_accepted(spoil, capsys):
    folder, values = spoil
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(path), "train.steps=3"]) == 0
    assert "finished at step 3" in capsys.readouterr().out
    assert main(["plan", "--config", str(path), "--ranks", "2"]) == 0
    assert "2, ZeRO 2, fp32" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["none.yaml: No such file", "--config"]),
        (b"train:\n  steps: [1\n", ["none.yaml:3: not valid YAML"]),
        (b"- 1\n", ["none.yaml: holds a list"]),
        (b"name: \xff\n", ["none.yaml: not UTF-8"]),
        (b"name: run\n", ["give either `model.base` or `model.from_config`"]),
    ],
)
def test_configuration_file_is_refused_in_one_line(tmp_path, capsys, command, content, parts):
    path = tmp_path / "none.yaml"
    if content is not None:
        path.write_bytes(content)
    line = refusal(capsys, [command, "--config", str(path)])
    assert all(part in line for part in parts), line
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["none.yaml"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["override 'train.steps'", "section.key=value"]),
        ("=3", ["section.key=value"]),
        ("train.steps=[", ["not valid YAML"]),
        ("name.inner=3", ["`name` is not a section"]),
        ("train.stepz=3", ["unknown key `train.stepz`", "did you mean `steps`?"]),
        ("name=../elsewhere", ["`name`", "plain folder name"]),
    ],
)
def test_override_is_refused_in_one_line(spoil, capsys, override, parts):
    folder, values = spoil
    line = refused_training(capsys, folder.parent, values, override)
    assert all(part in line for part in parts), line


def test_existing_run_folder_is_refused_and_left_as_it_is(place, capsys):
    run = train(place.config())
    path = place.write(place.config())
    before = contents(place.output)
    line = refusal(capsys, ["train", "--config", str(path)])
    assert f"{run} exists" in line and "resume=auto" in line and "name=" in line
    assert contents(place.output) == before


def test_checkpoint_of_another_base_is_refused_and_left_as_it_is(place, capsys):
    run = train(place.config(train={"stop_after": 3}))
    other = place.output / "other"
    shutil.copytree(place.inputs / "base", other)
    tiny_model("qwen3", seed=1, vocab_size=300).save_pretrained(other)
    path = place.write(place.config(resume="auto"))
    before = contents(place.output)
    line = refusal(capsys, ["train", "--config", str(path), f"model.base={other}"])
    assert f"{checkpoint(run, 3)}: made with another base" in line and "model.base" in line
    assert contents(place.output) == before


def test_export_and_generate_refuse_what_is_not_there(place, capsys):
    config = place.config()
    config.folder.mkdir()
    shutil.copy(place.write(config), config.folder / "config.yaml")
    before = contents(place.output)
    assert "no usable checkpoint" in refusal(capsys, ["export", str(config.folder)])
    assert "no run there" in refusal(capsys, ["export", str(place.output / "nowhere")])
    assert "no exported model there" in refusal(capsys, ["generate", str(config.folder), "un"])
    assert "is not the folder of a run" in refusal(capsys, ["report", str(place.output / "nowhere")])
    assert contents(place.output) == before


def test_error_in_a_line_deep_in_a_corpus_names_that_line(spoil, capsys):
    folder, values = spoil
    path = folder / "en.train.jsonl"
    lines = path.read_text().splitlines()
    lines[76] = json.dumps([1, 2])
    path.write_text("\n".join(lines))
    assert "en.train.jsonl:77: " in refused_training(capsys, folder.parent, values)
