"""Damaged configurations and texts: a clear error, or the same as undamaged, or what was left out is counted."""

import gzip
import json
import math
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from damage_cases import damages, examples, mutated
from hypothesis import given
from hypothesis import strategies as st
from small_runs import make_inputs

from moect.config import config_from_dict, config_to_yaml, load_config, read_values
from moect.data.reading.files import zstd
from moect.data.reading.sources import read_documents
from moect.data_config import SourceConfig
from moect.errors import ConfigError, DataError, MoectError
from moect.stages import load_stages

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
WHOLE = {path: read_values(path) for path in CONFIGS}


def is_plain(value) -> bool:
    """Whether no number in it is NaN."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return not (isinstance(value, float) and math.isnan(value))


def accepted(path: Path):
    """The runs of a file, or None where it is refused in one line."""
    try:
        configs = load_stages(path)
    except MoectError as error:
        assert isinstance(error, ConfigError) and "\n" not in str(error) and str(error).strip()
        return None
    for config in configs:  # what is accepted can be kept and read again: a resume does so
        again = config_from_dict(yaml.safe_load(config_to_yaml(config)))
        values = yaml.safe_load(config_to_yaml(config))
        assert is_plain({k: v for k, v in values.items() if k != "model"}), values
        assert again == config or not is_plain(values)
    return configs


@pytest.fixture(scope="module")
def scratch():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_configurations_with_odd_values_are_refused_in_a_line_or_can_be_kept(scratch):
    path = scratch / "config.yaml"

    @examples(20)
    @given(st.sampled_from(CONFIGS).flatmap(lambda path: mutated(WHOLE[path])))
    def check(values):
        try:
            path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        except UnicodeEncodeError:  # no file holds such a thing
            return
        accepted(path)

    check()


@pytest.mark.parametrize("text", ["seed: 2001-99-99", "name: \0", "seed: " + "9" * 5000, "moe: " + "[" * 5000])
def test_texts_that_yaml_itself_stumbles_over_are_refused_in_a_line(scratch, text):
    path = scratch / "config.yaml"
    path.write_text(text)
    assert accepted(path) is None
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(CONFIGS[0], [text.replace(": ", "=", 1)])


def test_damaged_configuration_files_are_refused_in_a_line_or_can_be_kept(scratch):
    path = scratch / "config.yaml"

    @examples(8)
    @given(st.sampled_from(CONFIGS), damages())
    def check(source, harm):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            path.rmdir()
        path.write_bytes(source.read_bytes())
        harm.do(path)
        accepted(path)

    check()


def test_overrides_of_any_kind_are_refused_in_a_line_or_can_be_kept(scratch):
    single = next(path for path in CONFIGS if "stages" not in WHOLE[path])
    words = st.one_of(st.text(max_size=12), st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=8)))

    @examples(15)
    @given(st.lists(words, min_size=1, max_size=2))
    def check(overrides):
        try:
            load_config(single, overrides)
        except ConfigError as error:
            assert "\n" not in str(error)

    check()


KEYS = ("train.lr", "train.steps", "moe.experts", "data.languages", "data.train", "monitor.max_forgetting", "health")
TEXTS = [f"dokument {n}: tŷ, ein Haus, {'x' * (n % 40)}" for n in range(120)]


def _jsonl() -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def _parquet(path: Path) -> bytes:
    pq.write_table(pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), path, row_group_size=40)
    return path.read_bytes()


@pytest.fixture(scope="module")
def corpora(scratch) -> dict[str, bytes]:
    plain, compress = _jsonl(), zstd().compress
    return {
        "a.jsonl": plain,
        "a.txt": "\n".join(TEXTS).encode(),
        "a.jsonl.gz": gzip.compress(plain, mtime=0),
        "a.jsonl.zst": compress(plain),
        "a.parquet": _parquet(scratch / "whole.parquet"),
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_texts_are_refused_with_their_name_or_what_is_bad_is_counted(corpora, scratch, name, caplog):
    @examples(6)
    @given(damages(), st.sampled_from([0.0, 0.5, 1.0]))
    def check(harm, tolerated):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / name
            path.write_bytes(corpora[name])
            harm.do(path)
            source = SourceConfig(path=name, lang="en")
            try:
                texts = [document.text for document in read_documents(source, folder, tolerated)]
            except DataError as error:
                assert name in str(error) and "\n" not in str(error), error
                return
            assert texts and all(isinstance(text, str) and text.strip() for text in texts)
            if name.endswith(".gz"):  # which has a checksum of its own
                assert texts[: len(TEXTS)] == TEXTS

    check()


def test_damaged_tokenizer_and_base_are_refused_in_a_line(scratch):
    """Every file of a base's folder, read as a run reads it."""
    from moect.data.vocabulary.tokenizer import load_tokenizer
    from moect.model.build import build_model, load_base_config

    (scratch / "inputs").mkdir()
    base = make_inputs(scratch / "inputs") / "base"
    values = {
        "model": {"base": str(base)},
        "data": {"languages": {"en": "old"}, "train": [{"path": "x", "lang": "en"}]},
    }
    config = config_from_dict(values)
    contents = {path: path.read_bytes() for path in base.iterdir()}

    @examples(5)
    @given(st.sampled_from(sorted(contents)), damages("flip", "truncate", "zero", "insert", "empty", "missing"))
    def check(path, harm):
        harm.do(path)
        try:
            tokenizer = load_tokenizer(config.model)
            load_base_config(config.model)
            build_model(config)
            assert tokenizer("un dau")["input_ids"]
        except MoectError as error:
            assert "\n" not in str(error)
        finally:
            path.write_bytes(contents[path])

    check()
