"""Studies: which runs there are, in which order and at which learning rate; a small one with real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_runs import REPOSITORY, Place

from moect.config import config_to_yaml
from moect.errors import ConfigError, DataError
from moect.monitor.rows import read_rows
from moect.stages import load_stages
from moect.study.plan import Job, Study
from moect.study.rates import best_rate, next_rates, tried_rates
from moect.study.results import collect
from moect.study.runner import Runner, StudyFailed

OURS = REPOSITORY / "configs" / "study" / "study.yaml"


@pytest.fixture
def files(place: Place) -> Path:
    """A study of two methods, one in two stages with a rate of its own, and two variants."""
    shape = json.loads((place.inputs / "base" / "config.json").read_text())
    keys = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    made = {"from_config": {key: shape[key] for key in keys}, "tokenizer": str(place.inputs / "base")}
    values = place.values(train={"steps": 2, "warmup": 0, "save_every": 2})
    base = {**values, "method": "full", "model": made, "monitor": {"enabled": False}}
    shared = {key: value for key, value in values.items() if key not in ("name", "output", "seed", "model", "moe")}
    shared["monitor"] = {"enabled": True, "samples": 0, "compare": 0, "resamples": 0}
    study = {
        "name": "study",
        "output": str(place.output),
        "base": "base.yaml",
        "extend": "extend.yaml",
        "seeds": [3, 4],
        "pilot": {"rates": [0.01, 0.02], "set": {"train": {"steps": 1, "save_every": 1}}},
        "curve": {"train": {"save_every": 1}},
        "methods": [
            {"name": "all", "method": "full"},
            {"name": "more", "like": "all", "data": {"replay": 0.5}},
            {"name": "staged", "rate": 0.005, "stages": [{"name": "one"}, {"name": "two", "train": {"steps": 3}}]},
        ],
        "variants": [{"name": "wide", "like": "all", "data": {"sequence_length": 32}}, {"name": "fixed", "rate": 0.1}],
    }
    folder = place.output / "files"
    folder.mkdir()
    for name, content in (("base", base), ("extend", shared), ("study", study)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


def end(job: Job, study: Study, bits: float = 1.0) -> None:
    """What a run leaves behind, as far as a study reads it."""
    if job.kind == "export":
        (study.folder / job.name).mkdir(parents=True)
        (study.folder / job.name / "config.json").write_text("{}")
        return
    written = study.folder / "job.yaml"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(yaml.safe_dump(job.values))
    for config in load_stages(written):
        (config.folder / "monitor").mkdir(parents=True)
        (config.folder / "config.yaml").write_text(config_to_yaml(config))
        (config.folder / "log.jsonl").write_text(json.dumps({"event": "end", "step": config.train.steps}) + "\n")
        row = {"step": config.train.steps, "lang": "cy", "role": "new", "domain": "", "bits_per_byte": bits}
        row |= {"base_bits_per_byte": 2.0, "delta": bits - 2, "documents": 6, "bytes": 9}
        (config.folder / "monitor" / "forgetting.jsonl").write_text(json.dumps(row) + "\n")


def change(files: Path, **keys) -> None:
    files.write_text(yaml.safe_dump(yaml.safe_load(files.read_text()) | keys))


def test_base_pilots_methods_and_variants_follow_one_another(files):
    study = Study(files)
    runner = Runner(study, 2)
    outcomes = {0.01: 1.2, 0.02: 1.1, 0.04: 1.3}
    order = []
    while jobs := runner.jobs():
        order.append([job.name for job in jobs])
        end(jobs[0], study, outcomes.get(jobs[0].rate, 1.0))
    bases = ["base-seed3", "base-seed4"]
    assert order[0] == bases and order[1] == ["base-seed3/export", "base-seed4"]
    assert order[2] == ["pilot-all-0.01", "pilot-all-0.02", "staged-seed3", "base-seed4", "fixed"]
    assert order[4][0] == "pilot-all-0.04", order
    first = [f"{name}-seed3" for name in ("all", "more", "staged")]
    assert order[5] == [*first, "base-seed4", "wide", "fixed"]
    assert order[8] == ["base-seed4", "wide", "fixed"] and order[9] == ["base-seed4/export", "wide", "fixed"]
    second = [f"{name}-seed4" for name in ("all", "more", "staged")]
    assert order[10] == [*second, "wide", "fixed"] and len(order) == 15
    ran = {path.parent.relative_to(study.folder).as_posix() for path in study.folder.rglob("config.yaml")}
    assert ran >= {"staged-seed3/one", "staged-seed3/two", "more-seed4", "wide"}
    chosen = yaml.safe_load((study.folder / "more-seed4" / "config.yaml").read_text())
    assert chosen["train"]["lr"] == 0.02 and chosen["data"]["replay"] == 0.5 and chosen["seed"] == 4
    assert chosen["train"]["save_every"] == 2 and chosen["model"]["base"] == str(study.folder / "base-seed4/export")
    first = yaml.safe_load((study.folder / "all-seed3" / "config.yaml").read_text())
    assert first["train"]["save_every"] == 1, "a curve of the first seed"


def test_only_what_is_asked_for_runs_with_the_pilots_that_it_needs(files):
    study = Study(files)
    for job in (study.base(3), study.base_export(3)):
        end(job, study)
    names = {
        "staged": ["staged-seed3", "base-seed4"],
        "*-seed4": ["pilot-all-0.01", "pilot-all-0.02", "base-seed4"],
        "wide": ["pilot-all-0.01", "pilot-all-0.02"],
        "fixed": ["fixed"],
    }
    for pattern, expected in names.items():
        assert [job.name for job in Runner(study, 1, [pattern]).jobs()] == expected, pattern


def test_what_is_like_something_is_like_all_that_that_is_like(files):
    variants = [{"name": "longer", "like": "more", "train": {"steps": 9}}]
    change(files, variants=variants)
    study = Study(files)
    values = study.variant_job("longer", 0.02).values
    assert values["method"] == "full" and values["data"]["replay"] == 0.5 and values["train"]["steps"] == 9
    for job in (study.base(3), study.base_export(3)):
        end(job, study)
    assert [j.name for j in Runner(study, 1, ["longer"]).jobs()] == ["pilot-all-0.01", "pilot-all-0.02"]
    for rate, bits in ((0.01, 1.0), (0.02, 2.0), (0.005, 3.0)):
        end(study.pilot_job("all", rate), study, bits)
    (job,) = Runner(study, 1, ["longer"]).jobs()
    assert job.rate == 0.01
    change(files, methods=[{"name": "a", "like": "b"}, {"name": "b", "like": "a"}], variants=[])
    with pytest.raises(ConfigError, match="a is like itself"):
        Study(files)


def test_a_pilot_that_diverged_is_no_choice_and_one_that_was_not_measured_is_an_error(files):
    study = Study(files)
    for job in (study.base(3), study.base_export(3), study.pilot_job("all", 0.01)):
        end(job, study, 1.5)
    end(study.pilot_job("all", 0.02), study)
    log = study.folder / "pilot-all-0.02" / "log.jsonl"
    log.write_text(json.dumps({"event": "stop", "step": 0, "why": "the loss is not finite"}) + "\n")
    assert tried_rates(study, "all") == {0.01: 1.5, 0.02: float("inf")}
    assert Runner(study, 1).jobs()[0].name == "pilot-all-0.005", "the best was at the other end"
    rows = study.folder / "pilot-all-0.01" / "monitor" / "forgetting.jsonl"
    rows.write_text(rows.read_text().replace('"step": 1', '"step": 0'))
    with pytest.raises(DataError, match="pilot-all-0.01: its end was not measured on new languages"):
        Runner(study, 1).jobs()


def test_what_is_known_of_the_same_runs_is_not_run_again(files):
    study = Study(files)
    rates = [(0.005, 3.0), (0.01, 1.0), (0.02, None)]  # the last diverged
    ended = [(study.pilot_job("all", rate), bits) for rate, bits in rates]
    ended += [(study.method_job("all", 0.01, seed), 1.0) for seed in study.seeds]
    known = [{"name": job.name, "made_of": study.made_of(job), "bits_per_byte": bits} for job, bits in ended]
    again = Study(files, [*known, *({**record, "made_of": "of something else"} for record in known)])
    runner = Runner(again, 1)
    assert tried_rates(again, "all") == {0.005: 3.0, 0.01: 1.0, 0.02: float("inf")}
    assert [job.name for job in runner.left()] == [
        *("more-seed3", "staged-seed3", "more-seed4", "staged-seed4", "wide", "fixed")
    ]
    assert [job.name for job in runner.jobs()] == ["base-seed3", "base-seed4"]
    assert not Runner(again, 1, ["all"]).jobs(), "no base for nothing"
    base = files.parent / "base.yaml"
    base.write_text(base.read_text().replace("steps: 2", "steps: 5"))
    assert Runner(Study(files, known), 1, ["all"]).left()[0].name == "pilot-all-0.01", "on another base"


def test_a_pattern_that_no_run_has_is_refused(files):
    with pytest.raises(
        ConfigError, match="--only stagd: no run has that name; there are all, more, staged, wide, fixed"
    ):
        Runner(Study(files), 1, ["wide", "stagd"])


def test_a_run_that_was_made_from_another_study_is_not_taken_for_this_one(files):
    study = Study(files)
    end(study.base(3), study)
    study.kept(study.base(3)).parent.mkdir()
    study.kept(study.base(3)).write_text(yaml.safe_dump(study.base(3).values))
    assert study.done(study.base(3))
    base = files.parent / "base.yaml"
    base.write_text(base.read_text().replace("steps: 2", "steps: 5"))
    with pytest.raises(ConfigError, match="study/base-seed3: was made with other values .* move it away"):
        Runner(Study(files), 1).jobs()


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({}, [1, 2, 4]),
        ({1: 3.0, 2: None}, [4]),
        ({1: 3.0, 2: None, 4: 2.0}, []),
        ({1: 3.0, 2: 2.0, 4: 2.5}, []),
        ({1: 3.0, 2: 2.0, 4: 1.5}, [8]),
        ({1: 1.0, 2: 2.0, 4: 2.5}, [0.5]),
        ({1: 3.0, 2: 2.0, 4: 1.5, 8: float("inf")}, []),
        ({1: 6.0, 2: 5.0, 4: 4.0, 8: 3.0, 16: 2.0, 32: 1.0}, []),
    ],
)
def test_the_grid_grows_until_the_best_is_inside(tried, expected):
    assert next_rates(tried, [1, 2, 4]) == expected


def test_of_equal_rates_the_lower_is_taken():
    assert best_rate({4: 1.0, 2: 1.0, 1: 1.5}) == 2


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"methods": []}, "at least one of methods"),
        ({"seeds": [1, 1]}, "two runs are called"),
        ({"variants": [{"name": "all-seed3", "rate": 1}]}, "two runs are called all-seed3"),
        ({"variants": [{"name": "x"}]}, "x needs `like`"),
        ({"variants": [{"name": "x", "like": "nobody"}]}, "like 'nobody', which is no method"),
        ({"methods": [{"method": "full"}]}, "name is None"),
        ({"pilot": {"rates": ["fast"], "set": {}}}, "`pilot.rates.0`: input should be a valid number"),
        ({"sees": [1]}, "`sees`: unexpected"),
        ({"extend": "nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"name": "../x"}, "`name` is '../x': give a plain folder name"),
        ({"methods": [{"name": "a", "rate": "fast"}], "variants": []}, "the `rate` of a is 'fast'"),
        ({"pilot": {"rates": [-1.0], "set": {}}}, "all-seed3: `train.lr` is -1.0"),
        ({"pilot": {"rates": [0.1], "set": {"trian": {}}}}, "pilot-all-0.1: unknown key `trian`; did you mean `train`"),
        ({"variants": [{"name": "more", "like": "all"}]}, "two runs are called more"),
        ({"variants": [{"name": "x", "like": "all", "data": {"replay": 3}}]}, "x: `data.replay` is 3"),
    ],
)
def test_what_no_study_can_be_is_refused(files, keys, problem):
    change(files, **keys)
    with pytest.raises(ConfigError, match=problem) as refusal:
        Study(files)
    assert "\n" not in str(refusal.value)


def test_every_run_of_our_own_study_is_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = Study(OURS)
    jobs = [study.base(0), *(study.pilot_job(name, 0.001) for name in study.methods)]
    jobs += [study.method_job(name, 0.001, seed) for name in study.methods for seed in study.seeds]
    jobs += [study.variant_job(name, 0.001) for name in study.variants]
    for job in jobs:
        written = tmp_path / "job.yaml"
        written.write_text(yaml.safe_dump(job.values))
        configs = load_stages(written)
        assert sum(config.train.steps for config in configs) == job.steps
        assert configs == job.configs and study.folder in configs[-1].folder.parents
        if job.kind in ("method", "variant"):
            tokens = [c.train.steps * c.train.batch_size * c.data.sequence_length for c in configs]
            assert sum(tokens) == 400 * 2048, "equal tokens"
        measured = {source.path for config in configs for source in config.data.evaluation}
        assert not measured & {source.path for config in configs for source in config.data.train}
        if job.kind == "pilot":
            assert not any("test" in path or "second_domain" in path for path in measured)


def test_a_study_runs_fails_stops_and_goes_on(files, capsys):
    """With real processes: what fails is named and does not keep the others; asked to stop, it goes on later."""
    change(
        files,
        seeds=[3],
        methods=[{"name": "all", "method": "full", "rate": 0.01}],
        variants=[{"name": "broken", "rate": 0.1, "data": {"root": "nowhere"}}],
    )
    with pytest.raises(StudyFailed, match=r"1 run\(s\) did not end well: broken"):
        Runner(Study(files), 2).go()
    told = capsys.readouterr().out
    assert "FAILED broken (exit code 2)" in told and "no file matches" in told
    assert [line.split()[:2] for line in told.splitlines() if line.startswith("done")] == [
        ["done", "base-seed3"],
        ["done", "base-seed3/export"],
        ["done", "all-seed3"],
    ]
    results = collect(Study(files))
    elsewhere = shutil.copytree(Study(files).folder, files.parent / "elsewhere")
    shutil.rmtree(Study(files).folder)
    known = Study(files, results["runs"])
    assert [job.name for job in Runner(known, 2).left()] == ["broken"] and collect(known) == results
    shutil.copytree(elsewhere, known.folder)
    (row,) = (
        r for r in read_rows(Study(files).folder / "all-seed3" / "monitor") if (r["step"], r["lang"]) == (2, "cy")
    )
    assert [(run["name"], run["steps"], run["rate"]) for run in results["runs"]] == [("all-seed3", 2, 0.01)]
    (text,) = (text for text in results["runs"][0]["texts"] if text["lang"] == "cy")
    assert text["bits_per_byte"] == row["bits_per_byte"] and text["role"] == "new"
    change(files, variants=[{"name": "late", "rate": 0.1, "train": {"steps": 100_000}}])
    command = [sys.executable, "-m", "moect.cli", "study", str(files)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    log = Study(files).folder / "late" / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 3' in log.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[0]
    assert process.returncode == 130 and "stop   late" in told and "all-seed3" not in told
    assert list((log.parent / "checkpoints").glob("step-*")), "stopped with a checkpoint"
    assert [job.name for job in Runner(Study(files), 1).jobs()] == ["late"]
