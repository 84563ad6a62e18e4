"""Shared by all tests: no network, one thread, so that results repeat bit for bit."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A tiny base with tokenizer and texts, made once; tests only read it."""
    from small_runs import make_inputs

    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """The base and texts, and a folder of this test's own for runs."""
    from small_runs import Place

    monkeypatch.delenv("MOECT_DATA", raising=False)
    return Place(inputs, tmp_path)


@pytest.fixture
def tokenized(monkeypatch):
    """Names of all documents that this process has tokenized, with how often."""
    from moect.data.tokens.tokenizing import BlockTokenizer

    counted = Counter()
    plain = BlockTokenizer.__call__

    def counting(self, block, limit=None):
        made = plain(self, block, limit)
        counted.update(made.ids)
        return made

    monkeypatch.setattr(BlockTokenizer, "__call__", counting)
    return counted
