"""Tokenizers: trained, saved, and loaded as they were."""

import json
import logging

import pytest
from transformers import AutoTokenizer

from moect.config import ModelConfig, config_from_dict
from moect.data.vocabulary.tokenizer import find_tokenizer, load_tokenizer, run_tokenizer, train_tokenizer
from moect.errors import DataError

TEXTS = ["<cy> 219 = dau gant a phedwar ar bymtheg", "þrjú hundruð\ntvö  þúsund 1999"] * 3
TEXT = "<cy> 219 = dau  gant é\n 世 \t't's"


@pytest.fixture
def trained(tmp_path):
    return train_tokenizer(TEXTS, 300, tmp_path / "tokenizer"), tmp_path / "tokenizer"


def test_a_trained_tokenizer_gives_any_text_back_and_begins_with_bos(trained):
    tokenizer, _ = trained
    assert len(tokenizer) == 300
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == TEXT
    assert tokenizer(TEXT).input_ids == [0, *ids]
    assert len(tokenizer("dau gant", add_special_tokens=False).input_ids) < 8


def test_training_a_tokenizer_twice_gives_the_same_file(tmp_path):
    files = []
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), 300, tmp_path / name)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("model_type", [None, "qwen2", "qwen3", "llama", "mistral"])
def test_a_tokenizer_is_loaded_as_its_file_says_whatever_model_lies_beside_it(trained, caplog, model_type):
    tokenizer, folder = trained
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with caplog.at_level(logging.WARNING, "moect.data"):
        loaded = load_tokenizer(ModelConfig(base=str(folder)))
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert [loaded.bos_token, loaded.eos_token, loaded.pad_token] == ["<s>", "</s>", "<pad>"]
    stock = AutoTokenizer.from_pretrained(folder)
    assert ("reading the file" in caplog.text) == (stock(TEXT).input_ids != tokenizer(TEXT).input_ids)


def test_a_bare_tokenizer_file_takes_the_usual_special_tokens_and_says_so(trained, caplog):
    tokenizer, folder = trained
    with caplog.at_level(logging.INFO, "moect.data"):
        loaded = load_tokenizer(ModelConfig(base="unused", tokenizer=str(folder / "tokenizer.json")))
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>") and len(loaded) == len(tokenizer)
    assert "begin with <s> and end with </s>" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file or folder"), ("folder", "cannot be loaded"), ("file", "cannot be loaded")],
)
def test_a_tokenizer_that_cannot_be_loaded_is_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "t"
    if content == "folder":
        path.mkdir()
        (path / "tokenizer.json").write_text("{")
    elif content == "file":
        path.write_text("not JSON")
    with pytest.raises(DataError, match=rf"tokenizer {path}: {message}.*`model\.tokenizer`") as caught:
        load_tokenizer(ModelConfig(base=str(path)))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match="a tokenizer of 258 tokens: bytes and special tokens alone are 259"):
        train_tokenizer(TEXTS, 258, tmp_path)


def test_a_tokenizer_that_is_still_to_be_trained_is_not_found(tmp_path):
    (tmp_path / "cy.txt").write_text("\n".join(TEXTS[::2]))
    folder = str(tmp_path / "tokenizer")
    config = config_from_dict(
        {
            "method": "full",
            "output": str(tmp_path / "runs"),
            "model": {"from_config": {"model_type": "llama"}, "tokenizer": folder, "train_tokenizer": 300},
            "data": {"root": str(tmp_path), "languages": {"cy": "old"}, "train": [{"path": "cy.txt", "lang": "cy"}]},
        }
    )
    assert find_tokenizer(config) is None
    made = run_tokenizer(config)
    assert find_tokenizer(config).get_vocab() == made.get_vocab()
