"""What the configuration refuses, or says aloud, before anything else is read."""

import pytest

from moect.config import config_from_dict, config_to_yaml, load_config, unused_keys
from moect.errors import ConfigError

BASE = {"base": "somewhere"}
DATA = {"languages": {"en": "old", "cy": "new"}, "train": [{"path": "en", "lang": "en"}, {"path": "cy", "lang": "cy"}]}


def config(**sections):
    return config_from_dict({"model": BASE, "data": DATA, **sections})


def corpus(section="train", **source):
    return {"data": {**DATA, section: [{"lang": "en", **source}]}}


def test_a_dataset_takes_the_place_of_files_and_survives_the_way_through_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config(**corpus(dataset="x/y", subset="a", revision="v1"))))
    (source,) = load_config(path).data.train
    assert (source.dataset, source.subset, source.split, source.revision) == ("x/y", "a", "train", "v1")


def test_a_configuration_survives_the_way_through_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config(moe={"layers": [0, 2], "experts": 8}, train={"lr": "1e-4"})))
    again = load_config(path, ["train.steps=7", "moe.layers=every-2"])
    assert (again.moe.experts, again.train.lr, again.train.steps, again.moe.layers) == (8, 1e-4, 7, "every-2")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: a\ntrain: {steps: 5}\ntrain: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:3: not valid YAML: key `train` twice"):
        load_config(path)


def test_a_language_that_yaml_takes_for_a_truth_value_is_explained():
    with pytest.raises(ConfigError, match="put the language in quotes"):
        config(data={**DATA, "languages": {False: "new"}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"lr": ".nan"}}, "valid number|finite"),
        ({"train": {"lr": float("nan")}}, "`train.lr` is nan: it must be a finite number"),
        ({"loss": {"balance": -3}}, "`loss.balance` is -3.0: it cannot be negative"),
        ({"lora": {"alpha": 0}}, "`lora.alpha` is 0.0"),
        ({"seed": 5_000_000_000}, "`seed` is 5000000000"),
        ({"seed": -1}, "`seed` is -1"),
        ({"train": {"stop_after": 0}}, "`train.stop_after` is 0"),
        ({"model": {**BASE, "attention": "flash_attention_2"}}, "keeps packed documents apart only in single rows"),
        ({"moe": {"fusion": "add", "language_gate": True}, "loss": {"gate": 0}}, "would never learn which language"),
        ({"train": {"lr": 0.1, "stesp": 3}}, "did you mean `steps`"),
        ({"method": "moe_lpr"}, "did you mean `moe-lpr`"),
        ({"method": "none"}, "choose one of moe-ct, full, lora, .*language-gate, native, moe-lpr"),
        ({"train": {"parts": "router"}}, "`train.parts`: input should be 'all', or should be a valid list, got"),
        ({"train": {"parts": ["experts", "all"]}}, "`train.parts.1`: input should be 'experts', .* got 'all'"),
        (corpus(), r"`data.train\[0\]` needs `path`, files, or `dataset`, a hub name"),
        (corpus(path="en", dataset="x/y"), r"`data.train\[0\]` has both `path` and `dataset`: give one"),
        (corpus(path="en", subset="a"), r"`data.train\[0\]`: `subset` is of a `dataset`, and this is a `path`"),
        (corpus(path="en", split="test"), r"`data.train\[0\]`: `split` is of a `dataset`"),
        (corpus(path="en", revision="v1"), r"`data.train\[0\]`: `revision` is of a `dataset`"),
        (corpus(dataset="x/y", lang=""), r"`data.train\[0\]` needs `lang`"),
        (corpus("evaluation", dataset="x/y", path="en"), r"`data.evaluation\[0\]` has both"),
        (corpus("evaluation", path="en", subset="a"), r"`data.evaluation\[0\]`: `subset` is of a `dataset`"),
        (corpus(dataset="x/y", limit=0), r"`data.train\[0\]`: `limit` is 0"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        config(**sections)


def test_keys_that_the_method_does_not_read_are_named():
    assert unused_keys(config()) == []
    assert unused_keys(config(method="full", moe={"experts": 8}, loss={"z": 0.1})) == ["moe.experts", "loss.z"]
    assert unused_keys(config(method="lora", lora={"rank": 4}, train={"decay": 0.5})) == ["train.decay"]
    assert unused_keys(config(lora={"rank": 4}, moe={"gate_threshold": 0.9})) == ["lora.rank", "moe.gate_threshold"]


def test_the_environment_says_where_text_lies_only_where_the_configuration_does_not(monkeypatch):
    monkeypatch.setenv("MOECT_DATA", "elsewhere")
    assert config().data.root == "elsewhere"
    assert config(data={**DATA, "root": "here"}).data.root == "here"
